"""A checkpoint put together from layers of others, as `slices` of mergekit say (frankenmerges).

    layers 0, 1, ... of the result   those of `layer_range` of every slice, slice after slice
    tables before the layers         of the first slice's model
    norms and heads after them       of the last slice's model

It is a `Base` whose tensors lie in the files of several models; each is read when it is asked for.
It is written in files of its own, with the number of layers in `config.json`, and there what the
configuration lists for each layer (`layer_types`).

Reference: mergekit 0.1.5, `slices`.
Deviates: models whose layers have other shapes, and models of tied and of separate output layers
together, are refused (mergekit writes what no program loads).
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jlora.cli.merge import quantised
from jlora.cli.merge.base import INDEX, SINGLE, Base
from jlora.cli.merge.values import LAYER, ConfigError
from jlora.io import FormatError
from jlora.types import Json

FILE_BYTES = 2**32  # of one written file, unless one tensor has more
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
BEFORE = ("embed", "wte", "wpe")  # parts of the names of what comes before the layers


class Part(NamedTuple):
    """Consecutive layers of one model."""

    model: Base
    start: int  # in that model
    stop: int


class Moved(Base):
    """The layers of `parts` as one model.

    Args:
      parts: in the order of the result, at least one.
      config: the model whose configuration and tokenizer it takes.
      cast: whether the weights are cast to one dtype anyhow.

    Raises:
      ConfigError: a layer that a model lacks.
      FormatError: models whose layers do not fit each other, or a configuration that does not say
        the number of layers, or what it lists for each of them.
    """

    def __init__(self, parts: Sequence[Part], config: Base, cast: bool):
        self.parts, self.folder, self._config = parts, config.folder, config
        self.sources: dict[str, tuple[Base, str]] = {}  # tensor -> (model, its name there)
        self._check_tied()
        first, last = parts[0].model, parts[-1].model
        for model, early in ((first, True), (last, False)):
            for name in model.shapes:
                if LAYER.search(name) is None and before(name) == early:
                    self.sources[name] = (model, name)
        at = 0
        for part in parts:
            at = self._add(part, at)
        self.layers = at
        self.shapes = {name: m.shapes[own] for name, (m, own) in self.sources.items()}
        self._check_forms(cast)
        self.where = _files(self.shapes)
        self.files = sorted(set(self.where.values()))
        self.quantised = quantised.modules(self.shapes)
        self.settings = self._settings()

    def _add(self, part: Part, at: int) -> int:
        """Takes the layers of a part as those from `at` on; the next layer."""
        groups: dict[int, list[str]] = {}
        stacks = set()
        for name in part.model.shapes:
            layer = LAYER.search(name)
            if layer is not None:
                stacks.add(name[: layer.start(1)])
                groups.setdefault(int(layer[1]), []).append(name)
        if len(stacks) != 1:
            raise FormatError(part.model.folder, f"got layers in {sorted(stacks)}, expected one "
                              "stack of layers, of which slices can be taken")  # fmt: skip
        for k, layer in enumerate(range(part.start, part.stop)):
            if layer not in groups:
                raise ConfigError(
                    f"slices: layer_range: got [{part.start}, {part.stop}], expected layers of "
                    f"{part.model.folder}, which has {max(groups) + 1}"
                )
            for own in groups[layer]:
                match = LAYER.search(own)
                assert match is not None
                new = f"{own[: match.start(1)]}{at + k}{own[match.end(1) :]}"
                self.sources[new] = (part.model, own)
        return at + part.stop - part.start

    def _check_tied(self) -> None:
        first, last = self.parts[0].model, self.parts[-1].model
        tied = [model.tied() for model in (first, last)]
        if any(tied) and first.folder.resolve() != last.folder.resolve():
            raise FormatError(last.folder, "the last slice has the output layer, which is the "
                              "embedding table of the first slice; expected a layer range of "
                              f"{first.folder} in both, or models with separate ones")  # fmt: skip

    def _check_forms(self, cast: bool) -> None:
        """Refuses layers of other shapes or dtypes than the first model's."""
        known: dict[str, set] = {}
        for name, form in self.parts[0].model.shapes.items():
            known.setdefault(LAYER.sub(".*.", name, 1), set()).add(form)
        for name, (model, own) in self.sources.items():
            shape, dtype = self.shapes[name]
            forms = known.get(LAYER.sub(".*.", name, 1))
            if forms is None:
                continue
            if shape not in {s for s, _ in forms}:
                raise FormatError(model.folder, f"{own}: got {shape}, expected "
                                  f"{sorted(s for s, _ in forms)[0]} as in "
                                  f"{self.parts[0].model.folder}")  # fmt: skip
            if not cast and dtype not in {d for _, d in forms}:
                raise FormatError(model.folder, f"{own}: got {dtype}, expected "
                                  f"{sorted(str(d) for _, d in forms)[0]} as in "
                                  f"{self.parts[0].model.folder}, or that dtype or out_dtype says "
                                  "in which to write")  # fmt: skip

    def tensor(self, name: str) -> np.ndarray:
        """A tensor of the result's name, as it is stored in its model.

        Args:
          name: of the result.

        Returns:
          The array.

        Raises:
          FormatError: there is none of that name.
        """
        if name not in self.sources:
            raise FormatError(self.folder, f"has no {name}")
        model, own = self.sources[name]
        return model.tensor(own)

    def shards(self) -> Iterator[tuple[str, dict[str, np.ndarray], dict[str, str]]]:
        """The files to write, one in memory at a time.

        Yields:
          (file, tensors by name, metadata).
        """
        for file in self.files:
            names = [name for name, where in self.where.items() if where == file]
            yield file, {name: self.tensor(name) for name in names}, {"format": "pt"}

    def rest(self) -> list[Path]:
        """Returns the other files of the model whose configuration it takes, but for the index."""
        return [path for path in self._config.rest() if path.name != INDEX]

    def config(self) -> dict[str, Json]:
        """The configuration with the number of layers, and what it lists for each of them.

        Returns:
          {} where there is none.
        """
        return dict(self.settings)

    def _settings(self) -> dict[str, Json]:
        config = self._config.config()
        if not config:
            return config
        key = next((key for key in COUNTS if type(config.get(key)) is int), None)
        if key is None:
            raise FormatError(self.folder / "config.json", f"got none of {', '.join(COUNTS)}, "
                              "expected the number of layers, which changes")  # fmt: skip
        for name, value in config.items():
            if "layer" in name and isinstance(value, list) and len(value) == config[key]:
                config[name] = [entry for part in self.parts for entry in _entries(part, name)]
        return config | {key: self.layers}

    def finish(self, path: Path) -> None:
        """Writes the configuration and, for several files, their index.

        Args:
          path: the directory of the result.
        """
        if self.settings:
            (path / "config.json").write_text(json.dumps(self.settings, indent=2) + "\n")
        if len(self.files) > 1:
            size = sum(math.prod(s) * d.itemsize for s, d in self.shapes.values())
            index = {"metadata": {"total_size": size}, "weight_map": self.where}
            (path / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def before(name: str) -> bool:
    """Whether a tensor that is in no layer comes before them, as embedding tables do.

    Args:
      name: of the tensor.

    Returns:
      False for norms and output layers.
    """
    return any(word in name for word in BEFORE)


def _entries(part: Part, name: str) -> list[Json]:
    """What a model's configuration lists for the layers of a part."""
    listed = part.model.config().get(name)
    if not isinstance(listed, list) or len(listed) < part.stop:
        raise FormatError(
            part.model.folder / "config.json",
            f"{name}: got {listed!r}, expected a list with an entry for each layer",
        )
    return listed[part.start : part.stop]


def _files(shapes: dict[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, str]:
    """The file of each tensor."""
    number, size, numbers = 0, 0, {}
    for name, (shape, dtype) in shapes.items():
        more = math.prod(shape) * dtype.itemsize
        if size and size + more > FILE_BYTES:
            number, size = number + 1, 0
        size += more
        numbers[name] = number
    if not number:
        return dict.fromkeys(numbers, SINGLE)
    stem = SINGLE.removesuffix(".safetensors")
    return {
        name: f"{stem}-{k + 1:05d}-of-{number + 1:05d}.safetensors" for name, k in numbers.items()
    }
