r"""AltLoRA and AltLoRA+: A and B in turn, each by the full gradient projected, with its momentum.

=====================  ============================================================
A, B, s                the factors of a site, [d_in, r] and [r, d_out], and its scale
:math:`g_A, g_B`       their gradients
:math:`M_A, M_B`       momentum of each, in the coordinates of the other factor
:math:`A', B'`         the other factor when that momentum was last updated
:math:`\delta`         `damping`
=====================  ============================================================

While B is trained (first, since B starts at zero), and the same transposed while A is:

.. math::
    \tilde g_B = \tfrac{1}{s^2} (A^T A + \delta I)^{-1} g_B, \qquad
    M_B \leftarrow \beta_1 (A^T A + \delta I)^{-1} A^T A'\, M_B + (1 - \beta_1)\, \tilde g_B,
    \qquad u_B = M_B / (1 - \beta_1^t), \quad u_A = 0

:math:`s A \tilde g_B` is the projection of the full gradient onto the columns of A, and the
momentum is re-expressed in the coordinates of the present A. State: the size of two adapters.
AltLoRA+ divides by the root of a mean of :math:`\tilde g^2`, as Adam does.

To be chained before the learning rate: ``optax.chain(alt_lora(), optax.scale_by_learning_rate(
1e-2))``. Weight decay after it would move the factor whose turn it is not.

Reference: Yu et al. 2025, arXiv:2505.12455, and the official code (LucasXinYu/AltLoRA), for maths.
Deviates: divides by :math:`s^2`, which the official learning rate absorbs. The momentum that is
  kept is the one of the present coordinates (the official code of AltLoRA+ keeps the other one).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int

from jlora import numerics
from jlora.contracts.optimizer import Optimizer
from jlora.optimizers import factors
from jlora.optimizers.factors import Pair, damped_inverse, gram_a


class Slot(NamedTuple):
    """What is kept of one factor; B is transposed, so that both are columns [n, r]."""

    count: Int[Array, ""]  # steps of this factor so far
    mean: Float[Array, "*stack n r"]  # M
    square: Float[Array, "*stack n r"] | None  # mean of g~^2; None without `adaptive`
    basis: Float[Array, "*stack k r"]  # the other factor when M was last updated


class AltState(NamedTuple):
    """Of one site."""

    count: Int[Array, ""]  # steps so far, of both factors
    a: Slot
    b: Slot


def alt_lora(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-4,
    damping: float = 1e-5,
    every: int = 1,
    adaptive: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Alternating projected steps of B and A; `adaptive` is AltLoRA+.

    Args:
      b1: decay of the momentum, in [0, 1).
      b2: decay of the squares, in [0, 1); with `adaptive` only.
      eps: added to the root of the squares, positive; with `adaptive` only. 1e-4 is official.
      damping: delta, added to the diagonal of the Gram matrices, positive. 1e-5 is official.
      every: steps of one factor before it is the other's turn, positive; B is first. The paper's
        algorithm alternates each step (its trainer: every ten).
      adaptive: divide by the root of the mean of squares: AltLoRA+.

    Returns:
      A transformation of trees like `Adapter.trainable`; its `update` takes
      ``frozen=adapter.frozen``. The factor whose turn it is not gets an update of zero.

    Raises:
      ValueError: a value out of range; at `init`, a site without the factors a and b.
    """
    if not (0 <= b1 < 1 and 0 <= b2 < 1 and eps > 0):
        raise ValueError(f"b1, b2, eps: got {b1}, {b2}, {eps}, expected [0, 1), [0, 1), positive")
    if not (damping > 0 and every >= 1):
        raise ValueError(f"damping, every: got {damping}, {every}, expected positive, at least 1")

    def slot(own: Array, other: Array) -> Slot:
        zero = jnp.zeros_like(own)
        return Slot(jnp.zeros((), jnp.int32), zero, zero if adaptive else None, other)

    def init(a: Array, b: Array) -> AltState:
        return AltState(jnp.zeros((), jnp.int32), slot(a, b.mT), slot(b.mT, a))

    def advance(g: Array, basis: Array, scale: Array, slot: Slot) -> tuple[Array, Slot]:
        """(update, next slot) of one factor from its gradient and the other factor."""
        inverse = damped_inverse(gram_a(basis), damping)
        new = numerics.matmul(g, inverse) / scale**2
        mean = b1 * numerics.matmul(slot.mean, _turn(slot.basis, basis, inverse)) + (1 - b1) * new
        count = slot.count + 1
        t = count.astype(jnp.float32)
        update, square = mean / (1 - b1**t), slot.square
        if square is not None:
            square = b2 * square + (1 - b2) * new**2
            update = update / (jnp.sqrt(square / (1 - b2**t)) + eps)
        return update, Slot(count, mean, square, basis)

    def update(pair: Pair, state: AltState) -> tuple[Array, Array, AltState]:
        turn_b = (state.count // every) % 2 == 0
        u_a, a = advance(pair.grad_a, pair.b.mT, pair.scale, state.a)
        u_b, b = advance(pair.grad_b.mT, pair.a, pair.scale, state.b)

        def chosen(if_b: Slot, if_a: Slot) -> Slot:
            return jax.tree.map(lambda x, y: jnp.where(turn_b, x, y), if_b, if_a)

        kept = AltState(state.count + 1, a=chosen(state.a, a), b=chosen(b, state.b))
        return jnp.where(turn_b, 0, u_a), jnp.where(turn_b, u_b.mT, 0), kept

    return factors.per_site("alt_lora", init, update)


def _turn(last: Array, basis: Array, inverse: Array) -> Array:
    """[*stack, r, r]: what takes coordinates in an earlier basis to those in the present one."""
    return numerics.matmul(numerics.matmul(last.mT, basis), inverse)


SYSTEMS = (
    Optimizer(
        name="AltLoRA",
        paper="Yu 2025, 2505.12455",
        symbol="alt_lora",
        evidence="four steps by numpy; the step of the delta is that of the projected gradient",
        rows=(28,),
        claim="alt_lora",
        make=lambda: optax.chain(alt_lora(damping=1e-7), optax.scale_by_learning_rate(0.05)),
        gauge=True,
    ),
    Optimizer(
        name="AltLoRA+",
        paper="Yu 2025, 2505.12455",
        symbol="alt_lora",
        evidence="four steps by numpy",
        rows=(28,),
        claim="alt_lora",
        make=lambda: optax.chain(alt_lora(adaptive=True), optax.scale_by_learning_rate(0.05)),
    ),
)
