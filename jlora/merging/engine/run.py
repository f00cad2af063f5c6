"""`merge`: any method of the table on any adapters.

.. math:: (\\Delta_1, w_1), ..., (\\Delta_N, w_N) \\;\\mapsto\\; \\Delta

Deviates: nothing.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PRNGKeyArray

from jlora import algebra
from jlora.algebra import Deltas
from jlora.core.adapter import Adapter
from jlora.merging.convert import converted
from jlora.merging.engine.inputs import Ids, Weights, gather, per_site, to_adapter
from jlora.merging.engine.options import check_options, check_rank, lookup, split
from jlora.merging.engine.table import Merging
from jlora.types import Dynamic, Tree


def merge(
    name: str,
    adapters: Sequence[Adapter] | Adapter,
    weights: Weights | None = None,
    *,
    options: Mapping[str, Dynamic] | None = None,
    params: Tree = None,
    key: PRNGKeyArray | None = None,
    ids: Ids | None = None,
    missing: str = "error",
    out_rank: int | None = None,
) -> Adapter:
    """Merges adapters into one plain LoRA adapter.

    A rank that a site is too small for means full rank there; one that all sites are too small for
    is an error. `jlora.merging.certified` also says what is cut off, and the ranks.

    Args:
      name: of the method, as `jlora systems merging` lists them.
      adapters: a list of adapters of any methods and ranks, or a bank.
      weights: [N], or {path: [N] or [N, *stack]}; None: 1/N each.
      options: of the method, by name: `{"density": 0.2}`. Arrays are traced, others are static.
        None: its defaults.
      params: parameters, with which methods without a factored delta (DoRA, OFT, IA3, HiRA) are
        converted first, exactly; None: there are none of those.
      key: required by randomised methods.
      ids: [N], names of the adapters in their keys; None: 0..N-1.
      missing: "error": all adapters must have the same sites; "zero": one without a site adds
        nothing there.
      out_rank: the result is cut to this rank, at most; None: nothing is cut.

    Returns:
      A LoRA adapter of scale 1.

    Raises:
      ValueError: as `gather` and `checked` raise; an unknown name, a rank out of range, and
        (outside of transformations) a result that is not finite.
    """
    row = lookup(name)
    if params is not None:
        adapters = [converted(a, params) for a in listed(adapters)]
    bank, w, sites = gather(adapters, weights, missing=missing)
    checked(row, bank, w, key, options or {})
    merged = apply(row, bank, w, options, key=key, ids=ids)
    if out_rank is not None:
        check_rank("out_rank", out_rank, largest_rank(merged))
        merged = algebra.truncate(merged, out_rank).deltas
    check_finite(name, merged)
    return to_adapter(merged, sites)


def certificate(
    name: str,
    adapters: Sequence[Adapter] | Adapter,
    weights: Weights | None = None,
    *,
    options: Mapping[str, Dynamic] | None = None,
) -> dict[str, Array]:
    """How far a merge is, at most, from the exact weighted sum.

    Args:
      name: of the method, one with a certificate.
      adapters: a list of adapters, or a bank.
      weights: [N], or {path: [N] or [N, *stack]}; None: 1/N each.
      options: of the method, by name; None: its defaults.

    Returns:
      {path: [*stack]}, Frobenius norms.

    Raises:
      ValueError: as `merge` raises, and for a method that gives no certificate.
    """
    row = lookup(name)
    bank, w, _ = gather(adapters, weights)
    return bound(row, bank, w, options)


def peak_memory(
    name: str,
    adapters: Sequence[Adapter] | Adapter,
    weights: Weights | None = None,
    *,
    options: Mapping[str, Dynamic] | None = None,
    key: PRNGKeyArray | None = None,
    missing: str = "error",
) -> dict[str, int]:
    """What a merge needs as compiled here, without running it.

    Args:
      name: of the method.
      adapters: a list of adapters, or a bank.
      weights: [N], or {path: [N] or [N, *stack]}; None: 1/N each.
      options: of the method, by name; None: its defaults.
      key: required by randomised methods.
      missing: as in `merge`.

    Returns:
      Bytes of "adapters", "merged" and "temporary"; their sum is the peak.

    Raises:
      ValueError: as `merge` raises.
    """
    row = lookup(name)
    bank, w, _ = gather(adapters, weights, missing=missing)
    run = functools.partial(apply, row, options=options, key=key, jit=False)
    merged, temporary = memory_of(run, bank, w)
    return {"adapters": _bytes(bank), "merged": merged, "temporary": temporary}


def memory_of(function: Callable[..., Dynamic], *args: Dynamic) -> tuple[int, int]:
    """What a function needs, as compiled; it is not run.

    Args:
      function: to be jitted.
      *args: its arguments.

    Returns:
      Bytes of the results, and of the temporary arrays.
    """
    program = jax.jit(function)
    stats = program.lower(*args).compile().memory_analysis()
    return _bytes(jax.eval_shape(program, *args)), stats.temp_size_in_bytes if stats else 0


def _bytes(tree: Tree) -> int:
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in jax.tree.leaves(tree))


def bound(
    row: Merging, bank: Deltas, weights: Weights, options: Mapping[str, Dynamic] | None = None
) -> dict[str, Array]:
    """`certificate` of a method on a bank of deltas.

    Args:
      row: the method.
      bank: {path: deltas [N, *stack, ...]}.
      weights: [N], or {path: [N] or [N, *stack]}.
      options: of the method, by name; None: its defaults.

    Returns:
      {path: [*stack]}.

    Raises:
      ValueError: a method without a certificate.
    """
    if row.certificate is None:
        raise ValueError(f"{row.name}: expected a method with a certificate, got one without")
    run: Dynamic = per_site(row.certificate)
    return run(algebra.widened(bank), weights, **(options or {}))


def checked(
    row: Merging, bank: Deltas, weights: Weights, key: Dynamic, options: Mapping[str, Dynamic]
) -> None:
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


def apply(
    row: Merging,
    bank: Deltas,
    weights: Weights,
    options: Mapping[str, Dynamic] | None = None,
    *,
    key: PRNGKeyArray | None = None,
    ids: Ids | None = None,
    jit: bool = True,
    full: int | None = None,
) -> Deltas:
    """A method on a bank of deltas, jitted once for each set of static options.

    An option `rank` means full rank at sites that are smaller.

    Args:
      row: the method.
      bank: {path: deltas [N, *stack, ...]}.
      weights: [N], or {path: [N] or [N, *stack]}.
      options: of the method, by name; None: its defaults.
      key: required by randomised methods.
      ids: [N], names of the adapters in their keys; None: 0..N-1.
      jit: False runs it inside of another transformation.
      full: the largest min(d_in, d_out) of a merge that this bank is only a part of; None: it is
        the whole.

    Returns:
      {path: merged deltas}.

    Raises:
      ValueError: an option that the method does not have; a rank that is no whole number of at
        least 1, or beyond every site's min(d_in, d_out).
    """
    options = options or {}
    check_options(row, options)
    if row.capped and options.get("rank") is not None:
        check_rank(f"{row.name}: rank", options["rank"], max(full or 0, largest_rank(bank)))
    bank = algebra.widened(bank)
    arrays, static = split(options)
    run = _jitted if jit else _run
    kind = (row.function, row.scope, row.randomised, row.loop, row.capped)
    return run(bank, weights, key, ids, arrays, kind, static)


def largest_rank(bank: Deltas) -> int:
    """The largest min(d_in, d_out) of all sites.

    Args:
      bank: {path: deltas}.

    Returns:
      The full rank of the largest site.
    """
    every = [algebra.low_rank(d) for d in bank.values()]
    return max(min(d.u.shape[-2], d.v.shape[-1]) for d in every)


def listed(adapters: Sequence[Adapter] | Adapter) -> Sequence[Adapter]:
    """A bank as a list of adapters; a list as it is.

    Args:
      adapters: a list, or one Adapter whose arrays lead with an axis of adapters.

    Returns:
      The adapters, one by one.
    """
    if not isinstance(adapters, Adapter):
        return adapters
    arrays = jax.tree.leaves((adapters.trainable, adapters.frozen))
    return [adapters[k] for k in range(arrays[0].shape[0] if arrays and arrays[0].ndim else 0)]


def check_finite(name: str, merged: Deltas) -> None:
    """Refuses a merge that is not finite; inside of transformations nothing is checked.

    Args:
      name: of the method, for the error.
      merged: {path: merged delta}.

    Raises:
      ValueError: nan or inf.
    """
    if any(isinstance(t, jax.core.Tracer) for t in jax.tree.leaves(merged)):
        return
    for path, parts in merged.items():
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
