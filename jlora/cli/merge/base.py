"""A base model as a directory of safetensors: names and shapes at once, weights when asked.

Sites are called as their modules; `layout` says how weights lie there. Only headers are read until
a weight or a shard is wanted.

Source: the layout of Hugging Face directories (`model.safetensors`, or shards and their index).
Deviates: pickled weights are refused.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from jlora.cli.merge import layout
from jlora.core.adapter import Site
from jlora.io import FormatError, NameMap, safetensors_file

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Base:
    """The weights of a base model in files.

    Raises FormatError: no safetensors there, or an index and shards that do not fit.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir():
            raise FormatError(folder, "no such directory")
        self.files = sorted(p.name for p in folder.glob("*.safetensors"))
        index = folder / INDEX
        if index.is_file():
            data = safetensors_file.parse_json(index, index.read_bytes())
            listed = data.get("weight_map") if isinstance(data, dict) else None
            if not isinstance(listed, Mapping) or not listed:
                raise FormatError(index, "lacks a weight_map")
            self.files = sorted(set(map(str, listed.values())))
        elif SINGLE in self.files:
            self.files, listed = [SINGLE], None
        else:
            raise FormatError(folder, f"has neither {INDEX} nor {SINGLE}; found {self.files[:4]}")
        self.where: dict[str, str] = {}  # tensor -> file
        self.shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for file in self.files:
            for name, shape, dtype in header(folder / file):
                self.where[name], self.shapes[name] = file, (shape, dtype)
        if listed is not None and dict(listed) != self.where:
            wrong = sorted(set(map(tuple, listed.items())) ^ set(self.where.items()))[:4]
            raise FormatError(index, f"the index and the shards differ: {wrong}")

    def params(self, tables: Collection[str] = ()) -> dict[str, dict[str, Any]]:
        """Module -> the site of its weight (of 2 to 5 axes), and its bias where there is one.

        `tables`: the modules whose weight is a looked-up table.
        """
        found: dict[str, dict[str, Any]] = {}
        for name, (shape, dtype) in self.shapes.items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and 2 <= len(shape) <= 5:
                site = layout.site_of(module, shape, dtype, module in tables)
                found.setdefault(module, {})[site.path.rpartition("/")[2]] = site
            elif kind == "bias":
                found.setdefault(module, {})["bias"] = jax.ShapeDtypeStruct(shape, dtype)
        return found

    def tensor(self, name: str) -> np.ndarray:
        """A tensor of the base. Raises FormatError: there is none of that name."""
        if name not in self.where:
            raise FormatError(self.folder, f"has no {name}")
        with safetensors.safe_open(self.folder / self.where[name], framework="flax") as file:
            return np.asarray(file.get_tensor(name))

    def check(self, site: Site, module: str) -> str:
        """The name of the tensor of a module, if it can be one slice of a site.

        Raises FormatError: there is none, or it has another shape.
        """
        name, expected = f"{module}.weight", layout.torch_shape(site)
        if name not in self.where:
            raise FormatError(self.folder, f"has no {name}, which the adapters change")
        got = self.shapes[name][0]
        if got != expected:
            raise FormatError(self.folder, f"{name}: got {got}, expected {expected} of {site.path}")
        return name

    def kernel(self, site: Site, names: NameMap) -> np.ndarray:
        """[*stack, in, out] of a site, put together from the modules that `names` gives."""
        parts = []
        for index in np.ndindex(*site.stack):
            name = self.check(site, self.module(names.module(site.path, index), names))
            parts.append(layout.from_torch(site, self.tensor(name)))
        return np.stack(parts).reshape(*site.stack, site.d_in, site.d_out)

    def tied(self) -> int | None:
        """The vocabulary whose table is the output layer as well, if `config.json` says so."""
        path = self.folder / "config.json"
        data = safetensors_file.parse_json(path, path.read_bytes()) if path.is_file() else {}
        told = data if isinstance(data, dict) else {}
        parts = [part for part in (told, told.get("text_config")) if isinstance(part, dict)]
        if not any(part.get("tie_word_embeddings") is True for part in parts):
            return None
        return next((part["vocab_size"] for part in parts if "vocab_size" in part), None)

    def module(self, name: str, names: NameMap) -> str:
        """The name in the base of a module as adapters call it: with or without the prefix."""
        return name if f"{name}.weight" in self.where else name.removeprefix(names.prefix)

    def shards(self) -> Iterator[tuple[str, dict[str, np.ndarray], dict[str, str]]]:
        """(file, tensors, metadata), one file in memory at a time."""
        for file in self.files:
            yield (file, *safetensors_file.read(self.folder / file))

    def rest(self) -> list[Path]:
        """The other files that belong to it: configuration, tokenizer, index."""
        unwanted = safetensors_file.PICKLES | {".safetensors", ".h5", ".gguf", ".onnx"}
        files = [p for p in sorted(self.folder.iterdir()) if p.is_file()]
        return [p for p in files if p.suffix not in unwanted and not p.name.startswith(".")]

    def writing(self, changed: Collection[str], dtype: str | None) -> int:
        """Bytes at the peak of writing merged weights, the worst shard: `write.merged` in `dtype`.

        Reading and writing hold a file three times, reading also the bits of a tensor that is
        checked to be finite; a sum holds all of it and two matrices in float32.
        """
        peaks = []
        for file in self.files:
            before = after = checked = added = 0
            for name in (n for n, where in self.where.items() if where == file):
                shape, old = self.shapes[name]
                size, floating = math.prod(shape), jnp.issubdtype(old, jnp.floating)
                new = jnp.dtype(dtype) if dtype and floating else old
                before, after = before + size * old.itemsize, after + size * new.itemsize
                checked = max(checked, size * (old.itemsize + 1) * floating)
                added = max(added, 8 * size * (name in changed))
            peaks.append(max(3 * before + checked, 3 * after, max(before, after) + added))
        return max(peaks)


def header(path: Path) -> Iterator[tuple[str, tuple[int, ...], np.dtype]]:
    """(name, shape, dtype) of the tensors of a file. Raises FormatError: it is none."""
    try:
        with open(path, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            if size > safetensors_file.MAX_HEADER:
                raise FormatError(path, f"a header of {size} bytes")
            entries = json.loads(f.read(size))
        for name, entry in entries.items():
            if name != "__metadata__":
                dtype = safetensors_file.DTYPES[entry["dtype"]]
                yield name, tuple(entry["shape"]), jnp.dtype(dtype)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(path, f"not a safetensors file ({error})") from error
