"""The configuration of a merge: YAML in mergekit's manner, checked, and read for each site.

    merge_method: ties                 # a row of `jlora.merging.METHODS`
    base_model: path/to/hf             # a directory of safetensors; see below
    models:
      - model: path/to/adapter         # a PEFT directory, or an Orbax checkpoint of `jl.io`
        parameters:
          weight: 0.5                  # a number,
          density: [0.2, 0.8]          # a gradient from the first layer to the last,
      - model: another
        parameters:
          weight:                      # or the first entry whose filter is part of the site's name
            - {filter: self_attn, value: [0.1, 0.9]}
            - {value: 0.5}
    parameters: {rank: 16}             # options of the method; numbers may be as above
    names: llama                       # site names of Orbax checkpoints: bert, llama, vit, vit4,
                                       # gemma, tunix, keras_hub, easydel,
                                       # maxtext; or {pattern: template}
    prefix: ""                         # of module names, in front of those of the base
    missing: error                     # or zero: adapters without a site add nothing there
    seed: 0                            # of randomised methods
    out: {path: merged, format: peft, rank: 8, dtype: float32}    # format: peft, orbax or merged

Sites are called `<module>/kernel`, and embedding tables `<module>/embedding`; convolutions and
tables are merged as matrices are, see `layout`. A base is needed to write merged weights, to
convert adapters whose delta depends on the weight, and to read adapters other than LoRA, or with
the base's table or head alongside them. A filter that no site is left for is an error.

A file of mergekit means what it means there (`mergekit.py`, `docs/merging.md`): a model may be a
full checkpoint, `base+adapter`, or an id of the Hugging Face hub that is in the local cache; with
one of them `out.format` is merged by default. Of its other keys these are read:

    dtype: bfloat16                    # inputs are cast to it; the result's too, without out_dtype
    out_dtype: float32                 # the same as out.dtype
    tokenizer_source: base             # or union, or a model: where all tokenizers are equal
    slices:                            # instead of models: consecutive layers of the result,
      - sources: [{model: a, layer_range: [0, 24]}]     # from any layers of any checkpoints
      - sources: [{model: b, layer_range: [20, 40]}]

`weight` of no model means 1/N each. `normalize` is a switch of mergekit's methods, as there; of
the others it divides the weights of a site by their sum.

Reference: mergekit's format (0.1.5).
Deviates: `modules`, `chat_template` and tokenizers that differ are refused by name; a gradient
needs two layers to have an end; all slices have as many sources.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from jlora import io
from jlora.cli.merge.values import ConfigError, keys
from jlora.io import NameMap
from jlora.types import Json

FORMATS = ("peft", "orbax", "merged")
DTYPES = ("float32", "bfloat16", "float16")
UNREAD = {
    "modules": "models of several parts are merged part by part; give models or slices",
    "chat_template": "the base's tokenizer files are kept as they are; edit the copy",
}
HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")  # of the Hugging Face hub: user/name@revision
PLAIN = NameMap({r"(.+)/(?:kernel|embedding)": r"\1"})  # sites that are called as the torch modules
NAMES = {
    **{"bert": io.bert, "llama": io.llama, "vit": io.vit, "vit4": io.vit4},
    **{"gemma": io.gemma, "tunix": io.tunix, "keras_hub": io.keras_hub, "easydel": io.easydel},
    "maxtext": io.maxtext,
}


@dataclasses.dataclass(frozen=True)
class Model:
    """One adapter, or one full checkpoint."""

    path: Path
    parameters: Mapping[str, Json]
    base: Path | None = None  # of `base+adapter`


@dataclasses.dataclass(frozen=True)
class Slice:
    """Consecutive layers of the result, with parameters of their own."""

    start: int
    stop: int
    parameters: Mapping[str, Json]
    sources: tuple[Model, ...]  # whose layers they are made of
    starts: tuple[int, ...]  # the first of them in each source

    def stays(self, models: tuple[Model, ...]) -> bool:
        """Whether these are the same layers of `models`.

        Args:
          models: of the merge.

        Returns:
          False where a source is another model, or its layers have other numbers there.
        """
        paths = [(m.path, m.base) for m in self.sources]
        same = paths == [(m.path, m.base) for m in models]
        return same and set(self.starts) == {self.start}


@dataclasses.dataclass(frozen=True)
class Out:
    """What is written."""

    path: Path | None
    format: str | None = None  # None: merged where a model is a checkpoint or `+`, else peft
    rank: int | None = None  # cut to this rank
    dtype: str | None = None  # of the arrays; None: float32, or for merged weights the base's


@dataclasses.dataclass(frozen=True)
class Config:
    """A merge."""

    method: str
    models: tuple[Model, ...]
    base: Path | None
    parameters: Mapping[str, Json]
    names: NameMap
    missing: str
    seed: int
    out: Out
    base_given: bool = False  # by `base_model`; otherwise it is that of `base+adapter`
    dtype: str | None = None  # the inputs are cast to it
    tokenizer: str | Path | None = None  # "base", "union" or a model
    slices: tuple[Slice, ...] = ()

    def paths(self) -> list[Path]:
        """Returns all models that are read, and the base."""
        models = [*self.models, *(m for part in self.slices for m in part.sources)]
        read = [path for m in models for path in (m.path, m.base) if path is not None]
        return list(dict.fromkeys([*read, *([self.base] if self.base else ())]))


def parse(data: Json, folder: Path = Path(".")) -> Config:
    """A configuration from what YAML gives.

    Args:
      data: as `documents.read` returns it.
      folder: where relative paths start; the working directory, unless a file says them.

    Returns:
      The configuration, checked; paths need not exist yet.

    Raises:
      ConfigError: a key or value that is not understood; names it, got and expected.
    """
    if isinstance(data, Mapping):
        for key in data.keys() & UNREAD.keys():
            raise ConfigError(f"{key}: not supported: {UNREAD[key]}")
    top = keys(data, "the configuration", ("merge_method",), (
        "models", "slices", "base_model", "parameters", "names", "prefix", "missing", "seed", "out",
        "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    ))  # fmt: skip
    if ("models" in top) == ("slices" in top):
        got = "both" if "models" in top else "neither"
        raise ConfigError(f"models, slices: got {got}, expected one of them")
    slices: tuple[Slice, ...] = ()
    if "slices" in top:
        models, slices = _sliced(top["slices"], folder)
    else:
        models = _models(top["models"], "models", folder)
    out = keys(top.get("out") or {}, "out", (), ("path", "format", "rank", "dtype"))
    _one_of(out.get("format", "peft"), FORMATS, "out.format")
    dtypes = {"dtype": top.get("dtype"), "out_dtype": top.get("out_dtype"),
              "out.dtype": out.get("dtype")}  # fmt: skip
    for where, value in dtypes.items():
        _one_of(value, (None, *DTYPES), where)
    if len({dtypes["out_dtype"], dtypes["out.dtype"]} - {None}) > 1:
        raise ConfigError(f"out_dtype, out.dtype: got {dtypes['out_dtype']!r} and "
                          f"{dtypes['out.dtype']!r}, expected one of them")  # fmt: skip
    _one_of(top.get("missing", "error"), ("error", "zero"), "missing")
    for where, value in (("out.rank", out.get("rank")), ("seed", top.get("seed", 0))):
        if value is not None and (type(value) is not int or value < (where == "out.rank")):
            raise ConfigError(f"{where}: got {value!r}, expected a whole number")
    base = top.get("base_model")
    base = None if base is None else _place(base, "base_model", folder)
    both = [m for m in models if m.base is not None]
    for m in both:
        if (base or both[0].base) != m.base:
            raise ConfigError(f"models: got {m.path} on {m.base}, expected all adapters on one "
                              f"base, {base or both[0].base}")  # fmt: skip
    return Config(
        _text(top["merge_method"], "merge_method"),
        models,
        base or (both[0].base if both else None),
        _parameters(top.get("parameters"), "parameters"),
        _names(top.get("names"), _text(top.get("prefix", ""), "prefix")),
        top.get("missing", "error"),
        top.get("seed", 0),
        Out(folder / _text(out["path"], "out.path") if "path" in out else None,
            out.get("format"), out.get("rank"),
            dtypes["out.dtype"] or dtypes["out_dtype"] or dtypes["dtype"]),
        base is not None,
        dtypes["dtype"],
        _tokenizer(top, folder),
        slices,
    )  # fmt: skip


def _models(value: Json, where: str, folder: Path, *more: str) -> tuple[Model, ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where}: got {value!r}, expected a list of at least one")
    models = []
    for k, entry in enumerate(value):
        entry = keys(entry, f"{where}[{k}]", ("model", *more), ("parameters",))
        text = _text(entry["model"], f"{where}[{k}].model")
        base, plus, adapter = text.rpartition("+")
        if plus and not (folder / text).exists():
            base, path = (_place(t, f"{where}[{k}].model", folder) for t in (base, adapter))
        else:
            base, path = None, _place(text, f"{where}[{k}].model", folder)
        parameters = _parameters(entry.get("parameters"), f"{where}[{k}].parameters")
        models.append(Model(path, parameters, base))
    return tuple(models)


def _sliced(value: Json, folder: Path) -> tuple[tuple[Model, ...], tuple[Slice, ...]]:
    """The models of the first slice, and the slices."""
    if not isinstance(value, list) or not value:
        raise ConfigError(f"slices: got {value!r}, expected a list of at least one")
    slices: list[Slice] = []
    at = 0
    for k, entry in enumerate(value):
        where = f"slices[{k}]"
        entry = keys(entry, where, ("sources",), ("parameters",))
        sources = _models(entry["sources"], f"{where}.sources", folder, "layer_range")
        if slices and len(sources) != len(slices[0].sources):
            raise ConfigError(f"{where}.sources: got {len(sources)}, expected "
                              f"{len(slices[0].sources)} as in slices[0]")  # fmt: skip
        spans = [source["layer_range"] for source in entry["sources"]]
        for n, span in enumerate(spans):
            good = isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)
            if not good or not 0 <= span[0] < span[1]:
                raise ConfigError(f"{where}.sources[{n}].layer_range: got {span!r}, expected "
                                  "[start, stop] of at least one layer")  # fmt: skip
            if span[1] - span[0] != spans[0][1] - spans[0][0]:
                raise ConfigError(f"{where}.sources[{n}].layer_range: got {span}, expected as many "
                                  f"layers as in {spans[0]}, which it is merged with")  # fmt: skip
        own = _parameters(entry.get("parameters"), f"{where}.parameters")
        stop = at + spans[0][1] - spans[0][0]
        slices.append(Slice(at, stop, own, sources, tuple(span[0] for span in spans)))
        at = stop
    models = tuple(dataclasses.replace(m, parameters={}) for m in slices[0].sources)
    return models, tuple(slices)


def _tokenizer(top: Mapping[str, Json], folder: Path) -> str | Path | None:
    value = top.get("tokenizer_source")
    if top.get("tokenizer") is not None:
        if value is not None:
            raise ConfigError("tokenizer, tokenizer_source: got both, expected one of them")
        tokenizer = keys(top["tokenizer"], "tokenizer", (), ("source",))
        value = tokenizer.get("source", "union")
    if value in (None, "base", "union"):
        return value
    return _place(value, "tokenizer_source", folder)


def _place(value: Json, where: str, folder: Path) -> Path:
    """A path from `folder`, or where the local cache has a model of the hub."""
    path = folder / _text(value, where)
    return path if path.exists() or not HUB.fullmatch(value) else _cached(value) or path


def _cached(name: str) -> Path | None:
    """The folder of a model of the Hugging Face hub in the local cache; nothing is downloaded."""
    try:
        import huggingface_hub
    except ImportError:  # it comes with transformers
        return None
    name, _, revision = name.partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, local_files_only=True
            )
        )
    except (OSError, ValueError):  # not there; no name that the hub could have
        return None


def _parameters(value: Json, where: str) -> dict[str, Json]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise ConfigError(f"{where}: got {value!r}, expected names and values")
    return dict(value)


def _names(value: Json, prefix: str) -> NameMap:
    if value is None:
        return PLAIN.replace(prefix=prefix)
    if isinstance(value, Mapping):
        try:
            return NameMap(value, prefix)
        except ValueError as error:
            raise ConfigError(f"names: {error}") from error
    _one_of(value, tuple(NAMES), "names")
    named = NAMES[value]()
    return named.replace(prefix=prefix + named.prefix)


def _one_of(value: Json, allowed: tuple, where: str) -> None:
    if value not in allowed:
        raise ConfigError(f"{where}: got {value!r}, expected one of {allowed}")


def _text(value: Json, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: got {value!r}, expected text")
    return value
