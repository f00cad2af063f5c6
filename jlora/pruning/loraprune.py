r"""LoRAPrune: which units a model can lose, from the gradients of LoRA alone, while it is trained.

=============  ==============================================================================
W, A, B, s     a frozen kernel [d_in, d_out], `a` [d_in, r], `b` [r, d_out] and the scale
G_A, G_B       gradients of the loss by A and B, before the optimizer
D              what a step of gradient descent of rate 1 takes from the delta, [d_in, d_out]
I              importance of an entry of W + s A B; p = 1 or 2
S_u            importance of a unit (`linked_axes`), over all of its kernels that have LoRA
N, f, t        steps in all, ratio at last, and the step
=============  ==============================================================================

.. math::
    D = s\,(G_A B + A G_B - G_A G_B), \qquad I = |D \odot (W + s A B)|^p

    S_u = \sum_{W \in \text{kernels}} \frac{\sum_{(i,j) \in u} I_{ij}}
          {\big\|\big(\sum_{(i,j) \in v} I_{ij}\big)_v\big\|_2}, \qquad
    \bar S \leftarrow 0.9\,\bar S + 0.1\,S

    \mathrm{ratio}(t) = f - f\,\Big(1 - \frac{t - t_0}{t_1 - t_0}\Big)^3,
    \quad t_0 = 0.1 N, \; t_1 = 0.9 N

The gradient of W is never formed by the backward pass: D is a product of thin factors, made site by
site outside of it. Of each layer the units of the least :math:`\bar S` are masked; a masked unit
stays so. At the end `jlora.pruning.slicing.sliced` makes the model small.

Reference: Zhang et al. 2023, arXiv:2305.18403; paper (p = 2) and official code (p = 1, schedule).
Deviates: every layer of a stack loses equally many units; to spare the first and the last layers,
as the official code does, declare units of the others only. D has the factor s, so that it is the
exact change of the delta; units are compared within a kernel, where it cancels.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlora.core.adapter import Adapter
from jlora.core.lift import flatten
from jlora.core.site import Arrays, fold
from jlora.numerics import matmul
from jlora.pruning.linked_axes import Axis, Linked
from jlora.system import System
from jlora.types import Dynamic, Tree

Slopes = Mapping[str, Arrays]  # like `Adapter.trainable`


class State(NamedTuple):
    """State of the pruning; arrays, to be kept with the adapter."""

    scores: dict[str, Float[Array, "*stack u"]]  # running mean of S, by the name of the units
    kept: dict[str, Bool[Array, "*stack u"]]  # masks
    step: Int[Array, ""]  # how many gradients were seen


def start(groups: Sequence[Linked]) -> State:
    """The state before the first step.

    Args:
      groups: the units.

    Returns:
      Scores of zero; every unit is kept.
    """
    return State(
        {g.name: jnp.zeros((*g.stack, g.units), jnp.float32) for g in groups},
        {g.name: jnp.ones((*g.stack, g.units), bool) for g in groups},
        jnp.zeros((), jnp.int32),
    )


def change(
    a: Float[Array, "*stack d_in r"],
    b: Float[Array, "*stack r d_out"],
    ga: Float[Array, "*stack d_in r"],
    gb: Float[Array, "*stack r d_out"],
    scale: Float[Array, "*stack"],
) -> Float[Array, "*stack d_in d_out"]:
    """D: what a step of gradient descent of rate 1 takes from the delta.

    Args:
      a: left factor.
      b: right factor.
      ga: gradient by a.
      gb: gradient by b.
      scale: of the delta.

    Returns:
      s (a b - (a - ga) (b - gb)).
    """
    thin = matmul(ga, b) + matmul(a - ga, gb)
    return scale[..., None, None].astype(thin.dtype) * thin


def unit_sums(
    importance: Float[Array, "*stack d_in d_out"], axis: Axis
) -> Float[Array, "*stack u"]:
    """The importance of each unit in one kernel, of norm 1 over the units.

    Args:
      importance: I of the kernel.
      axis: of the kernel.

    Returns:
      Sums over the entries of each unit, over their Euclidean norm; zeros where all are zero.
    """
    each = importance.sum(-2 if axis.axis == -1 else -1)
    units = each.reshape(*each.shape[:-1], -1, axis.block).sum(-1)
    norm = jnp.linalg.norm(units, axis=-1, keepdims=True)
    return units / jnp.where(norm > 0, norm, jnp.ones_like(norm))


def scores(
    params: Tree,
    adapter: Adapter,
    gradients: Slopes,
    groups: Sequence[Linked],
    power: int = 1,
) -> dict[str, Float[Array, "*stack u"]]:
    """S of every unit at one step.

    Args:
      params: of the base; quantised kernels are read dense, one at a time.
      adapter: LoRA, at least at one kernel of each kind of unit.
      gradients: of its trainable arrays, as `jax.grad` gives them, before the optimizer.
      groups: the units.
      power: 1 as in the official code, or 2 as in the paper.

    Returns:
      By the name of the units.

    Raises:
      ValueError: another power, units without LoRA, LoRA that does not train both factors.
    """
    if power not in (1, 2):
        raise ValueError(f"power: got {power}, expected 1 or 2")
    leaves, sites = flatten(params)[0], {site.path: site for site, _ in adapter.sites}
    out = {}
    for group in groups:
        adapted = [x for x in group.axes if x.path in sites]
        if not adapted:
            raise ValueError(f"{group.name}: got sites {sorted(sites)}, expected LoRA at one of "
                             f"{[x.path for x in group.axes]}")  # fmt: skip
        parts = [unit_sums(_importance(leaves[x.path], sites[x.path], adapter, gradients, power), x)
                 for x in adapted]  # fmt: skip
        out[group.name] = sum(parts[1:], parts[0])
    return out


def ratio(
    step: Dynamic, steps: int, final: float = 0.5, warmup: float = 0.1, cooldown: float = 0.1
) -> Float[Array, ""]:
    """The share of units that are masked at a step.

    Args:
      step: t; may be traced.
      steps: N.
      final: f in [0, 1); 0.5 in the official code.
      warmup: share of the steps before the first unit goes; 0.1 in the official code.
      cooldown: share of the steps after the last one went; 0.1 in the official code.

    Returns:
      [] float32: 0 up to t_0, f from t_1 on, cubic between.

    Raises:
      ValueError: a ratio outside of [0, 1), shares that leave no steps between them.
    """
    if not 0 <= final < 1:
        raise ValueError(f"final: got {final}, expected in [0, 1)")
    first, last = warmup * steps, (1 - cooldown) * steps
    if not 0 <= first < last <= steps:
        raise ValueError(f"warmup, cooldown: got {warmup} and {cooldown}, expected shares of the "
                         f"steps that leave some of {steps} between them")  # fmt: skip
    t = jnp.clip((jnp.asarray(step, jnp.float32) - first) / (last - first), 0.0, 1.0)
    return final - final * (1 - t) ** 3


def pruned(state: State, share: Dynamic) -> State:
    """The state with more units masked: the least important ones of each layer.

    Args:
      state: with its scores.
      share: of the units of a layer that are masked, in [0, 1); may be traced. Units that were
        masked before count first and stay masked, also where the share is smaller than it was.

    Returns:
      The state with other masks; of equal scores the first ones go.
    """
    kept = {}
    for name, score in state.scores.items():
        count = jnp.floor(jnp.float32(score.shape[-1]) * share + 1e-4).astype(jnp.int32)
        order = jnp.where(state.kept[name], score, jnp.full_like(score, -jnp.inf))
        place = jnp.argsort(jnp.argsort(order, axis=-1), axis=-1)
        kept[name] = state.kept[name] & (place >= count)
    return state._replace(kept=kept)


def observe(
    state: State,
    params: Tree,
    adapter: Adapter,
    gradients: Slopes,
    groups: Sequence[Linked],
    decay: float = 0.9,
    power: int = 1,
) -> State:
    """The state with the scores of one more step.

    Args:
      state: before.
      params: as of `scores`.
      adapter: as of `scores`.
      gradients: as of `scores`.
      groups: the units.
      decay: of the running mean in [0, 1); 0.9 in the official code.
      power: as of `scores`.

    Returns:
      The state after; masks stay until `pruned`.

    Raises:
      ValueError: as `scores`, and a decay outside of [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay: got {decay}, expected in [0, 1)")
    new = scores(params, adapter, gradients, groups, power)
    mean = {n: decay * s + (1 - decay) * new[n].astype(s.dtype) for n, s in state.scores.items()}
    return state._replace(scores=mean, step=state.step + 1)


def _importance(leaf, site, adapter, gradients, power) -> jax.Array:
    """I of one kernel."""
    own, slopes = adapter.trainable[site.path], gradients[site.path]
    if not {"a", "b"} <= own.keys():
        raise ValueError(f"{site.path}: got trained {sorted(own)}, expected a and b of LoRA")
    scale = adapter.frozen[site.path]["scale"]
    w = fold(leaf.dequantize() if hasattr(leaf, "dequantize") else leaf, site.kinds)
    a, b = own["a"], own["b"]
    now = w.astype(a.dtype) + scale[..., None, None].astype(a.dtype) * matmul(a, b)
    return jnp.abs(change(a, b, slopes["a"], slopes["b"], scale) * now) ** power


SYSTEM = System(
    name="LoRAPrune",
    paper="Zhang 2023, 2305.18403",
    symbol="scores",
    evidence="the step identity and unit scores by numpy; cubic schedule; useless units go first",
    rows=(41,),
    claim="loraprune",
)
