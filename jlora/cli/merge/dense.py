"""Merged weights that are no sum of factors: tensor by tensor, dense, and equal to mergekit's.

.. math:: W' = B + \\text{merge}(D_1, ..., D_N) \\quad\\text{or}\\quad \\text{merge}(W_1, ..., W_N)

Nothing is cut to a rank: an element-wise merge (TIES, DARE, SCE, ...) of adapters has a difference
of full rank. Layers are counted per stack of layers, and a gradient ends at the last.

Source: mergekit 0.1.5, the meaning of its files.
Deviates: rounded once, from float32; randomised methods draw from (seed, tensor, model); models
of several dtypes need `dtype` or `out_dtype`, where mergekit widens them silently.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jlora.cli.merge import factors, mergekit, moved
from jlora.cli.merge import write as writing
from jlora.cli.merge.base import Base
from jlora.cli.merge.checkpoints import Inputs, check_tokenizers, inputs, is_checkpoint
from jlora.cli.merge.config import Config
from jlora.cli.merge.mergekit import Method
from jlora.cli.merge.values import LAYER, ConfigError, Scope, check_filters
from jlora.io import FormatError
from jlora.io.json_file import parse_json
from jlora.types import Dynamic, Json

NOTES = "merge.json"


class Plan(NamedTuple):
    """What will happen to every tensor."""

    method: Method
    inputs: Inputs
    options: dict[str, dict[str, Json]]  # tensor -> resolved parameters


def settled(config: Config) -> Config:
    """A configuration with the format that is meant where none is given; `Config.out` says which.

    Args:
      config: of the merge.

    Returns:
      The same with `out.format`.
    """
    if config.out.format is not None:
        return config
    merged = any(m.base or is_checkpoint(m.path) for m in config.models)
    out = dataclasses.replace(config.out, format="merged" if merged else "peft")
    return dataclasses.replace(config, out=out)


def applies(config: Config) -> bool:
    """Whether merged weights are written tensor by tensor, rather than from factors.

    Args:
      config: of the merge, `settled`.

    Returns:
      False for adapters that stay adapters, and for sums of factors.

    Raises:
      ConfigError: full checkpoints, and a method, a format or a rank for adapters alone.
    """
    method = mergekit.METHODS.get(config.method)
    full = any(is_checkpoint(m.path) for m in config.models)
    ranks = (("out.rank", config.out.rank), ("parameters.rank", config.parameters.get("rank")))
    if full and method is None:
        raise ConfigError(
            f"merge_method: {config.method} merges adapters; of full checkpoints expected one of "
            f"{sorted(mergekit.METHODS)}"
        )
    if full and config.out.format != "merged":
        raise ConfigError(
            f"out.format: got {config.out.format}, expected merged: a model is a full checkpoint"
        )
    for where, value in ranks:
        if full and value is not None:
            raise ConfigError(f"{where}: got {value}, expected none: checkpoints are not cut")
    if method is None or config.out.format != "merged":
        return False
    cut = any(value is not None for _, value in ranks)
    return full or not (cut or factors.of_adapters(method, config))


def make(config: Config, base: Base | None) -> Plan:
    """The plan of a merge.

    Args:
      config: of the merge.
      base: the base model; None: none is given.

    Returns:
      The models, and the parameters of every tensor.

    Raises:
      ConfigError: parameters, filters or slices that do not fit.
      FormatError: models that do not fit each other.
    """
    method = mergekit.METHODS[config.method]
    given = inputs(config, method, base)
    given.check(config.out.dtype)
    check_tokenizers(config, given.donor)
    top: Scope = ("parameters", config.parameters)
    shared: list[Scope] = [top]
    each: list[Scope] = [
        (f"models[{k}].parameters", m.parameters) for k, m in enumerate(config.models)
    ]
    for j, part in enumerate(config.slices):
        shared.append((f"slices[{j}].parameters", part.parameters))
        each += [
            (f"slices[{j}].sources[{k}].parameters", m.parameters)
            for k, m in enumerate(part.sources)
        ]
    mergekit.check_names(method, shared, each)
    names = given.names()
    called = [given.called(name) for name in names]
    for where, parameters in (*shared, *each):
        for key, value in parameters.items():
            check_filters(value, f"{where}.{key}", called)
    last = _lasts(given.donor.shapes)
    if config.slices and set(last.values()) != {config.slices[-1].stop - 1}:
        raise ConfigError(f"slices: got layers to {config.slices[-1].stop}, expected to "
                          f"{max(last.values(), default=-1) + 1}, all of the model")  # fmt: skip
    options = {}
    for name, text in zip(names, called, strict=True):
        stack, layer = _layer(name)
        if config.slices:
            j, place = _slice(config, name, layer)
            part, at = config.slices[j], f"slices[{j}]"
            near: list[Scope] = [(f"{at}.parameters", part.parameters), top]
            far: list[Scope] = [
                (f"{at}.sources[{k}].parameters", m.parameters) for k, m in enumerate(part.sources)
            ]
        else:
            place = 0.0 if layer is None else layer / last[stack] if last[stack] else 1.0
            near, far = [top], each
        scopes = [near if k is None else [far[k], *near] for k in given.listed]
        options[name] = mergekit.resolved(method, near, scopes, text, place)
    return Plan(method, given, options)


def change(plan: Plan, seed: int) -> Callable[[str, np.ndarray], np.ndarray]:
    """The merge of one tensor.

    Args:
      plan: of the merge.
      seed: of random masks.

    Returns:
      (tensor, the donor's values, float32) -> the merged values.
    """
    given, method = plan.inputs, plan.method

    def merged(name: str, old: np.ndarray) -> np.ndarray:
        dtype = given.working(name)
        donor, parts = given.tensors(name, old)
        more: dict[str, Json] = {}
        if method.function is mergekit.whole.task_vectors:
            # mergekit ranks magnitudes in that dtype; adapters were never rounded to it
            plain = any(isinstance(m, int) for m in given.models)
            more["order"] = lambda d: np.abs(d if plain else d.astype(dtype).astype(np.float32))
        if method.random:
            words = [seed, zlib.crc32(name.encode())]
            more["rngs"] = [np.random.default_rng([*words, n]) for n in range(len(parts))]
        if method.name == "slerp":
            parts = [donor, *parts]
        new = mergekit.call(method, plan.options[name], parts, **more)
        return donor + new if given.space == "delta" else new

    return merged


def write(path: Path, plan: Plan, config: Config, done: Callable[[], None]) -> None:
    """Writes the merged model in the donor's files, shard by shard.

    Args:
      path: a new directory.
      plan: of the merge.
      config: of the merge.
      done: called after each shard.

    Raises:
      FormatError: a merged or cast tensor is not finite.
    """
    donor, new = plan.inputs.donor, change(plan, config.seed)
    writing.merged(path, new, plan.options, donor, config.out.dtype, done)
    if isinstance(donor, moved.Moved):
        donor.finish(path)
    if config.out.dtype and (path / "config.json").is_file():
        _say_dtype(path / "config.json", config.out.dtype)
    notes(path, config, groups(plan))


def notes(path: Path, config: Config, parameters: Json, errors: Json = None) -> None:
    """Writes what was merged, by which parameters, defaults included, as JSON alongside the result.

    Args:
      path: the directory of the result.
      config: of the merge.
      parameters: groups of sites or tensors with their parameters.
      errors: of the factors, by site; None: nothing was cut.
    """
    data = {
        "merge_method": config.method,
        "models": [str(m.path) for m in config.models],
        **({"slices": [line.strip() for line in _layers(config)]} if config.slices else {}),
        "base_model": str(config.base) if config.base else None,
        "seed": config.seed,
        "parameters": parameters,
    }
    if errors is not None:
        data["errors"] = errors
    (path / NOTES).write_text(json.dumps(data, indent=1, default=str) + "\n")


def groups(plan: Plan) -> list[dict[str, Json]]:
    """The tensors of equal parameters together.

    Args:
      plan: of the merge.

    Returns:
      Of each group: how many tensors, the first, and the parameters.
    """
    by_kind: dict[Dynamic, list[str]] = {}
    for name, options in plan.options.items():
        by_kind.setdefault(tuple(sorted(options.items())), []).append(name)
    return [{"tensors": len(names), "first": names[0], "parameters": dict(key)}
            for key, names in by_kind.items()]  # fmt: skip


def describe(plan: Plan, config: Config) -> str:
    """The plan as text.

    Args:
      plan: of the merge.
      config: of the merge.

    Returns:
      Method, models, parameters and peak memory.
    """
    given, method = plan.inputs, plan.method
    lines = [f"merge_method  {method.name} (mergekit's), of {_spaces(plan)}"]
    for n, (m, k) in enumerate(zip(given.models, given.listed, strict=True)):
        path = given.donor.folder if k is None else config.models[k].path
        kind = "checkpoint" if isinstance(m, Base) else "adapter"
        lines.append(f"model {n}       {path} ({kind})")
    if given.base is not None:
        lines.append(f"base          {given.base.folder}")
    if isinstance(given.donor, moved.Moved):
        lines += [f"layers        {given.donor.layers}", *_layers(config)]
    lines.append(f"tensors       {len(plan.options)} of {len(given.donor.shapes)} are merged")
    for group in groups(plan):
        shown = ", ".join(f"{k}={_short(v)}" for k, v in group["parameters"].items())
        lines.append(f"  {group['tensors']} tensors: {shown}  ({group['first']}, ...)")
    lines.append(f"out           {config.out.path} (merged, dense: no rank is cut, "
                 f"{config.out.dtype or 'own dtype'})")  # fmt: skip
    size = max((np.prod(given.donor.shapes[n][0]) for n in plan.options), default=0)
    sizes = {
        "largest shard, while written": given.donor.writing(plan.options, config.out.dtype),
        "largest tensor, while merged": int(4 * size * (2 * len(given.models) + 3)),
    }
    lines += [f"memory        {name}: {size / 2**20:.2f} MiB" for name, size in sizes.items()]
    lines.append(f"peak memory   about {sum(sizes.values()) / 2**20:.2f} MiB")
    return "\n".join(lines)


def _layers(config: Config) -> list[str]:
    """Where the layers of every slice are from."""
    return [
        f"  {part.start}-{part.stop - 1}: " + ", ".join(
            f"{start}-{start + part.stop - part.start - 1} of {m.path}"
            for start, m in zip(part.starts, part.sources, strict=True)
        )
        for part in config.slices
    ]  # fmt: skip


def _spaces(plan: Plan) -> str:
    if plan.inputs.space == "delta":
        return "differences from the base"
    return "whole weights"


def _short(value: Dynamic) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_short, value)) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _layer(name: str) -> tuple[str, int | None]:
    """(the stack of layers that a tensor is in, its layer there)."""
    match = LAYER.search(name)
    return (name[: match.start()], int(match[1])) if match else ("", None)


def _lasts(names: Iterable[str]) -> dict[str, int]:
    last: dict[str, int] = {}
    for name in names:
        stack, layer = _layer(name)
        if layer is not None:
            last[stack] = max(last.get(stack, 0), layer)
    return last


def _slice(config: Config, name: str, layer: int | None) -> tuple[int, float]:
    """(number of the slice, place in it); tables are of the first, heads and norms of the last."""
    if layer is None:
        return (0 if moved.before(name) else len(config.slices) - 1), 0.0
    j = next(j for j, part in enumerate(config.slices) if layer < part.stop)
    part = config.slices[j]
    length = part.stop - part.start
    return j, (layer - part.start) / (length - 1) if length > 1 else 1.0


def _say_dtype(path: Path, dtype: str) -> None:
    """Writes the dtype that the weights have now into `config.json`."""
    data = parse_json(path, path.read_bytes())
    if not isinstance(data, dict):
        raise FormatError(path, "got no mapping, expected a model's configuration")
    fields = {"dtype", "torch_dtype"} & data.keys() or {"torch_dtype"}
    path.write_text(json.dumps(data | dict.fromkeys(fields, dtype), indent=2) + "\n")
