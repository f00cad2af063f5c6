r"""Riemannian preconditioning (scaled gradient descent) of LoRA.

=====================  ============================================================
A, B, s                the factors of a site, [d_in, r] and [r, d_out], and its scale
:math:`g_A, g_B`       their gradients
:math:`\delta`         `damping`
=====================  ============================================================

.. math::
    u_A = \tfrac{1}{s^2}\, g_A (B B^T + \delta I)^{-1}, \qquad
    u_B = \tfrac{1}{s^2}\, (A^T A + \delta I)^{-1} g_B

With :math:`\delta = 0` the delta moves, to first order, by the gradient of the full weight seen
through the row space of B and the column space of A, whatever factors express it. To be chained
before the learning rate, or before Adam as the paper does::

    optax.chain(riemannian(), optax.scale_by_adam(), optax.scale_by_learning_rate(1e-3))

Args of `update`, shapes: see `jlora.optimizers.factors`.

Reference: Zhang and Pilanci 2024, arXiv:2402.02347 (its equations; the metric is Mishra 2012's).
Deviates: divides by :math:`s^2`, which the paper's learning rate absorbs, so that rank and alpha
  do not change the step.
"""

import optax

from jlora import numerics
from jlora.contracts.optimizer import Optimizer
from jlora.optimizers import factors
from jlora.optimizers.factors import Pair, State, damped_inverse, gram_a, gram_b


def riemannian(damping: float = 1e-6) -> optax.GradientTransformationExtraArgs:
    """Preconditions the gradients of both factors by the Gram matrix of the other one.

    Args:
      damping: delta, added to the diagonal of both Gram matrices; positive. (PEFT has 1e-2.)

    Returns:
      A stateless transformation of trees like `Adapter.trainable`; its `update` takes
      ``frozen=adapter.frozen``.

    Raises:
      ValueError: a damping that is not positive; at `init`, a site without the factors a and b.
    """
    if not damping > 0:
        raise ValueError(f"damping: got {damping}, expected a positive number")

    def update(pair: Pair, state: State) -> tuple:
        u_a = numerics.matmul(pair.grad_a, damped_inverse(gram_b(pair.b), damping))
        u_b = numerics.matmul(damped_inverse(gram_a(pair.a), damping), pair.grad_b)
        return u_a / pair.scale**2, u_b / pair.scale**2, state

    return factors.per_site("riemannian", lambda a, b: (), update)


SYSTEM = Optimizer(
    name="Riemannian preconditioning",
    paper="Zhang 2024, 2402.02347",
    symbol="riemannian",
    evidence="one step by numpy; the step of the delta is that of the full gradient, projected",
    make=lambda: optax.chain(riemannian(), optax.scale_by_learning_rate(0.05)),
    gauge=True,
)
