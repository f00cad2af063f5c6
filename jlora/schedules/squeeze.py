"""LoRA-Squeeze: train at a high rank, compress the delta to a low one; after or during training.

=========  ====================================================================
A, B       `a` [d_in, R], `b` [R, d_out], the trained factors
r          the rank to keep, r <= R
P, P'      `into` [R, r], `onto` [r, R]: what the compression does to each factor
m, n       first and second moments of an optimizer
=========  ====================================================================

.. math:: A = Q_A R_A, \\; B^T = Q_B R_B, \\; R_A R_B^T = U S V^T, \\qquad
          A_r = Q_A U_r S_r^{1/2} = A P, \\; B_r = S_r^{1/2} V_r^T Q_B^T = P' B

.. math:: P = R_B^T V_r S_r^{-1/2}, \\; P' = S_r^{-1/2} U_r^T R_A

The error is the tail of the spectrum. A gradient G of the delta reaches A as G B^T, so it reaches
A_r as (G B^T) P'^T: first moments follow exactly, second ones as for independent entries,

.. math:: m_A' = m_A P'^T, \\; m_B' = P^T m_B, \\qquad
          n_A' = n_A (P'^T)^{\\circ 2}, \\; n_B' = (P^{\\circ 2})^T n_B .

Where the delta has less rank than r, the ranks that are left over keep b = 0 and a column of a of
the norm that LoRA starts with, inside the span of a: the value does not change, and they learn.

Three uses: `squeeze` after training; `squeeze`, then some more training at the low rank; `anneal`
during training, where `schedule` falls step by step and arrays keep their shape (dropped columns
are zero, a fixed point of gradient descent and of Adam), so that nothing compiles twice.

Paper: Vulić et al. 2026, arXiv:2602.10993.
Source: abstract; the split of S, the moments and the schedule are original to jlora.
Deviates: exact SVD in the core instead of a randomised one; the scale stays as it is (alpha moves
with the rank), so learning rates keep their meaning.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool

from jlora import numerics
from jlora.algebra import FRESH
from jlora.contracts.schedule import Schedule
from jlora.core.adapter import Adapter
from jlora.methods.low_rank.lora import LoRA
from jlora.numerics import matmul
from jlora.types import Dynamic, Tree

MOMENTS = {"mu": 1, "trace": 1, "acc_grads": 1, "nu": 2}  # field of an optax state -> power


class Maps(NamedTuple):
    """What a compression does to the factors of one site: a' = a @ into, b' = onto @ b.

    (At a rank beyond that of the delta, as far as the columns of a reach.)
    """

    into: Array  # [*stack, R, r]
    onto: Array  # [*stack, r, R]


class Squeezed(NamedTuple):
    """A compressed adapter."""

    adapter: Adapter
    maps: dict[str, Maps]  # by path
    errors: dict[str, Array]  # path -> [*stack], Frobenius norm of what is lost of scale * a @ b


def squeeze(adapter: Adapter, rank: int) -> Squeezed:
    """A LoRA adapter (or a bank) at a lower rank: the best approximation of every delta.

    Args:
      adapter: LoRA at every site, both factors trained; of any rank R >= `rank`.
      rank: of the result. A delta of less rank is kept as it is: the ranks it does not need have
        b = 0 and a not zero, as LoRA starts, so they have gradients.

    Returns:
      The adapter, the maps that `project` moves an optimizer's state by, and the errors.

    Raises:
      ValueError: rank outside 1..R of a site; a site of another method, or with a frozen `a`.
    """
    return _squeeze(adapter, rank, rank)


def anneal(adapter: Adapter, rank: Dynamic) -> Squeezed:
    """The same with arrays of the same shape, zero beyond `rank`, which may be traced.

    Args, Returns and Raises are those of `squeeze`. Both factors are zero beyond `rank`, so that
    they stay zero; within it the ranks that a delta does not need have a not zero.
    """
    return _squeeze(adapter, rank, None)


def schedule(step: Dynamic, *, start: int, stop: int, source: int, target: int) -> Array:
    """The rank of a step: `source` before `start`, `target` from `stop` on, linear between.

    Args:
      step: [] int, may be traced.
      start: the step from which on the rank falls.
      stop: the step where it has fallen.
      source: the rank at first.
      target: the rank at last, 1..source.

    Returns:
      [] int32.

    Raises:
      ValueError: stop <= start, or a target out of range.
    """
    if stop <= start or not 1 <= target <= source:
        raise ValueError(
            f"schedule: got start {start}, stop {stop}, source {source}, target {target}, "
            "expected start < stop and 1 <= target <= source"
        )
    done = jnp.clip((jnp.asarray(step) - start) / (stop - start), 0.0, 1.0)
    return jnp.round(source + (target - source) * done).astype(jnp.int32)


def project(state: Tree, maps: dict[str, Maps], trainable: Tree) -> Dynamic:
    """An optax state after a compression.

    Raises ValueError for a tree of the shape of `trainable` in a field that is not in `MOMENTS`.

    Args:
      state: of the optimizer, before it.
      maps: of the compression, by path.
      trainable: the tree before it.

    Returns:
      The state, its moments projected.
    """
    shape = jax.tree.structure(trainable)

    def walk(node: Dynamic, name: str) -> Dynamic:
        if jax.tree.structure(node) == shape and isinstance(node, dict):
            if name not in MOMENTS:
                raise ValueError(f"{name}: got moments, expected one of {sorted(MOMENTS)}")
            return {path: _project(node[path], maps[path], MOMENTS[name]) for path in node}
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            fields = node._fields  # type: ignore[attr-defined]
            return type(node)(*(walk(t, f) for t, f in zip(node, fields, strict=True)))
        if isinstance(node, tuple | list):
            return type(node)(walk(t, name) for t in node)
        return node

    return walk(state, "state")


def _project(t: dict[str, Array], maps: Maps, power: int) -> dict[str, Array]:
    into, onto = (m**power for m in maps)
    a, b = matmul(t["a"], onto.mT), matmul(into.mT, t["b"])
    return {"a": a.astype(t["a"].dtype), "b": b.astype(t["b"].dtype)}


def _squeeze(adapter: Adapter, rank: Dynamic, width: int | None) -> Squeezed:
    trainable, maps, errors, rows = {}, {}, {}, []
    for site, method in adapter.sites:
        own = adapter.trainable[site.path]
        if not isinstance(method, LoRA) or own.keys() != {"a", "b"}:
            raise ValueError(f"{site.path}: got {method}, expected LoRA with both factors trained")
        full = own["a"].shape[-1]
        if isinstance(rank, int) and not 1 <= rank <= full:
            raise ValueError(f"{site.path}: rank: got {rank}, expected in 1..{full}")
        a, b, maps[site.path], lost = _pair(own["a"], own["b"], rank, width or full)
        trainable[site.path] = {"a": a, "b": b}
        scale = adapter.frozen[site.path]["scale"]
        errors[site.path] = lost * jnp.abs(scale).astype(lost.dtype)
        if width is not None:
            share = width / full
            alpha = method.alpha * (share**0.5 if method.rslora else share)
            method = dataclasses.replace(method, rank=width, alpha=alpha)
        rows.append((site, method))
    return Squeezed(Adapter(trainable, adapter.frozen, tuple(rows)), maps, errors)


def _pair(a: Array, b: Array, rank: Dynamic, width: int) -> tuple[Array, Array, Maps, Array]:
    """(a' [d_in, width], b' [width, d_out], maps, error); columns beyond `rank` are zero.

    Columns of a' that the delta does not need are directions that singular vectors leave free.
    """
    full = a.shape[-1]
    (qa, ra), (qb, rb) = numerics.qr(_pad(a)), numerics.qr(_pad(b.mT))
    u, s, vt = numerics.svd(matmul(ra, rb.mT))
    kept = jnp.broadcast_to(jnp.arange(full) < rank, s.shape)
    lost = jnp.sqrt(jnp.sum(jnp.where(kept, 0.0, s) ** 2, axis=-1))
    live = kept & (s > jnp.finfo(s.dtype).eps * full * s[..., :1])  # not noise
    root = jnp.where(live, jnp.sqrt(jnp.where(live, s, 1.0)), 0.0)[..., None, :]
    over = jnp.where(live, 1.0 / jnp.sqrt(jnp.where(live, s, 1.0)), 0.0)[..., None, :]
    into = (matmul(rb.mT, vt.mT) * over)[..., :width]
    onto = (matmul(ra.mT, u) * over).mT[..., :width, :]
    spare = (kept & ~live).astype(s.dtype)[..., None, :] * FRESH
    columns = matmul(qa, u)[..., : a.shape[-2], :]
    unit = _units(columns) * spare
    back = jnp.pad(unit, [(0, 0)] * (unit.ndim - 2) + [(0, qa.shape[-2] - a.shape[-2]), (0, 0)])
    into = into + matmul(numerics.pinv(ra), matmul(qa.mT, back))[..., :width]
    new_a = (columns * root + unit)[..., :width]
    new_b = (matmul(qb, vt.mT) * root).mT[..., :width, : b.shape[-1]]
    return new_a.astype(a.dtype), new_b.astype(b.dtype), Maps(into, onto), lost


def _units(x: Array) -> Array:
    """Columns [d, R] of norm 1; those that are (nearly) zero become columns of the identity."""
    size = jnp.linalg.norm(x, axis=-2, keepdims=True)
    some = size > 0.5
    eye = jnp.tile(jnp.eye(x.shape[-2], dtype=x.dtype), (1, -(-x.shape[-1] // x.shape[-2])))
    eye = jnp.broadcast_to(eye[:, : x.shape[-1]], x.shape)
    return jnp.where(some, x / jnp.where(some, size, jnp.ones_like(size)), eye)


def _pad(x: Array) -> Array:
    """Zero rows below a matrix that is wider than high, so that its R has all R rows."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    more = max(0, x.shape[-1] - x.shape[-2])
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)])


def first_ranks(state: dict[str, Bool[Array, "*stack r"]], rank: Dynamic) -> dict[str, Array]:
    """Masks that keep the first ranks, as `anneal` orders them.

    Args:
      state: masks, for their shapes.
      rank: how many are kept; may be traced.

    Returns:
      {path: [*stack, R] bool}.
    """
    return {p: jnp.broadcast_to(jnp.arange(m.shape[-1]) < rank, m.shape) for p, m in state.items()}


def _all_ranks(adapter: Adapter) -> dict[str, Array]:
    """The state of the schedule: a mask per site that keeps all ranks."""
    rows = adapter.trainable.items()
    return {p: jnp.ones((*t["a"].shape[:-2], t["a"].shape[-1]), bool) for p, t in rows}


def _kept(masks: dict[str, Array]) -> Array:
    """How many ranks masks keep, int32 []: as many at every site."""
    first = next(iter(masks.values()))
    return jnp.sum(first.reshape(-1, first.shape[-1])[0])


def _shrink(adapter: Adapter, state: Tree, masks: dict[str, Array]) -> tuple[Adapter, Dynamic]:
    """Adapter and optax state with the kept ranks alone."""
    squeezed = squeeze(adapter, int(_kept(masks)))
    return squeezed.adapter, project(state, squeezed.maps, adapter.trainable)


_falling = functools.partial(schedule, start=1, stop=4, source=4, target=2)

SYSTEM = Schedule(
    name="LoRA-Squeeze",
    paper="Vulić 2026, 2602.10993",
    symbol="squeeze",
    claim="squeeze",
    evidence="tail by dense SVD; moments by gradients and simulation; annealed beats cut",
    rows=(40,),
    examples=(LoRA(rank=4, alpha=2.0),),
    breaks={
        "moments": "factors are rotated into singular vectors, and moments are projected with them",
        "revive": "dropped ranks are zero in both factors, a fixed point: the rank only falls",
    },
    start=_all_ranks,
    masks=lambda state, step: first_ranks(state, _falling(step)),
    mask=lambda adapter, masks: anneal(adapter, _kept(masks)).adapter,
    shrink=_shrink,
    budget=lambda adapter, step: len(adapter.sites) * int(_falling(step)),
    length=4,
)
