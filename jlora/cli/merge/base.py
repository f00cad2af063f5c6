"""A base model as a directory of safetensors: names and shapes at once, weights when asked.

Sites are called as their modules; `layout` says how weights lie there. Only headers are read until
a weight or a shard is wanted.

Source: the layout of Hugging Face directories (`model.safetensors`, or shards and their index).
Deviates: pickled weights are refused.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jlora.cli.merge import layout, quantised
from jlora.cli.merge.tied import Tied, tied
from jlora.core.site import Site
from jlora.io import FormatError, NameMap, safetensors_file, whole_file
from jlora.io.inside import inside
from jlora.io.json_file import parse_json
from jlora.types import Json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = {name: safetensors_file.DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}
MARKER = "jlora_merge.json"  # alongside what the command writes; see `write`


class Base:
    """The weights of a base model in files.

    Raises:
      FormatError: no safetensors there, or an index and shards that do not fit.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir():
            raise FormatError(folder, "no such directory")
        self.files = sorted(p.name for p in folder.glob("*.safetensors"))
        index = folder / INDEX
        if index.is_file():
            data = parse_json(index, index.read_bytes())
            listed = data.get("weight_map") if isinstance(data, dict) else None
            if not isinstance(listed, Mapping) or not listed:
                raise FormatError(index, "lacks a weight_map")
            for file in listed.values():
                if inside(folder, file, index).suffix != ".safetensors":
                    raise FormatError(index, f"got the shard {file!r}, expected *.safetensors")
            self.files = sorted(set(listed.values()))
        elif SINGLE in self.files:
            self.files, listed = [SINGLE], None
        else:
            raise FormatError(folder, f"has neither {INDEX} nor {SINGLE}; found {self.files[:4]}")
        self.where: dict[str, str] = {}  # tensor -> file
        self.shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for file in self.files:
            for name, form in safetensors_file.header(folder / file).items():
                self.where[name], self.shapes[name] = file, form
        if listed is not None and dict(listed) != self.where:
            wrong = sorted(set(map(tuple, listed.items())) ^ set(self.where.items()))[:4]
            raise FormatError(index, f"the index and the shards differ: {wrong}")
        self.quantised = quantised.modules(self.shapes)

    def params(self, tables: Collection[str] = ()) -> dict[str, dict[str, Json]]:
        """What `jl.io` takes for the parameters of the model: sites instead of weights.

        Codes of quantised weights count as float32, which is what their values are read as.

        Args:
          tables: the modules whose weight is an embedding table; () where the adapters have none.

        Returns:
          Module -> the site of its weight (of 2 to 5 axes), and its bias where there is one.
        """
        tree: dict[str, dict[str, Json]] = {}
        for name, (shape, dtype) in self.shapes.items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and 2 <= len(shape) <= 5:
                kind = dtype if dtype in FLOATS.values() else np.dtype(np.float32)
                site = layout.site_of(module, shape, kind, module in tables)
                tree.setdefault(module, {})[site.path.rpartition("/")[2]] = site
            elif kind == "bias":
                tree.setdefault(module, {})["bias"] = jax.ShapeDtypeStruct(shape, dtype)
        return tree

    def tensor(self, name: str) -> np.ndarray:
        """A tensor of the base.

        Args:
          name: such as ``model.layers.0.mlp.up_proj.weight``.

        Returns:
          As it is stored.

        Raises:
          FormatError: there is none of that name.
        """
        if name not in self.where:
            raise FormatError(self.folder, f"has no {name}")
        return safetensors_file.tensor(self.folder / self.where[name], name)

    def readable(self, module: str) -> None:
        """Refuses a module whose weight cannot be read as numbers; see `quantised`.

        Args:
          module: its name.

        Raises:
          FormatError: the layout of its codes is not known.
        """
        why = quantised.refusal(f"{module}.weight", self.shapes, self.quantised)
        if why:
            raise FormatError(self.folder, why)
        if module in self.quantised and f"{module}.weight_format" in self.where:
            got = self.tensor(f"{module}.weight_format")
            if got.size != 1 or int(got.ravel()[0]) != quantised.ROW_MAJOR:
                raise FormatError(
                    self.folder, f"{module}.weight_format: got {got.tolist()}, expected 0 (row)"
                )

    def packed(self, module: str) -> bool:
        """Whether a quantised module has no tensor of the shape of its matrix.

        Args:
          module: its name.

        Returns:
          False for a module that is not quantised.
        """
        stored = self.shapes.get(f"{module}.weight")
        return module in self.quantised and (stored is None or stored[1] == np.uint8)

    def values(self, name: str, stored: np.ndarray) -> np.ndarray:
        """A weight as numbers.

        Args:
          name: of the tensor.
          stored: the tensor as it is stored.

        Returns:
          float32, of the shape of `stored`.

        Raises:
          FormatError: it cannot be read (`readable`), or has values that are NaN or infinite.
        """
        module = name.removesuffix(".weight")
        self.readable(module)
        if module in self.quantised:
            stored = quantised.dequantised(stored, self.tensor(f"{module}.SCB"))
        with np.errstate(over="ignore"):
            value = stored.astype(np.float32)
        bad = safetensors_file.not_finite(value)
        if bad:
            raise FormatError(
                self.folder, f"{name}: got {bad} values that are NaN or infinite, and it is changed"
            )
        return value

    def written(self, name: str, dtype: str | None, changed: Collection[str]) -> np.dtype | None:
        """The dtype in which a tensor is written.

        Args:
          name: of the tensor.
          dtype: what the user wants for floating point; None: that of the base.
          changed: the tensors that an adapter changes.

        Returns:
          The dtype; None where the tensor is left out.

        Raises:
          FormatError: a changed float8 weight for which no dtype is given.
        """
        old = self.shapes[name][1]
        given = None if dtype is None else np.dtype(jnp.dtype(dtype))
        module = name.rpartition(".")[0]
        if name in changed:
            if module in self.quantised:
                return given or self.dtype()
            if old in safetensors_file.FLOAT8.values() and given is None:
                raise FormatError(
                    self.folder,
                    f"{name}: got {old}, which rounds most of a change away; say out.dtype",
                )
            return given or old
        owner = next((m for m, q in self._owners(name) if name in q.parts), None)
        if owner is not None:
            return None if f"{owner}.weight" in changed else old
        return given if given is not None and old in FLOATS.values() else old

    def _owners(self, name: str) -> Iterator[tuple[str, quantised.Module]]:
        """The quantised modules around a tensor."""
        module = name.rpartition(".")[0]
        while module:
            if module in self.quantised:
                yield module, self.quantised[module]
            module = module.rpartition(".")[0]

    def dtype(self) -> np.dtype:
        """The floating dtype of the model.

        Returns:
          What `config.json` says, else float32.

        Raises:
          FormatError: `config.json` is not a JSON object.
        """
        config = self.config()
        word = config.get("dtype") or config.get("torch_dtype")
        known = {d.name: d for d in FLOATS.values()}
        return known.get(str(word), np.dtype(np.float32))

    def config(self) -> dict[str, Json]:
        """The content of `config.json`.

        Returns:
          {} where there is none.

        Raises:
          FormatError: it is not a JSON object.
        """
        path = self.folder / "config.json"
        if not path.is_file():
            return {}
        data = parse_json(path, path.read_bytes())
        if not isinstance(data, dict):
            raise FormatError(path, f"got {type(data).__name__}, expected a JSON object")
        return data

    def check(self, site: Site, module: str) -> str:
        """The tensor that is one slice of a site.

        Args:
          site: with or without a stack.
          module: its name in the base.

        Returns:
          The name of the tensor.

        Raises:
          FormatError: there is none, or it has another shape.
        """
        name, expected = f"{module}.weight", layout.torch_shape(site)
        self.readable(module)
        if name not in self.where:
            raise FormatError(self.folder, f"has no {name}, which the adapters change")
        got = self.shapes[name][0]
        if got != expected:
            raise FormatError(self.folder, f"{name}: got {got}, expected {expected} of {site.path}")
        return name

    def kernel(self, site: Site, names: NameMap) -> Float[np.ndarray, "*stack d_in d_out"]:
        """The weight of a site, put together from the modules that a name map gives.

        Args:
          site: with or without a stack.
          names: from site paths to torch modules.

        Returns:
          [*stack, d_in, d_out], float32.

        Raises:
          FormatError: as `check` and `values`.
        """
        parts = []
        for index in np.ndindex(*site.stack):
            name = self.check(site, self.module(names.module(site.path, index), names))
            parts.append(layout.from_torch(site, self.values(name, self.tensor(name))))
        return np.stack(parts).reshape(*site.stack, site.d_in, site.d_out)

    def tied(self) -> Tied | None:
        """Whether the embedding table is the output layer as well; see `tied`.

        Returns:
          None where it is not.

        Raises:
          FormatError: `config.json` is not a JSON object.
        """
        return tied(self.config(), self.where)

    def module(self, name: str, names: NameMap) -> str:
        """The name in the base of a module as adapters call it: with or without the prefix.

        Args:
          name: by the name map.
          names: the map, with its prefix.

        Returns:
          `name`, or without the prefix where the base has no weight of that name.
        """
        return name if f"{name}.weight" in self.where else name.removeprefix(names.prefix)

    def shards(self) -> Iterator[tuple[str, dict[str, np.ndarray], dict[str, str]]]:
        """The files, one in memory at a time.

        Yields:
          (file, tensors by name, metadata).

        Raises:
          FormatError: a file that is not whole.
        """
        for file in self.files:
            dtypes = safetensors_file.EVERY_DTYPE
            yield (file, *safetensors_file.read(self.folder / file, dtypes=dtypes, finite=False))

    def rest(self) -> list[Path]:
        """Returns the other files that belong to it: configuration, tokenizer, index."""
        unwanted = whole_file.PICKLES | {".safetensors", ".h5", ".gguf", ".onnx"}
        files = [p for p in sorted(self.folder.iterdir()) if p.is_file() and p.name != MARKER]
        return [p for p in files if p.suffix not in unwanted and not p.name.startswith(".")]

    def writing(self, changed: Collection[str], dtype: str | None) -> int:
        """The memory that writing merged weights takes, the worst shard: `write.merged`.

        Reading and writing hold a file three times; a sum holds all of it and two matrices in
        float32.

        Args:
          changed: the tensors that adapters change.
          dtype: what the user wants for floating point; None: that of the base.

        Returns:
          Bytes at the peak.

        Raises:
          FormatError: as `written`.
        """
        peaks = []
        for file in self.files:
            before = after = added = 0
            for name in (n for n, where in self.where.items() if where == file):
                shape, old = self.shapes[name]
                size, new = math.prod(shape), self.written(name, dtype, changed)
                before += size * old.itemsize
                after += size * new.itemsize if new is not None else 0
                added = max(added, 8 * size * (name in changed))
            peaks.append(max(3 * before, 3 * after, max(before, after) + added))
        return max(peaks)
