r"""LoRA Composite and LoRA Switch: adapters that steer every denoising step, together or in turn.

===========  ==================================================================
e(A, z, t)   prediction of the base with adapter A; e(z, t) of the base alone
A_n          adapter n of N, all weights in memory, none merged
w            how much of each counts in this step, [N]
tau          steps that Switch stays with one adapter
===========  ==================================================================

Composite runs the denoiser once per adapter and averages what they predict; Switch gives each
adapter some steps, one after the other:

.. math:: e = e(z, t) + \sum_n w_n \bigl(e(A_n, z, t) - e(z, t)\bigr), \qquad
          w_n^{composite} = 1 / N, \qquad
          w_n^{switch}(k) = [\lfloor k / \tau \rfloor \bmod N = n]

With weights that sum to 1 the base cancels, and this is the paper's average of predictions.
Guidance of a condition is linear in the predictions, so it may come before or after.

Shapes: z and predictions of any shape, weights [N].

Paper: Zhong et al. 2024, arXiv:2402.16843 (Multi-LoRA Composition).
Source: paper.
Deviates: the base takes the weight that is left, so that weights 0 are the base; the paper's
weights sum to 1. All N + 1 predictions are made in every step, also where a weight is 0.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.contracts.composition import Composition, alike
from jlora.core.adapter import Adapter, stack
from jlora.core.lift import lift
from jlora.types import Tree


def composite(
    model: Callable[[Tree, Float[Array, "..."], Float[Array, ""]], Float[Array, "..."]],
    params: Tree,
    bank: Adapter,
    weights: Float[Array, "N"],
    z: Float[Array, "..."],
    t: Float[Array, ""],
) -> Float[Array, "..."]:
    """The weighted sum of what the adapters change of a prediction.

    Args:
      model: (params, z, t) -> prediction, of the shape of z.
      params: weights of the base.
      bank: N adapters, of `jl.stack`.
      weights: how much of each counts.
      z: the noisy sample.
      t: its time.

    Returns:
      The prediction, as z.

    Raises:
      ValueError: another number of weights than adapters.
    """
    if weights.shape != (len(bank),):
        raise ValueError(f"weights: got shape {weights.shape}, expected ({len(bank)},)")
    base, tuned = model(params, z, t), lift(model)
    each = jax.vmap(lambda adapter: tuned(params, adapter, z, t))(bank)
    change = each - base[None]
    return base + jnp.tensordot(weights.astype(base.dtype), change, 1)


def switch(adapters: int, steps: int, stay: int = 1) -> Float[Array, "T N"]:
    """The weights of LoRA Switch: one adapter per step, all of them in turn.

    Args:
      adapters: N.
      steps: T, of the denoising loop.
      stay: tau, how many steps an adapter keeps its turn; the paper's default is 5 of 200 steps.

    Returns:
      [T, N], a 1 per row.

    Raises:
      ValueError: `stay` below 1.
    """
    if stay < 1:
        raise ValueError(f"stay: got {stay}, expected at least 1")
    turn = jnp.arange(steps, dtype=jnp.int32) // stay % adapters
    return jax.nn.one_hot(turn, adapters, dtype=jnp.float32)


def _stacked(adapters: Sequence[Adapter]) -> Adapter:
    return stack(adapters)


_COMPOSITE = Composition(
    name="LoRA Composite",
    paper="Zhong 2024, 2402.16843",
    symbol="composite",
    evidence="the mean of the adapters' predictions by hand; equal adapters are one of them",
    missing="image adapters of a diffusion base",
    prepare=_stacked,
    denoise=composite,
    weights=alike,
)
_SWITCH = Composition(
    name="LoRA Switch",
    paper="Zhong 2024, 2402.16843",
    symbol="switch",
    evidence="turns by hand; each step of a loop is that of one adapter",
    missing="image adapters of a diffusion base",
    breaks={"turns": "adapters take turns in the order in which they are given"},
    prepare=_stacked,
    denoise=composite,
    weights=switch,
)
SYSTEMS = (_COMPOSITE, _SWITCH)
