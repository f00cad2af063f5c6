r"""SoRA: a gate per rank that a proximal step makes sparse; ranks of gate zero are dropped.

=========  =====================================================================================
A, B, s    the factors of a site, `a` [d_in, R] and `b` [R, d_out], and its scale
g          the gate, `e` [R] of `jlora.methods.AdaLoRA`, whose function this is
xi         threshold of a step; the paper has learning rate times lambda, its code lambda alone
=========  =====================================================================================

.. math:: W' = W + s \, A \, \mathrm{diag}(g) \, B, \qquad
          g \leftarrow T_\xi(g + u), \qquad T_\xi(x) = \mathrm{sign}(x) \max(|x| - \xi, 0)

with u the update of g by any optimizer: a step of proximal gradient descent on
:math:`L + \lambda \lVert g \rVert_1`. Gates become zero exactly, and a rank whose gate is zero is
dropped without a change of the function. Start: A and B as LoRA, g ~ N(0, 1).

``optax.chain(optax.adamw(8e-4), proximal(3e-4))`` trains; `prune` drops; `fold` gives LoRA. The
*schedule* of the paper repeats this for thresholds of `grid`, each run from the last one's end.

Paper: Ding et al. 2023, arXiv:2311.11696.
Source: paper and official code.
Deviates: the soft threshold is that of the paper; the official code, in place, also zeroes what is
left below the threshold, so that its dead zone is twice as wide.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32, Key

from jlora.contracts.schedule import Schedule
from jlora.core.adapter import Adapter
from jlora.methods.low_rank.adalora import AdaLoRA
from jlora.methods.low_rank.lora import LoRA
from jlora.schedules import ranks
from jlora.types import Dynamic, Tree

GATE = "e"


def gated(key: Key[Array, ""], adapter: Adapter) -> Adapter:
    """The start of SoRA from that of LoRA: a gate per rank, drawn normal.

    Args:
      key: of the gates.
      adapter: LoRA at every site, both factors trained.

    Returns:
      An adapter of `jlora.methods.AdaLoRA` sites with LoRA's factors and scales.

    Raises:
      ValueError: a site of another method, or with a frozen `a`.
    """
    trainable, rows = {}, []
    for number, (site, method) in enumerate(adapter.sites):
        own = adapter.trainable[site.path]
        if not isinstance(method, LoRA) or own.keys() != {"a", "b"}:
            raise ValueError(f"{site.path}: got {method}, expected LoRA with both factors trained")
        shape = (*own["a"].shape[:-2], own["a"].shape[-1])
        gate = jax.random.normal(jax.random.fold_in(key, number), shape, own["a"].dtype)
        trainable[site.path] = {"a": own["a"], GATE: gate, "b": own["b"]}
        alpha = method.alpha * (method.rank**0.5 if method.rslora else 1.0)  # of the same scale
        rows.append((site, AdaLoRA(rank=method.rank, alpha=alpha)))
    return adapter.replace(trainable=trainable, sites=tuple(rows))


def soft_threshold(x: Float[Array, "*axes"], threshold: Dynamic) -> Array:
    """T: the minimiser of :math:`\\tfrac12 (z - x)^2 + \\xi |z|`.

    Args:
      x: any array.
      threshold: xi >= 0, [].

    Returns:
      As x, zero where its size is at most xi.
    """
    left = jnp.maximum(jnp.abs(x) - jnp.asarray(threshold, x.dtype), jnp.zeros((), x.dtype))
    return jnp.sign(x) * left


class ProximalState(NamedTuple):
    """State of `proximal`."""

    count: Int32[Array, ""]  # steps done


def proximal(
    threshold: float | Callable[[Int32[Array, ""]], Dynamic], name: str = GATE
) -> optax.GradientTransformation:
    """Makes the updates of gates those of a proximal step; to be chained last.

    Args:
      threshold: xi, or the step, from 0, -> xi. The official code's is a number (3e-4 alone, up to
        7e-4 in seven stages); the paper's is ``lambda n: rate(n) * lam``.
      name: of the gates.

    Returns:
      A transformation of trees like `Adapter.trainable`; its `update` needs the parameters.

    Raises:
      ValueError: a threshold < 0; at `init`, no array of that name; at `update`, no parameters.
    """
    if not callable(threshold) and not threshold >= 0:
        raise ValueError(f"threshold: got {threshold}, expected a number >= 0")

    def init(params: Tree) -> ProximalState:
        if not any(name in own for own in params.values()):  # type: ignore[union-attr]
            raise ValueError(f"name: got {name!r}, expected the name of an array that is trained")
        return ProximalState(jnp.zeros((), jnp.int32))

    def update(updates: Tree, state: ProximalState, params: Tree = None) -> tuple:
        if params is None:
            raise ValueError("proximal: got no params, expected those that are updated")
        xi = threshold(state.count) if callable(threshold) else threshold
        moved = {
            path: own | {name: soft_threshold(t[name] + own[name], xi) - t[name]}
            if name in (t := params[path]) else own  # type: ignore[index]
            for path, own in updates.items()  # type: ignore[union-attr]
        }  # fmt: skip
        return moved, ProximalState(state.count + 1)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def sparsity(adapter: Adapter, weight: float) -> Array:
    """The term that the official code adds to the loss besides: the mean size of all gates.

    Args:
      adapter: of gated sites.
      weight: its factor; the official scripts have 10 and 1e-3, the paper none.

    Returns:
      [].
    """
    gates = [jnp.ravel(adapter.trainable[site.path][GATE]) for site, _ in adapter.sites]
    return weight * jnp.mean(jnp.abs(jnp.concatenate(gates)))


def grid(start: float, stop: float, stages: int = 7) -> tuple[float, ...]:
    """The thresholds of the paper's schedule, one per stage of training.

    Args:
      start: the first one.
      stop: the last one; 7e-4 in the official scripts.
      stages: how many.

    Returns:
      A linear grid.

    Raises:
      ValueError: fewer than 1 stage, or a threshold < 0.
    """
    if stages < 1 or min(start, stop) < 0:
        raise ValueError(
            f"grid: got start {start}, stop {stop}, stages {stages}, expected numbers >= 0 and "
            "at least 1 stage"
        )
    return tuple(float(x) for x in np.linspace(start, stop, stages))


def open_gates(adapter: Adapter) -> dict[str, Array]:
    """Masks of the ranks whose gate is not zero.

    Args:
      adapter: of gated sites.

    Returns:
      {path: [*stack, R] bool}.
    """
    return {site.path: adapter.trainable[site.path][GATE] != 0 for site, _ in adapter.sites}


def prune(adapter: Adapter, state: Tree = ()) -> tuple[Adapter, Dynamic]:
    """Without the ranks whose gate is zero; the function stays.

    Args:
      adapter: of gated sites.
      state: of an optax optimizer of its trainable; () for none.

    Returns:
      Both, smaller, as `jlora.schedules.ranks.shrink` makes them.
    """
    return ranks.shrink(adapter, state, open_gates(adapter))


def fold(adapter: Adapter) -> Adapter:
    """The same function as LoRA: every gate multiplies its row of b.

    Args:
      adapter: of gated sites.

    Returns:
      An adapter of LoRA sites.

    Raises:
      ValueError: a site of another method.
    """
    trainable, rows = {}, []
    for site, method in adapter.sites:
        if not isinstance(method, AdaLoRA):
            raise ValueError(f"{site.path}: got {method}, expected AdaLoRA")
        own = adapter.trainable[site.path]
        trainable[site.path] = {"a": own["a"], "b": own["b"] * own[GATE][..., None]}
        rows.append((site, LoRA(rank=method.rank, alpha=method.alpha)))
    return adapter.replace(trainable=trainable, sites=tuple(rows))


# The record: gates that descend by 0.1 times their gradient, at threshold 0.2.
_XI, _RATE, _LENGTH = 0.2, 0.1, 4


def _gates(adapter: Adapter) -> dict[str, Array]:
    return {site.path: adapter.trainable[site.path][GATE] for site, _ in adapter.sites}


def _observe(state: Tree, adapter: Adapter, gradients: dict) -> dict[str, Array]:
    del adapter
    return {p: soft_threshold(g - _RATE * gradients[p][GATE], _XI)
            for p, g in state.items()}  # type: ignore[union-attr]  # fmt: skip


SYSTEM = Schedule(
    name="SoRA",
    paper="Ding 2023, 2311.11696",
    symbol="proximal",
    claim="sora",
    evidence="the threshold is the minimiser by search; pruned is unpruned; zeros grow with lambda",
    rows=(33,),
    examples=(AdaLoRA(rank=4, alpha=2.0),),
    start=_gates,
    observe=_observe,
    masks=lambda state, step: {p: g != 0 for p, g in state.items()},
    mask=lambda adapter, masks: ranks.zeroed(adapter, masks, (GATE,)),
    shrink=ranks.shrink,
    budget=lambda adapter, step: sum(m.size for m in ranks.full(adapter).values()),
    length=_LENGTH,
)
