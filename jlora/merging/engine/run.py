"""`merge`: any method of the table on any adapters.

.. math:: (\\Delta_1, w_1), ..., (\\Delta_N, w_N) \\;\\mapsto\\; \\Delta

Deviates: nothing.
"""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jlora import algebra
from jlora.algebra import Deltas
from jlora.core.adapter import Adapter
from jlora.merging.convert import converted
from jlora.merging.engine.inputs import gather, per_site, to_adapter
from jlora.merging.engine.table import METHODS, Merging

ELSEWHERE = {  # what others call a method -> what it is here
    "linear": ("concat (the weighted sum, exactly)", "truncated (the same, cut to a rank)"),
    "average": ("concat, without weights",),
    "cat": ("concat", "peft_cat"),
    "svd": ("truncated", "peft_svd"),
    "magnitude_prune": ("magnitude", "peft_magnitude_prune"),
    "ties_svd": ("ties", "peft_ties_svd"),
    "task_addition": ("task_arithmetic",),
    "passthrough": ("concat with one model",),
}


def merge(
    name: str,
    adapters: Sequence[Adapter] | Adapter,
    weights: Any = None,
    *,
    params: Any = None,
    key: Array | None = None,
    ids: Any = None,
    missing: str = "error",
    out_rank: int | None = None,
    **options: Any,
) -> Adapter:
    """A plain LoRA adapter that merges `adapters` (a list of any methods and ranks, or a bank).

    `weights` is [N], 1/N each where it is None, or {path: [N, *stack]}. `key` is required by
    randomised methods; `ids` [N] name the adapters in their keys. With `params`, methods without a
    factored delta (DoRA, OFT, IA3, HiRA) are converted first, exactly, and sites are looked up in
    the parameters. `out_rank` cuts the result to a rank. A rank that a site is too small for means
    full rank there; one that all sites are too small for is an error. Arrays among `options` are
    traced, other options are static. `certified` also says what is cut off, and the ranks.

    Raises ValueError as `gather` and `checked` do, for an unknown name, a rank out of range, and
    (outside of transformations) where the result is not finite.
    """
    row = lookup(name)
    if params is not None:
        adapters = [converted(a, params) for a in listed(adapters)]
    bank, weights, sites = gather(adapters, weights, missing=missing)
    checked(row, bank, weights, key, options)
    made = apply(row, bank, weights, key=key, ids=ids, **options)
    if out_rank is not None:
        check_rank("out_rank", out_rank, largest_rank(made))
        made = algebra.truncate(made, out_rank).deltas
    check_finite(name, made)
    return to_adapter(made, sites)


def certificate(
    name: str, adapters: Sequence[Adapter] | Adapter, weights: Any = None, **options: Any
) -> dict[str, Array]:
    """{path: [*stack]}: how far a merge is, at most, from the exact weighted sum (Frobenius).

    Raises ValueError as `merge` does, and for a method that gives no certificate.
    """
    row = lookup(name)
    bank, weights, _ = gather(adapters, weights)
    return bound(row, bank, weights, **options)


def peak_memory(
    name: str,
    adapters: Sequence[Adapter] | Adapter,
    weights: Any = None,
    *,
    key: Array | None = None,
    missing: str = "error",
    **options: Any,
) -> dict[str, int]:
    """Bytes of a merge as compiled here, without running it: "adapters", "merged", "temporary".

    Their sum is the peak. Raises ValueError as `merge` does.
    """
    row = lookup(name)
    bank, weights, _ = gather(adapters, weights, missing=missing)
    run = functools.partial(apply, row, key=key, jit=False, **options)
    merged, temporary = memory_of(run, bank, weights)
    return {"adapters": _bytes(bank), "merged": merged, "temporary": temporary}


def memory_of(function: Callable[..., Any], *args: Any) -> tuple[int, int]:
    """Bytes of the results and of the temporary arrays of a function, as compiled."""
    program = jax.jit(function)
    stats = program.lower(*args).compile().memory_analysis()
    return _bytes(jax.eval_shape(program, *args)), stats.temp_size_in_bytes if stats else 0


def _bytes(tree: Any) -> int:
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in jax.tree.leaves(tree))


def bound(row: Merging, bank: Deltas, weights: Any, **options: Any) -> dict[str, Array]:
    """`certificate` of a row of the table on a bank of deltas."""
    if row.certificate is None:
        raise ValueError(f"{row.name}: expected a method with a certificate, got one without")
    run: Any = per_site(row.certificate)
    return run(algebra.widened(bank), weights, **options)


def options_of(row: Merging) -> dict[str, Any]:
    """The options that a method takes, with their defaults."""
    parameters = list(inspect.signature(row.function).parameters.values())[2:]
    return {p.name: p.default for p in parameters if p.name not in ("key", "keys", "ids")}


def checked(row: Merging, bank: Deltas, weights: Any, key: Any, options: Mapping[str, Any]) -> None:
    """What can be known before a merge is run.

    Args:
      row: the method.
      bank: path -> deltas of N adapters, all sites of the merge.
      weights: [N], or {path: [N, *stack]}.
      key: None, or what randomised methods draw from.
      options: by name.

    Raises:
      ValueError: another number of adapters than the method takes; weights per site where it
        merges all sites at once; no key for a randomised method; an option that it does not have;
        negative weights that it has no meaning for (outside of transformations).
    """
    size = next(iter(bank.values()))[0].shape[0]
    if row.size not in (None, size):
        raise ValueError(f"{row.name}: got {size} adapters, expected {row.size}")
    if row.scope == "adapter" and isinstance(weights, dict):
        raise ValueError(f"{row.name}: got weights of every site, expected weights [N]")
    if row.randomised and key is None:
        raise ValueError(f"{row.name}: got no key, expected one: the method is randomised")
    check_options(row, options)
    for w in [] if row.signed else jax.tree.leaves(weights):
        if not isinstance(w, jax.core.Tracer) and bool((jnp.asarray(w) < 0).any()):
            raise ValueError(
                f"{row.name}: weights: got {np.asarray(w).tolist()}, expected none below 0: "
                "the method cannot subtract an adapter"
            )


RENAMED = {"normalise": "normalize", "strength": "scale", "lambda": "scale"}


def check_options(row: Merging, options: Mapping[str, Any]) -> None:
    """ValueError for an option that a method does not have, with those that it has."""
    known = options_of(row)
    for name in options:
        if name not in known:
            new = RENAMED.get(name)
            hint = f"; {name} is called {new} here" if new in known else ""
            raise ValueError(
                f"{row.name}: options: got {name!r}, expected one of {sorted(known)}{hint}"
            )


def lookup(name: str) -> Merging:
    """The row of a method; ValueError for an unknown name."""
    if name not in METHODS:
        close = ELSEWHERE.get(str(name)) or difflib.get_close_matches(str(name), METHODS, 3)
        hint = f"; for {name!r} use {' or '.join(close)}" if close else ""
        raise ValueError(f"merge method: got {name!r}, expected one of {sorted(METHODS)}{hint}")
    return METHODS[name]


def apply(
    row: Merging,
    bank: Deltas,
    weights: Any,
    *,
    key: Array | None = None,
    ids: Any = None,
    jit: bool = True,
    full: int | None = None,
    **options: Any,
) -> Deltas:
    """A row of the table on a bank of deltas, jitted once for each set of static options.

    An option `rank` means full rank at sites that are smaller; `full` is the largest
    min(d_in, d_out) of a merge that this bank is only a part of.

    Raises ValueError for an option that the method does not have, and for a rank that is no whole
    number of at least 1, or beyond every site's min(d_in, d_out).
    """
    check_options(row, options)
    if row.capped and options.get("rank") is not None:
        check_rank(f"{row.name}: rank", options["rank"], max(full or 0, largest_rank(bank)))
    bank = algebra.widened(bank)
    arrays, static = split(options)
    run = _jitted if jit else _run
    kind = (row.function, row.scope, row.randomised, row.loop, row.capped)
    return run(bank, weights, key, ids, arrays, kind, static)


def largest_rank(bank: Deltas) -> int:
    """The largest min(d_in, d_out) of all sites."""
    every = [algebra.low_rank(d) for d in bank.values()]
    return max(min(d.u.shape[-2], d.v.shape[-1]) for d in every)


def check_rank(name: str, rank: Any, full: int) -> None:
    """ValueError unless rank is a whole number in 1..full, the largest min(d_in, d_out)."""
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or not 1 <= rank <= full:
        raise ValueError(
            f"{name}: got {rank}, expected 1 to {full}, the largest min(d_in, d_out) of the sites"
        )


def split(options: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[tuple[str, Any], ...]]:
    """(arrays, which are traced; the others, sorted, which are static)."""
    arrays = {k: v for k, v in options.items() if isinstance(v, jax.Array | np.ndarray)}
    return arrays, tuple(sorted((k, v) for k, v in options.items() if k not in arrays))


def listed(adapters: Sequence[Adapter] | Adapter) -> Sequence[Adapter]:
    if not isinstance(adapters, Adapter):
        return adapters
    arrays = jax.tree.leaves((adapters.trainable, adapters.frozen))
    return [adapters[k] for k in range(arrays[0].shape[0] if arrays and arrays[0].ndim else 0)]


def check_finite(name: str, made: Deltas) -> None:
    """ValueError, outside of transformations, where a merge by `name` is not finite."""
    if any(isinstance(t, jax.core.Tracer) for t in jax.tree.leaves(made)):
        return
    for path, parts in made.items():
        if not all(bool(jnp.isfinite(t).all()) for t in parts):
            raise ValueError(
                f"{name}: {path}: got nan or inf; no such merge exists for these weights"
            )


def _run(bank, weights, key, ids, arrays, kind, static):
    function, scope, randomised, loop, capped = kind
    options = {**arrays, **dict(static)}
    if scope == "adapter":
        extra = {"key": key, "ids": ids} if randomised else {}
        return function(bank, weights, **extra, **options)
    mapped: Callable[..., Deltas] = per_site(
        function, randomised=randomised, loop=loop, ranks=("rank",) if capped else ()
    )
    return mapped(bank, weights, key, ids, **options)


_jitted = functools.partial(jax.jit, static_argnums=(5, 6))(_run)
