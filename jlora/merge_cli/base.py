"""A base model as a directory of safetensors: names and shapes at once, weights when asked.

Torch keeps the weight of a linear layer as [out, in]; here it is a kernel [in, out] of a site that
is called as its module. Only headers are read until a weight or a shard is wanted.

Source: the layout of Hugging Face directories (`model.safetensors`, or shards and their index).
Deviates: pickled weights are refused.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

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
            for name, shape, dtype in self._header(file):
                self.where[name], self.shapes[name] = file, (shape, dtype)
        if listed is not None and dict(listed) != self.where:
            wrong = sorted(set(map(tuple, listed.items())) ^ set(self.where.items()))[:4]
            raise FormatError(index, f"the index and the shards differ: {wrong}")

    def params(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Module -> abstract kernel [in, out], of all matrices, and bias where there is one."""
        found: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
        for name, (shape, dtype) in self.shapes.items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and len(shape) == 2:
                found.setdefault(module, {})["kernel"] = jax.ShapeDtypeStruct(shape[::-1], dtype)
            elif kind == "bias":
                found.setdefault(module, {})["bias"] = jax.ShapeDtypeStruct(shape, dtype)
        return found

    def weight(self, module: str) -> np.ndarray:
        """The kernel [in, out] of a module of the base."""
        name = f"{module}.weight"
        if name not in self.where:
            raise FormatError(self.folder, f"has no {name}")
        with safetensors.safe_open(self.folder / self.where[name], framework="flax") as file:
            return np.asarray(file.get_tensor(name)).T

    def kernel(self, site: Site, names: NameMap) -> np.ndarray:
        """[*stack, in, out] of a site, put together from the modules that `names` gives."""
        parts = [
            self.weight(self.module(names.module(site.path, index), names))
            for index in np.ndindex(*site.stack)
        ]
        return np.stack(parts).reshape(*site.stack, site.d_in, site.d_out)

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

    def largest_file(self) -> int:
        """Bytes of the largest shard."""
        return max((self.folder / file).stat().st_size for file in self.files)

    def _header(self, file: str) -> Iterator[tuple[str, tuple[int, ...], np.dtype]]:
        path = self.folder / file
        try:
            with open(path, "rb") as f:
                size = int.from_bytes(f.read(8), "little")
                if size > safetensors_file.MAX_HEADER:
                    raise FormatError(path, f"a header of {size} bytes")
                header = json.loads(f.read(size))
            for name, entry in header.items():
                if name != "__metadata__":
                    dtype = safetensors_file.DTYPES[entry["dtype"]]
                    yield name, tuple(entry["shape"]), jnp.dtype(dtype)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(path, f"not a safetensors file ({error})") from error
