"""What a merge will do: weights and options of every site, chunks of equal ones, memory.

Deviates: nothing.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.algebra import Deltas
from jlora.cli.merge import factors, mergekit
from jlora.cli.merge.config import Config
from jlora.cli.merge.values import LAYER, ConfigError, check_filters, resolve
from jlora.core.site import Site
from jlora.merging.engine.inputs import Gathered
from jlora.merging.engine.run import apply, checked, largest_rank, memory_of
from jlora.merging.engine.table import Merging
from jlora.types import Dynamic, Json


class Chunk(NamedTuple):
    """Sites that are merged in one call."""

    paths: tuple[str, ...]
    options: dict[str, Json]


class Plan(NamedTuple):
    """All of it."""

    row: Merging
    weights: dict[str, np.ndarray]  # path -> [N, *stack]
    chunks: list[Chunk]


def make(config: Config, row: Merging, given: Gathered) -> Plan:
    """The plan for adapters that stay adapters.

    Args:
      config: of the merge.
      row: of `jlora.merging`.
      given: the adapters as a bank.

    Returns:
      Weights and options of every site; sites of equal options and shapes are one chunk.

    Raises:
      ConfigError: parameters, filters or ranks that do not fit.
    """
    number = len(config.models)
    if row.size not in (None, number):
        raise ConfigError(f"models: {row.name} takes {row.size}, got {number}")
    if config.slices:
        raise ConfigError("slices: got them, expected models: adapters that stay adapters have no "
                          "layers of their own")  # fmt: skip
    method = factors.method_of(config.method)
    scopes = _parameters(config)
    if method is not None:
        mergekit.check_names(method, scopes[:1], scopes[1:])
    paths = [site.path for site in given.sites]
    for where, parameters in scopes:
        if method is None:
            factors.check_names(row, where, parameters)
        for name, value in parameters.items():
            check_filters(value, f"{where}.{name}", paths)
    lasts = _lasts(given.sites)
    weights, options = {}, {}
    for site in given.sites:
        places = _places(site, lasts)
        if method is None:
            weights[site.path] = _weights(config, site, places)
            options[site.path] = _options(config, site, places)
        else:
            placed = _mergekits(method, row, config, site, places)
            weights[site.path], options[site.path] = placed
    _ranks(config, row, given, options)
    if row.scope == "adapter":
        same = next(iter(options.values()))
        if any(o != same for o in options.values()):
            raise ConfigError(f"parameters: {row.name} needs the same options at all sites")
        first = next(iter(weights.values())).reshape(number, -1)[:, 0]
        for path, w in weights.items():
            if (w.reshape(number, -1) != first[:, None]).any():
                raise ConfigError(f"weight: {row.name} needs the same weights at all sites: {path}")
        return Plan(row, weights, [Chunk(tuple(weights), same)])
    groups: dict[Dynamic, list[str]] = {}
    for site in given.sites:
        u, v = given.bank[site.path][:2]
        key = (tuple(sorted(options[site.path].items())), u.shape[-2:], v.shape[-2:])
        groups.setdefault(key, []).append(site.path)
    return Plan(row, weights, [Chunk(tuple(p), dict(k[0])) for k, p in groups.items()])


def run_chunk(plan: Plan, chunk: Chunk, bank: Deltas, seed: int, jit: bool = True) -> Deltas:
    """The merged deltas of a chunk.

    Args:
      plan: of the merge.
      chunk: its sites.
      bank: the deltas of all adapters.
      seed: of random masks.
      jit: whether it is compiled; True: it is called once per shape.

    Returns:
      Path -> factors.

    Raises:
      ConfigError: options that the method refuses.
    """
    part = {p: bank[p] for p in chunk.paths}
    weights: Dynamic = {p: jnp.asarray(plan.weights[p], jnp.float32) for p in chunk.paths}
    if plan.row.scope == "adapter":
        first = plan.weights[chunk.paths[0]]
        weights = jnp.asarray(first.reshape(first.shape[0], -1)[:, 0], jnp.float32)
    key = jax.random.key(seed) if plan.row.randomised else None
    try:
        checked(plan.row, part, weights, key, chunk.options)
    except ValueError as error:
        raise ConfigError(f"parameters: {error}") from error
    full = largest_rank(bank)  # of all sites: a rank may be full at those of this chunk
    return apply(plan.row, part, weights, chunk.options, key=key, jit=jit, full=full)


def with_defaults(row: Merging, chunk: Chunk) -> dict[str, Json]:
    """The options of a chunk, with the defaults that apply.

    Args:
      row: of `jlora.merging`.
      chunk: its sites.

    Returns:
      Name -> value.
    """
    return factors.options_of(row) | chunk.options


def groups(plan: Plan) -> list[dict[str, Json]]:
    """The sites of equal options together.

    Args:
      plan: of the merge.

    Returns:
      Of each group: how many sites, the first, the options and the weights.
    """
    return [{"sites": len(c.paths), "first": c.paths[0], "options": with_defaults(plan.row, c),
             "weights": [plan.weights[c.paths[0]][n].tolist() for n in
                         range(len(plan.weights[c.paths[0]]))]}
            for c in plan.chunks]  # fmt: skip


def rule_of(row: Merging) -> Callable[..., Dynamic] | None:
    """How an element-wise method combines the row blocks of a bank.

    Args:
      row: of `jlora.merging`.

    Returns:
      The function of a bank; None: the method is not element-wise.
    """
    module = sys.modules[row.function.__module__]
    return getattr(row, "rule", None) or getattr(module, f"{row.function.__name__}_rule", None)


def uncut(config: Config, plan: Plan) -> bool:
    """Whether merged weights are those of the method itself: element-wise, and no rank is given.

    Args:
      config: of the merge.
      plan: of the merge.

    Returns:
      False where factors are cut to a rank.
    """
    given = config.out.rank is not None or any("rank" in c.options for c in plan.chunks)
    return rule_of(plan.row) is not None and not given


def memory(plan: Plan, bank: Deltas, seed: int) -> dict[str, int]:
    """How much memory a merge takes, by compiling it for shapes.

    Args:
      plan: of the merge.
      bank: the deltas of all adapters.
      seed: of random masks.

    Returns:
      Bytes: of the adapters, of all results, and of the largest chunk while it runs.
    """
    peak, results = 0, 0
    for chunk in plan.chunks:
        part = {p: bank[p] for p in chunk.paths}
        out, temporary = memory_of(lambda b, c=chunk: run_chunk(plan, c, b, seed, jit=False), part)
        results += out
        peak = max(peak, temporary + out)
    return {"adapters": _bytes(bank), "merged": results, "largest step": peak}


def describe(config: Config, plan: Plan, given: Gathered, sizes: dict[str, int]) -> str:
    """The plan as text.

    Args:
      config: of the merge.
      plan: of the merge.
      given: the adapters as a bank.
      sizes: name -> bytes.

    Returns:
      Method, models, options and peak memory.
    """
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
        options = with_defaults(plan.row, chunk)
        shown = ", ".join(f"{k}={v}" for k, v in options.items()) or "no options"
        lines.append(f"  {len(chunk.paths)} sites {shape}: {shown}  ({chunk.paths[0]}, ...)")
    out = config.out
    cut = f", rank {out.rank} at most" if out.rank else ""
    cut = ", no rank is cut" if out.format == "merged" and uncut(config, plan) else cut
    lines.append(f"out           {out.path} ({out.format}{cut}, {out.dtype or 'own dtype'})")
    lines += [f"memory        {name}: {size / 2**20:.2f} MiB" for name, size in sizes.items()]
    lines.append(f"peak memory   about {sum(sizes.values()) / 2**20:.2f} MiB")
    return "\n".join(lines)


def _lasts(sites: Sequence[Site]) -> dict[str, int]:
    """The last layer of every stack of layers; sites of one stack are called alike up to it."""
    last: dict[str, int] = {}
    for site in sites:
        match = LAYER.search(site.path)
        if match and not site.stack:
            stack = site.path[: match.start()]
            last[stack] = max(last.get(stack, 0), int(match[1]))
    return last


def _places(site: Site, lasts: Mapping[str, int]) -> list[float]:
    """Where in 0..1 the slices of a site are, flattened; 0 for what is in no layer."""
    if site.stack:
        first = site.stack[0]
        rest = math.prod(site.stack[1:])
        return [k / (first - 1) if first > 1 else 1.0 for k in range(first) for _ in range(rest)]
    match = LAYER.search(site.path)
    if not match:
        return [0.0]
    last = lasts[site.path[: match.start()]]
    return [int(match[1]) / last if last else 1.0]


def _mergekits(
    method: mergekit.Method, row: Merging, config: Config, site: Site, places: list[float]
) -> tuple[np.ndarray, dict[str, Json]]:
    """(weights [N, *stack], options) of a site by a method of mergekit."""
    top, *each = _parameters(config)
    scopes = [[own, top] for own in each]
    rows = []
    for place in places:
        o = mergekit.resolved(method, [top], scopes, site.path, place)
        rows.append(factors.translated(method, row, o, len(each), site.path))
    if any(options != rows[0][1] for _, options in rows):
        raise ConfigError(f"parameters: a gradient within the stacked site {site.path}; only "
                          "weight may have one")  # fmt: skip
    w = np.asarray([w for w, _ in rows], np.float64).T
    return w.reshape(len(each), *site.stack), rows[0][1]


def _ranks(
    config: Config, row: Merging, given: Gathered, options: dict[str, dict[str, Json]]
) -> None:
    """Ranks beyond the full one of a site are that, there.

    Raises ConfigError: a rank beyond the full one of every site.
    """
    full = {site.path: min(site.d_in, site.d_out) for site in given.sites}
    most = max(full.values())
    ranks = [("out.rank", config.out.rank)]
    ranks += [("parameters.rank", o["rank"]) for o in options.values() if o.get("rank") is not None]
    for where, rank in ranks:
        if isinstance(rank, int) and rank > most:
            raise ConfigError(f"{where}: got {rank}, expected {most} at most, the full rank of the "
                              "largest site")  # fmt: skip
    for path, o in options.items():
        if isinstance(o.get("rank"), int) and o["rank"] > full[path]:
            o["rank"] = full[path]


def _parameters(config: Config) -> list[tuple[str, Mapping[str, Json]]]:
    each = [(f"models[{k}].parameters", m.parameters) for k, m in enumerate(config.models)]
    return [("parameters", config.parameters), *each]


def _weights(config: Config, site: Site, places: list[float]) -> np.ndarray:
    n, rows = len(config.models), []
    have = ["weight" in m.parameters for m in config.models]
    if not any(have):
        return np.full((n, *site.stack), 1.0 / n)
    for k, model in enumerate(config.models):
        where = f"models[{k}].parameters.weight"
        if not have[k]:
            raise ConfigError(f"{where}: lacks; other models have one")
        weights = [resolve(model.parameters["weight"], where, site.path, p) for p in places]
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in weights):
            raise ConfigError(f"{where}: got {weights[0]!r}, expected a number")
        rows.append(np.reshape(np.asarray(weights, np.float64), site.stack))
    w = np.stack(rows)
    normalise = config.parameters.get("normalize", False)
    if not isinstance(normalise, bool):
        raise ConfigError(f"parameters.normalize: got {normalise!r}, expected true or false")
    total = w.sum(0, keepdims=True)
    if normalise and (total == 0).any():
        raise ConfigError(f"weight: {site.path}: they sum to 0 and cannot be normalised")
    return w / total if normalise else w


def _options(config: Config, site: Site, places: list[float]) -> dict[str, Json]:
    def at(value: Dynamic, where: str) -> Dynamic:
        resolved = {resolve(value, where, site.path, p) for p in places}
        if len(resolved) > 1:
            raise ConfigError(f"{where}: a gradient within the stacked site {site.path}; only "
                              "weight may have one")  # fmt: skip
        return resolved.pop()

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


def _bytes(tree: Dynamic) -> int:
    return sum(t.size * t.dtype.itemsize for t in jax.tree.leaves(tree))
