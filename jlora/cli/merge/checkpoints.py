"""What a merge of whole tensors reads: checkpoints and adapters on one base, tensor by tensor.

=======  =======================================================================================
donor    the model whose files are copied and whose tensors are replaced: the base, or without one
         the first model
B, W_n   a tensor of the base and of model n; D_n = W_n - B, of an adapter its delta
=======  =======================================================================================

A directory with `model.safetensors` or its index, and no adapter in it, is a checkpoint. A tensor
of every model is in memory at a time.

Source: mergekit 0.1.5, the meaning of its files.
Deviates: tensors are those of the donor's files, not of a list for each architecture; a model that
lacks one, or has a further one, is refused.
"""

import dataclasses
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jlora.cli.merge import layout, read, write
from jlora.cli.merge.base import INDEX, SINGLE, Base
from jlora.cli.merge.config import Config
from jlora.cli.merge.mergekit import Method
from jlora.cli.merge.moved import Moved, Part
from jlora.cli.merge.values import LAYER, ConfigError
from jlora.io import FormatError, safetensors_file, whole_file
from jlora.io.json_file import parse_json
from jlora.merging.engine.inputs import Gathered, gather
from jlora.types import Dynamic

TIED = {"lm_head.weight": "model.embed_tokens.weight"}  # where a model has one tensor for both
BUFFERS = re.compile(
    r".*\.(rotary_emb\.inv_freq|position_ids|masked_bias)"
)  # computed, not trained
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a full model in safetensors.

    Args:
      path: a directory.

    Returns:
      False for one with a PEFT adapter.
    """
    full = (path / INDEX).is_file() or (path / SINGLE).is_file()
    return full and not read.is_peft(path)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The models of a merge in the order in which the method takes them."""

    donor: Base
    base: Base | None  # what task vectors are taken from, or the first of slerp; else None
    models: tuple[Base | int, ...]  # a checkpoint, or the number of an adapter in `given`
    listed: tuple[int | None, ...]  # which of `Config.models` each is; None: the base, unlisted
    given: Gathered | None  # the adapters
    table: write.Changed  # tensor of the donor -> slice of a site that adapters change
    dtype: Dynamic  # the inputs are cast to it; None: to the widest of each tensor
    space: str  # "delta" or "weights", what is merged

    def names(self) -> list[str]:
        """Returns the tensors that are merged: all floating ones, or those that adapters change."""
        if all(isinstance(m, int) for m in self.models) and self.space == "delta":
            return [name for name in self.donor.shapes if name in self.table]
        return [n for n, (_, t) in self.donor.shapes.items() if jnp.issubdtype(t, jnp.floating)]

    def called(self, name: str) -> str:
        """A tensor's name, with that of its site where adapters change it, for filters.

        Args:
          name: of the tensor.

        Returns:
          Text in which filters are looked for.
        """
        return f"{name} ({self.table[name][0].path})" if name in self.table else name

    def working(self, name: str) -> np.dtype:
        """The dtype that the inputs of a tensor are cast to.

        Args:
          name: of the tensor.

        Returns:
          `dtype`, or the widest of the models'.

        Raises:
          FormatError: float64, which would be rounded to float32, unless `dtype` says so.
        """
        dtype = self.dtype and np.dtype(jnp.dtype(self.dtype))
        if dtype is None:
            dtype = self.donor.shapes[name][1]
            if not jnp.issubdtype(dtype, jnp.floating):  # codes, whose values come as float32
                dtype = np.dtype(np.float32)
            for m in self.models:
                if isinstance(m, Base):
                    dtype = np.dtype(jnp.promote_types(dtype, m.shapes[_own(m, name)][1]))
        if dtype.itemsize > 4:
            raise FormatError(self.donor.folder, f"{name}: got {dtype}, merges compute in float32; "
                              "say so by dtype: float32")  # fmt: skip
        return dtype

    def tensors(self, name: str, old: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """A tensor of every model.

        Args:
          name: of the tensor.
          old: the donor's, as it is stored.

        Returns:
          (B, what is merged of every model), float32.

        Raises:
          FormatError: as `working`.
        """
        dtype = self.working(name)
        donor = _cast(old, dtype)
        out = []
        for m in self.models:
            if isinstance(m, Base):
                w = donor if m is self.donor else _cast(m.tensor(_own(m, name)), dtype)
                out.append(w - donor if self.space == "delta" else w)
            else:
                d = self._delta(m, name)
                d = np.zeros_like(donor) if d is None else d
                out.append(d if self.space == "delta" else donor + d)
        return donor, out

    def check(self, out_dtype: str | None) -> None:
        """Refuses models that cannot be merged tensor by tensor.

        Args:
          out_dtype: the dtype that is written; None: that of the donor.

        Raises:
          FormatError: integers that differ between models, or dtypes that do.
        """
        for name, (_, dtype) in self.donor.shapes.items():
            for m in self.models:
                if not isinstance(m, Base) or m is self.donor or _own(m, name) not in m.shapes:
                    continue
                got = m.shapes[_own(m, name)][1]
                both = (dtype, got)
                if any(not jnp.issubdtype(t, jnp.floating) for t in both):
                    if dtype != got or not np.array_equal(m.tensor(name), self.donor.tensor(name)):
                        raise FormatError(m.folder, f"{name}: got {got} numbers that are not those "
                                          f"of {self.donor.folder}; expected equal ones, or "
                                          "floating point, which can be merged")  # fmt: skip
                elif dtype != got and not (self.dtype or out_dtype):
                    raise FormatError(m.folder, f"{name}: got {got}, expected {dtype} of "
                                      f"{self.donor.folder}, or that dtype or out_dtype says in "
                                      "which to write")  # fmt: skip

    def _delta(self, k: int, name: str) -> np.ndarray | None:
        if self.given is None or name not in self.table:
            return None
        site, index = self.table[name]
        u, v = (np.asarray(t[(k, *index)], np.float32) for t in self.given.bank[site.path])
        return layout.to_torch(site, u @ v)


def inputs(config: Config, method: Method, base: Base | None) -> Inputs:
    """What a configuration gives a method of mergekit.

    Args:
      config: of the merge.
      method: of mergekit.
      base: the base model; None: none is given.

    Returns:
      The models in the order in which the method takes them.

    Raises:
      ConfigError: no base where one is needed, or too few or too many models.
      FormatError: checkpoints of other tensors or shapes, or adapters that do not fit the base.
    """
    full = [is_checkpoint(m.path) for m in config.models]
    adapters = tuple(m for m, f in zip(config.models, full, strict=True) if not f)
    if base is None and (adapters or method.base == "required"):
        raise ConfigError(f"base_model: lacks; {method.name} of these models needs one")
    given, table = None, write.Changed()
    if adapters and base is not None:
        part = dataclasses.replace(config, models=adapters)
        given = gather(read.adapters(part, base), None, missing=config.missing)
        table = write.changed(base, given.sites, config.names)
    models: list[Base | int] = []
    listed: list[int | None] = []
    base, opened = _opened(config, method, base)
    for k, (model, f) in enumerate(zip(config.models, full, strict=True)):
        is_base = f and base is not None and (
            opened[k] is base if opened else model.path.resolve() == base.folder.resolve()
        )  # fmt: skip
        if is_base and method.base != "input":
            continue
        at = sum(not x for x in full[:k])
        checkpoint = base if is_base else opened[k] if opened else None
        models.append(at if not f else checkpoint or Base(model.path))
        listed.append(k)
    if method.base == "input" and base is not None and config.base_given and base not in models:
        if not config.slices and (method.name == "karcher" or "weight" in config.parameters):
            models.append(base)  # as mergekit does
            listed.append(None)
        elif any(full):
            raise ConfigError(f"base_model: {method.name} has none but models, with parameters: "
                              "expected it in models, or no base_model")  # fmt: skip
    most = method.most or len(models)
    if not method.least <= len(models) <= most:
        raise ConfigError(f"models: {method.name} takes {method.least}"
                          f"{'' if most == method.least else ' or more'}"
                          f"{' besides the base' if method.base != 'input' else ''}, "
                          f"got {len(models)}")  # fmt: skip
    donor = base or next(m for m in models if isinstance(m, Base))
    for m in models:
        if isinstance(m, Base):
            _check(m, donor)
    space = method.space
    if space == "either":
        space = "weights" if base is None or not config.base_given else "delta"
    own = None if method.base == "input" else base
    return Inputs(donor, own, tuple(models), tuple(listed), given, table, config.dtype, space)


def _opened(config: Config, method: Method, base: Base | None) -> tuple[Base | None, list[Moved]]:
    """The base, and the models put together from the layers of slices; [] where no layer moves.

    Raises ConfigError for adapters, and for a base that is not the same source of every slice.
    """
    if not config.slices:
        return base, []
    by_folder: dict[Path, Base] = {}
    for path in dict.fromkeys(m.path for part in config.slices for m in part.sources):
        if is_checkpoint(path):
            by_folder[path] = Base(path)
    first = by_folder.get(config.models[0].path)
    stays = all(part.stays(config.models) for part in config.slices)
    if stays and (first is None or _layers(first) == config.slices[-1].stop):
        return base, []
    others = [m.path for part in config.slices for m in part.sources if m.path not in by_folder]
    if others:
        raise ConfigError(f"slices: got {others[0]}, expected checkpoints: layers of adapters stay "
                          "where they are, all of the model")  # fmt: skip
    settings = base or first
    assert settings is not None
    cast = bool(config.dtype or config.out.dtype)
    opened, bases = [], []
    for n in range(len(config.models)):
        parts = [
            Part(by_folder[part.sources[n].path], part.starts[n],
                 part.starts[n] + part.stop - part.start)
            for part in config.slices
        ]  # fmt: skip
        opened.append(Moved(parts, settings, cast))
        if base is not None:
            paths = {part.model.folder.resolve() for part in parts}
            bases += [opened[n]] if paths == {base.folder.resolve()} else []
    if method.base == "input":  # it gives its configuration and tokenizer alone
        return bases[0] if bases else None, opened
    if base is not None and not bases:
        raise ConfigError(f"base_model: got {base.folder}, expected it at the same place of the "
                          "sources of every slice: layers are compared with those")  # fmt: skip
    return (bases[0] if bases else None), opened


def _layers(model: Base) -> int:
    matches = [LAYER.search(name) for name in model.shapes]
    return max((int(layer[1]) + 1 for layer in matches if layer), default=0)


def check_tokenizers(config: Config, donor: Base) -> None:
    """Refuses models whose vocabularies differ, where `tokenizer_source` is given.

    Args:
      config: of the merge.
      donor: the model whose files are kept.

    Raises:
      ConfigError: a vocabulary is not the donor's.
    """
    if config.tokenizer is None:
        return
    others = config.paths()
    others += [config.tokenizer] if isinstance(config.tokenizer, Path) else []
    for folder in others:
        for file in VOCABULARIES:
            a, b = donor.folder / file, folder / file
            if a.is_file() and b.is_file() and _vocabulary(a) != _vocabulary(b):
                raise ConfigError(
                    f"tokenizer_source: {b} has another vocabulary than {a}, and rows of tables "
                    "are not moved; expected equal ones"
                )


def _vocabulary(path: Path) -> Dynamic:
    data = whole_file.read_bytes(path, safetensors_file.MAX_BYTES)
    if path.name != "tokenizer.json":
        return data
    document = parse_json(path, data)
    model = document.get("model") if isinstance(document, dict) else None
    added = document.get("added_tokens") if isinstance(document, dict) else None
    return (model or {}).get("vocab") if isinstance(model, dict) else None, added


def _check(model: Base, donor: Base) -> None:
    for name, (shape, _) in donor.shapes.items():
        if BUFFERS.fullmatch(name):
            continue
        own = _own(model, name)
        if own not in model.shapes:
            raise FormatError(model.folder, f"has no {name}, which {donor.folder} has")
        got = model.shapes[own][0]
        if got != shape:
            raise FormatError(model.folder, f"{name}: got {got}, expected {shape} of "
                              f"{donor.folder}; vocabularies are not aligned")  # fmt: skip
    extra = [n for n in model.shapes if n not in donor.shapes and not BUFFERS.fullmatch(n)]
    if extra:
        raise FormatError(model.folder, f"has {extra[:3]}, which {donor.folder} has not")


def _own(model: Base, name: str) -> str:
    """What a tensor is called in a model."""
    return name if name in model.shapes else TIED.get(name, name)


def _cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return x.astype(dtype).astype(np.float32)
