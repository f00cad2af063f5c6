r"""CoDyRA: per task a sparse set of ranks, which is merged into the weights before the next task.

=========  =====================================================================================
g          the gate of a site, [R], as of `jlora.schedules.sora`, whose start and pruning these are
kappa      threshold: 0 for the first part of a task, then rising to its largest value
n          step within the task
=========  =====================================================================================

.. math:: W' = W + s \, A \, \mathrm{diag}(g) \, B, \qquad
          g \leftarrow \mathrm{sign}(g) \max(|g| - \kappa_n, 0) \;\text{after the optimizer's step}

.. math:: \kappa_n = \kappa \, \min\!\Big(1, \frac{n - n_0}{m}\Big)_+

Ranks that the task needs little lose their gate, each site as many as it can spare, so the weights
change in few directions and earlier knowledge stays. At the end of a task what is left is merged,
the next one starts with fresh factors on the new weights, and nothing is kept alongside them:

.. math:: W_{t+1} = W_t + s \sum_{k : g_k \ne 0} g_k \, A_{:, k} B_{k, :}

Paper: Lu et al. 2024, arXiv:2412.01004.
Source: paper and official code: raw thresholds, not multiplied by the learning rate.
Deviates: none of the code's losses is here; a task has the loss that its user gives it.
"""

import dataclasses
import functools

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jlora.contracts.schedule import Schedule, Trainable
from jlora.core.adapter import Adapter
from jlora.core.merge import merge
from jlora.methods.low_rank.adalora import AdaLoRA
from jlora.schedules import ranks, sora
from jlora.schedules.sora import GATE
from jlora.types import Dynamic, Tree


@dataclasses.dataclass(frozen=True)
class Ramp:
    """The threshold of each step of a task. Raises ValueError for negative numbers."""

    largest: float = 5e-3  # kappa; 5e-3 in the official script, 7e-4 as its program's default
    dense: int = 250  # n_0, steps without a threshold; half of the paper's 500
    rise: int = 50  # m, steps over which it rises; 0: at once

    def __post_init__(self):
        if min(self.largest, self.dense, self.rise) < 0:
            raise ValueError(f"Ramp: got {self}, expected numbers >= 0")

    def at(self, step: Dynamic) -> Float[Array, ""]:
        """kappa_n.

        Args:
          step: n, [] int, from 0; may be traced.

        Returns:
          float32 [].
        """
        past = jnp.asarray(step, jnp.float32) - self.dense
        share = jnp.clip(past / self.rise, 0, 1) if self.rise else (past >= 0).astype(jnp.float32)
        return self.largest * share


def proximal(ramp: Ramp) -> optax.GradientTransformation:
    """The threshold after an optimizer's step; to be chained last.

    ``optax.chain(optax.adamw(5e-4, 0.9, 0.9999, weight_decay=0.0), proximal(ramp))``.

    Args:
      ramp: the thresholds of a task; a new task starts with a new optimizer state.

    Returns:
      A transformation of trees like `Adapter.trainable`, of gated sites.
    """
    return sora.proximal(ramp.at)


def absorb(params: Tree, adapter: Adapter) -> Tree:
    """The weights after a task: what is left of the adapter is merged into them.

    Args:
      params: the weights that the adapter was trained on.
      adapter: of gated sites.

    Returns:
      New parameters of the same shapes; the same ones where no rank is left.
    """
    small, _ = sora.prune(adapter)
    return merge(params, small) if small.sites else params


# The record: as that of SoRA, with a threshold that rises after the first step.
_RAMP, _RATE, _LENGTH = Ramp(0.35, 1, 2), 0.1, 4


def _start(adapter: Adapter) -> tuple[dict[str, Array], Array]:
    gates = {site.path: adapter.trainable[site.path][GATE] for site, _ in adapter.sites}
    return gates, jnp.zeros((), jnp.int32)


def _observe(state: Tree, adapter: Adapter, gradients: Trainable) -> Tree:
    del adapter
    gates, step = state  # type: ignore[misc]
    cut = functools.partial(sora.soft_threshold, threshold=_RAMP.at(step))
    return {p: cut(g - _RATE * gradients[p][GATE]) for p, g in gates.items()}, step + 1


SYSTEM = Schedule(
    name="CoDyRA",
    paper="Lu 2024, 2412.01004",
    symbol="absorb",
    claim="codyra",
    evidence="thresholds by numpy; merged after dropping is the forward before; kappa drops ranks",
    rows=(39,),
    examples=(AdaLoRA(rank=4, alpha=2.0),),
    start=_start,
    observe=_observe,
    masks=lambda state, step: {p: g != 0 for p, g in state[0].items()},
    mask=lambda adapter, masks: ranks.zeroed(adapter, masks, (GATE,)),
    shrink=ranks.shrink,
    budget=lambda adapter, step: sum(m.size for m in ranks.full(adapter).values()),
    length=_LENGTH,
)
