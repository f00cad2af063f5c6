r"""Which ranks are active, by the values that they have themselves: FlyLoRA's implicit router.

=========  ==========================================================================
y          values of the ranks [*T, r], here in the place of logits
d          state: the bias of each rank [r], 0 at the start
u          `rate` of its update
f          load [r], the share of the choices that fell on each rank
=========  ==========================================================================

.. math::
    I_t = \mathrm{top}_k(c_t), \qquad
    c = \begin{cases} y + d & \text{"signed"} \\ |y| + d & \text{"magnitude"} \\
                      |y + d| & \text{"biased magnitude"} \end{cases} \qquad
    g_{t,i} = 1, \; i \in I_t

.. math:: d_i \leftarrow d_i + u \, \mathrm{sign}(\tfrac1r \textstyle\sum_j f_j - f_i)

Every weight is 1: the value itself is what the method goes on with. With "biased magnitude" a
growing bias of either sign makes a rank more likely, so the bias grows without bound and does not
balance: it is what the paper prints, and the two others are the rules that do.

Reference: Zou et al. 2025, `FlyLoRA <https://arxiv.org/abs/2510.08396>`_.
Deviates: loads are compared with their own mean (the short form of the official code compares
counts with a share, so its bias only falls) and the bias rests outside of training.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jlora.contracts.router import Router, Routes
from jlora.routing import reports
from jlora.routing.bias_balanced import Biased
from jlora.routing.rule import State

Select = Literal["signed", "magnitude", "biased magnitude"]


@dataclasses.dataclass(frozen=True)
class Magnitudes(Biased):
    """The `k` ranks of largest value, each with weight 1.

    Raises:
      ValueError: k not in 1..r; rate below 0; an unknown selection.
    """

    k: int = 8
    select: Select = "signed"
    rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.select not in get_args(Select):
            raise ValueError(f"select: got {self.select!r}, expected one of {get_args(Select)}")
        self.check_rate()

    def routes(
        self,
        logits: Float[Array, "*T E"],
        state: State,
        train: bool,
        mask: Bool[Array, "*T"] | None = None,
    ) -> Routes:
        y = jax.lax.stop_gradient(logits)
        d = state["bias"].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        by = {"signed": y + d, "magnitude": jnp.abs(y) + d, "biased magnitude": jnp.abs(y + d)}
        _, ids = jax.lax.top_k(by[self.select], self.k)
        weights = jnp.ones(ids.shape, y.dtype)
        _, load = reports.measure(jnp.zeros_like(y), ids, weights, mask)
        return Routes(ids, weights, jnp.zeros((), y.dtype), load)


SYSTEM = Router(
    name="Ranks by their values",
    paper="Zou 2025, 2510.08396",
    symbol="Magnitudes",
    evidence="numpy value; which of the three rules balance; the laws of routers; a mutation",
    kind="component",
    init_state=Magnitudes(2, "magnitude", 0.01).init_state,
    route=Magnitudes(2, "magnitude", 0.01),
    probability=jnp.ones_like,
    breaks={"gradient": "weights are 1; the value of a rank is what has a derivative"},
)
