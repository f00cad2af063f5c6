"""What a merge will do: weights and options of every site, chunks of equal ones, memory.

Source: our reading.
Deviates: nothing.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.algebra import Deltas
from jlora.cli.merge.config import Config, ConfigError, check_filters, layer_of, resolve
from jlora.core.adapter import Site
from jlora.merging.engine.inputs import Gathered
from jlora.merging.engine.run import apply, memory_of
from jlora.merging.engine.table import Merging


class Chunk(NamedTuple):
    """Sites that are merged in one call."""

    paths: tuple[str, ...]
    options: dict[str, Any]


class Plan(NamedTuple):
    """All of it."""

    row: Merging
    weights: dict[str, np.ndarray]  # path -> [N, *stack]
    chunks: list[Chunk]


def make(config: Config, row: Merging, given: Gathered) -> Plan:
    """The plan for the adapters of a bank. Raises ConfigError for parameters that do not fit."""
    number = len(config.models)
    if row.size not in (None, number):
        raise ConfigError(f"models: {row.name} takes {row.size}, got {number}")
    paths = [site.path for site in given.sites]
    for where, parameters in _parameters(config):
        for name, value in parameters.items():
            check_filters(value, f"{where}.{name}", paths)
    layers = [n for s in given.sites if not s.stack and (n := layer_of(s.path)) is not None]
    last = max(layers, default=0)
    weights, options = {}, {}
    for site in given.sites:
        weights[site.path] = _weights(config, site, last)
        options[site.path] = _options(config, site, last)
    if row.scope == "adapter":
        same = next(iter(options.values()))
        if any(o != same for o in options.values()):
            raise ConfigError(f"parameters: {row.name} needs the same options at all sites")
        first = next(iter(weights.values())).reshape(number, -1)[:, 0]
        for path, w in weights.items():
            if (w.reshape(number, -1) != first[:, None]).any():
                raise ConfigError(f"weight: {row.name} needs the same weights at all sites: {path}")
        return Plan(row, weights, [Chunk(tuple(weights), same)])
    groups: dict[Any, list[str]] = {}
    for site in given.sites:
        u, v = given.bank[site.path][:2]
        key = (tuple(sorted(options[site.path].items())), u.shape[-2:], v.shape[-2:])
        groups.setdefault(key, []).append(site.path)
    return Plan(row, weights, [Chunk(tuple(p), dict(k[0])) for k, p in groups.items()])


def run_chunk(plan: Plan, chunk: Chunk, bank: Deltas, seed: int, jit: bool = True) -> Deltas:
    """The merged deltas of a chunk."""
    part = {p: bank[p] for p in chunk.paths}
    weights: Any = {p: jnp.asarray(plan.weights[p], jnp.float32) for p in chunk.paths}
    if plan.row.scope == "adapter":
        first = plan.weights[chunk.paths[0]]
        weights = jnp.asarray(first.reshape(first.shape[0], -1)[:, 0], jnp.float32)
    key = jax.random.key(seed) if plan.row.randomised else None
    try:
        return apply(plan.row, part, weights, key=key, jit=jit, **chunk.options)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ConfigError(f"parameters: {plan.row.name}: {error}") from error


def memory(plan: Plan, bank: Deltas, seed: int) -> dict[str, int]:
    """Bytes: of the adapters, of all results, and of the largest chunk while it runs (compiled)."""
    peak, results = 0, 0
    for chunk in plan.chunks:
        part = {p: bank[p] for p in chunk.paths}
        out, temporary = memory_of(lambda b, c=chunk: run_chunk(plan, c, b, seed, jit=False), part)
        results += out
        peak = max(peak, temporary + out)
    return {"adapters": _bytes(bank), "merged": results, "largest step": peak}


def describe(config: Config, plan: Plan, given: Gathered, sizes: dict[str, int]) -> str:
    """The plan as text."""
    slices = sum(math.prod(s.stack) for s in given.sites)
    lines = [f"merge_method  {plan.row.name} ({plan.row.paper})"]
    for k, model in enumerate(config.models):
        w = np.concatenate([v[k].ravel() for v in plan.weights.values()])
        span = f"{w.min():.4g}" if w.min() == w.max() else f"{w.min():.4g} to {w.max():.4g}"
        lines.append(f"model {k}       {model.path}  weight {span}")
    lines.append(f"sites         {len(given.sites)} ({slices} matrices)")
    for chunk in plan.chunks:
        u, v = given.bank[chunk.paths[0]][:2]
        shape = f"[{u.shape[-2]}, {v.shape[-1]}], rank {u.shape[-1]}"
        told = ", ".join(f"{k}={v}" for k, v in chunk.options.items()) or "no options"
        lines.append(f"  {len(chunk.paths)} sites {shape}: {told}  ({chunk.paths[0]}, ...)")
    out = config.out
    cut = f", rank {out.rank} at most" if out.rank else ""
    lines.append(f"out           {out.path} ({out.format}{cut}, {out.dtype or 'own dtype'})")
    lines += [f"memory        {name}: {size / 2**20:.2f} MiB" for name, size in sizes.items()]
    lines.append(f"peak memory   about {sum(sizes.values()) / 2**20:.2f} MiB")
    return "\n".join(lines)


def _places(site: Site, last: int) -> list[float | None]:
    """Where in 0..1 the slices of a site are, flattened."""
    if site.stack:
        first = site.stack[0]
        rest = math.prod(site.stack[1:])
        return [k / max(first - 1, 1) for k in range(first) for _ in range(rest)]
    layer = layer_of(site.path)
    return [None if layer is None else layer / max(last, 1)]


def _parameters(config: Config) -> list[tuple[str, Mapping[str, Any]]]:
    each = [(f"models[{k}].parameters", m.parameters) for k, m in enumerate(config.models)]
    return [("parameters", config.parameters), *each]


def _weights(config: Config, site: Site, last: int) -> np.ndarray:
    n, rows = len(config.models), []
    have = ["weight" in m.parameters for m in config.models]
    if not any(have):
        return np.full((n, *site.stack), 1.0 / n)
    for k, model in enumerate(config.models):
        where = f"models[{k}].parameters.weight"
        if not have[k]:
            raise ConfigError(f"{where}: lacks; other models have one")
        found = [resolve(model.parameters["weight"], where, site.path, p)
                 for p in _places(site, last)]  # fmt: skip
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in found):
            raise ConfigError(f"{where}: got {found[0]!r}, expected a number")
        rows.append(np.reshape(np.asarray(found, np.float64), site.stack))
    w = np.stack(rows)
    normalise = config.parameters.get("normalize", False)
    if not isinstance(normalise, bool):
        raise ConfigError(f"parameters.normalize: got {normalise!r}, expected true or false")
    total = w.sum(0, keepdims=True)
    if normalise and (total == 0).any():
        raise ConfigError(f"weight: {site.path}: they sum to 0 and cannot be normalised")
    return w / total if normalise else w


def _options(config: Config, site: Site, last: int) -> dict[str, Any]:
    def at(value: Any, where: str) -> Any:
        found = {resolve(value, where, site.path, p) for p in _places(site, last)}
        if len(found) > 1:
            raise ConfigError(f"{where}: a gradient within the stacked site {site.path}; only "
                              "weight may have one")  # fmt: skip
        return found.pop()

    options = {k: at(v, f"parameters.{k}") for k, v in config.parameters.items()
               if k != "normalize"}  # fmt: skip
    for name in sorted({k for m in config.models for k in m.parameters} - {"weight"}):
        each = []
        for k, model in enumerate(config.models):
            where = f"models[{k}].parameters.{name}"
            if name not in model.parameters and name not in options:
                raise ConfigError(f"{where}: lacks; other models have one")
            each.append(at(model.parameters[name], where) if name in model.parameters
                        else options[name])  # fmt: skip
        options[name] = each[0] if len(set(each)) == 1 else tuple(each)
    return options


def _bytes(tree: Any) -> int:
    return sum(t.size * t.dtype.itemsize for t in jax.tree.leaves(tree))
