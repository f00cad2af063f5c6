r"""LoRA-FA: A stays as it was drawn; B follows the full gradient seen through A.

====================  ============================================================
A, B, s               the factors of a site, [d_in, r] and [r, d_out], and its scale
:math:`g_B`           the gradient of B, :math:`s A^T G`
:math:`\delta`        `damping`
====================  ============================================================

.. math::
    u_A = 0, \qquad u_B = \tfrac{1}{s^2} (A^T A + \delta I)^{-1} g_B

:math:`s A u_B` is then the full gradient G projected onto the columns of A. Inputs need not be kept
for the gradient of A, so activations of rank r are all that a step stores; to have that, freeze A
in the adapter (``LoRA(freeze_a=True)``), or else only its update is zero. To be chained before
Adam: ``optax.chain(lora_fa(), optax.scale_by_adam(), optax.scale_by_learning_rate(1e-3))``.

Reference: Zhang et al. 2023, arXiv:2308.03303; the preconditioning: Wang et al. 2024,
  arXiv:2407.18242, with A fixed, as PEFT's optimizer has it.
Deviates: an inverse stands for PEFT's pseudo-inverse; s is that of each site.
"""

import jax.numpy as jnp
import optax

from jlora import numerics
from jlora.contracts.optimizer import Optimizer
from jlora.optimizers import factors
from jlora.optimizers.factors import Pair, State, damped_inverse, gram_a


def lora_fa(damping: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    """Preconditions the gradient of B by the Gram matrix of A, and takes away that of A.

    Args:
      damping: delta, added to the diagonal of the Gram matrix, positive. 1e-8 is PEFT's.

    Returns:
      A stateless transformation of trees like `Adapter.trainable`; its `update` takes
      ``frozen=adapter.frozen``.

    Raises:
      ValueError: a damping that is not positive; at `init`, a site without the factors a and b.
    """
    if not damping > 0:
        raise ValueError(f"damping: got {damping}, expected a positive number")

    def update(pair: Pair, state: State) -> tuple:
        u_b = numerics.matmul(damped_inverse(gram_a(pair.a), damping), pair.grad_b)
        return jnp.zeros_like(pair.a), u_b / pair.scale**2, state

    return factors.per_site("lora_fa", lambda a, b: (), update, fixed_a=True)


SYSTEM = Optimizer(
    name="LoRA-FA",
    paper="Zhang 2023, 2308.03303",
    symbol="lora_fa",
    evidence="one step by numpy and by PEFT's optimizer; A is bitwise what it was",
    make=lambda: optax.chain(lora_fa(), optax.scale_by_learning_rate(0.05)),
    gauge=True,
)
