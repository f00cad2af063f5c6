r"""LoRA-Pro: the updates of A and B whose joint effect is closest to full fine-tuning.

=======================  ==========================================================
A, B, s                  the factors of a site, [d_in, r] and [r, d_out], and its scale
G                        the gradient of the full weight, [d_in, d_out], never formed
:math:`g_A, g_B`         :math:`s G B^T` and :math:`s A^T G`, what training gives
:math:`P_A, P_B`         projections onto the columns of A and the rows of B
Y                        [r, r], free: it moves the factors and not the delta
=======================  ==========================================================

.. math::
    \min_{u_A, u_B} \lVert s (u_A B + A u_B) - G \rVert_F: \qquad
    u_A = \tfrac{1}{s^2} g_A (B B^T)^{+} + A Y, \qquad
    u_B = \tfrac{1}{s^2} (A^T A)^{+} g_B (I - P_B) - Y B

so that :math:`s(u_A B + A u_B) = G P_B + P_A G (I - P_B)` for every Y. Among them:

``"closest"``     :math:`A^T A\,Y + Y B B^T = -\tfrac{1}{s^2} A^T g_A (B B^T)^{+}`, the least
                  :math:`\lVert u_A - g_A\rVert^2 + \lVert u_B - g_B\rVert^2` (the paper's)
``"symmetric"``   :math:`Y = -\tfrac{1}{2s^2} (A^T A)^{+} A^T g_A (B B^T)^{+}`: both factors do
                  half of what both could; the step of the delta then depends on the delta alone
``"zero"``        Y = 0

The Sylvester equation is solved in the eigenbases of the two Gram matrices. At the start B is zero
and :math:`u_A` is zero with it.

The paper's Adam keeps moments of the full, equivalent gradient, [d_in, d_out] per site, which
gives up LoRA's memory; ``optax.scale_by_adam()`` after this transformation keeps them of the
factors, as the cheaper variant of others does::

    optax.chain(lora_pro(), optax.scale_by_adam(), optax.scale_by_learning_rate(1e-4))

`moments="full"` is the paper's: Adam on the equivalent gradient :math:`\tilde G`, whose direction
:math:`\hat G` is then projected like a gradient, with :math:`g_A = s \hat G B^T`,
:math:`g_B = s A^T \hat G`.

Reference: Wang et al. 2024, arXiv:2407.18242, theorems 2.1 and 2.2, algorithm 2.
Deviates: pseudo-inverses with a relative cutoff stand for the official code's ridge of 1e-8; s is
  that of the site (the official code fixes it at 2).
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int

from jlora import numerics
from jlora.contracts.optimizer import Optimizer
from jlora.optimizers import factors
from jlora.optimizers.factors import Pair, State, gram_a, gram_b

CUTOFF = 1e-6  # of eigenvalues, relative to the largest: what float32 leaves of a Gram matrix


class Moments(NamedTuple):
    """Adam's state of one site, for `moments="full"`."""

    count: Int[Array, ""]  # steps so far
    mean: Float[Array, "*stack d_in d_out"]  # of the equivalent gradient
    square: Float[Array, "*stack d_in d_out"]  # of its squares


def lora_pro(
    choice: Literal["closest", "symmetric", "zero"] = "closest",
    moments: Literal["none", "full"] = "none",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradients of A and B by those whose delta is closest to the full gradient.

    Args:
      choice: of Y, see above; "closest" is the paper's.
      moments: "none", or "full" for the paper's Adam, with d_in * d_out numbers twice per site.
      b1: decay of the mean, in [0, 1); with `moments="full"` only, as the next two.
      b2: decay of the squares, in [0, 1).
      eps: added to the root of the squares, positive.

    Returns:
      A transformation of trees like `Adapter.trainable`; its `update` takes
      ``frozen=adapter.frozen``. A learning rate is to follow.

    Raises:
      ValueError: a value out of range; at `init`, a site without the factors a and b.
    """
    if choice not in ("closest", "symmetric", "zero"):
        raise ValueError(f"choice: got {choice!r}, expected 'closest', 'symmetric' or 'zero'")
    if moments not in ("none", "full"):
        raise ValueError(f"moments: got {moments!r}, expected 'none' or 'full'")
    if not (0 <= b1 < 1 and 0 <= b2 < 1 and eps > 0):
        raise ValueError(f"b1, b2, eps: got {b1}, {b2}, {eps}, expected [0, 1), [0, 1), positive")

    def init(a: Array, b: Array) -> State:
        if moments == "none":
            return ()
        full = jnp.zeros((*a.shape[:-1], b.shape[-1]), jnp.float32)
        return Moments(jnp.zeros((), jnp.int32), full, full)

    def update(pair: Pair, state: State) -> tuple:
        if moments == "none":
            return *closest(pair, choice), state
        u_a, u_b = closest(pair, "zero")
        effect = pair.scale * (numerics.matmul(u_a, pair.b) + numerics.matmul(pair.a, u_b))
        count = state.count + 1
        mean = b1 * state.mean + (1 - b1) * effect
        square = b2 * state.square + (1 - b2) * effect**2
        t = count.astype(jnp.float32)
        wanted = mean / (1 - b1**t) / (jnp.sqrt(square / (1 - b2**t)) + eps)
        seen = pair._replace(
            grad_a=pair.scale * numerics.matmul(wanted, pair.b.mT),
            grad_b=pair.scale * numerics.matmul(pair.a.mT, wanted),
        )
        return *closest(seen, choice), Moments(count, mean, square)

    return factors.per_site("lora_pro", init, update)


def closest(
    pair: Pair, choice: str
) -> tuple[Float[Array, "*stack d_in r"], Float[Array, "*stack r d_out"]]:
    """(u_A, u_B) of one site.

    Args:
      pair: the factors and their gradients.
      choice: of Y.

    Returns:
      Updates of the shapes of A and B, without sign and learning rate.
    """
    left, right = _spectrum(gram_a(pair.a)), _spectrum(gram_b(pair.b))
    inverse_a, inverse_b = _inverse(left), _inverse(right)
    u_a = numerics.matmul(pair.grad_a, inverse_b) / pair.scale**2
    seen = numerics.matmul(inverse_a, pair.grad_b) / pair.scale**2
    onto = numerics.matmul(numerics.matmul(seen, pair.b.mT), inverse_b)
    u_b = seen - numerics.matmul(onto, pair.b)  # seen (I - P_B)
    if choice == "zero":
        return u_a, u_b
    shared = numerics.matmul(pair.a.mT, u_a)  # A^T g_A (B B^T)^+ / s^2
    if choice == "symmetric":
        y = -numerics.matmul(inverse_a, shared) / 2
    else:
        y = _sylvester(left, right, -shared)
    return u_a + numerics.matmul(pair.a, y), u_b - numerics.matmul(y, pair.b)


class Spectrum(NamedTuple):
    """Of a Gram matrix."""

    values: Float[Array, "*stack r"]  # eigenvalues, those below the cutoff set to zero
    vectors: Float[Array, "*stack r r"]  # eigenvectors, a column each


def _spectrum(gram: Array) -> Spectrum:
    values, vectors = numerics.eigh(gram)
    kept = values > CUTOFF * values[..., -1:]
    return Spectrum(jnp.where(kept, values, 0), vectors)


def _inverse(of: Spectrum) -> Array:
    """The pseudo-inverse."""
    safe = jnp.where(of.values > 0, of.values, 1)
    scaled = of.vectors * jnp.where(of.values > 0, 1 / safe, 0)[..., None, :]
    return numerics.matmul(scaled, of.vectors.mT)


def _sylvester(left: Spectrum, right: Spectrum, c: Array) -> Array:
    """Y of `L Y + Y R = C`, both symmetric; zero where both eigenvalues are."""
    turned = numerics.matmul(numerics.matmul(left.vectors.mT, c), right.vectors)
    total = left.values[..., :, None] + right.values[..., None, :]
    y = jnp.where(total > 0, turned / jnp.where(total > 0, total, 1), 0)
    return numerics.matmul(numerics.matmul(left.vectors, y), right.vectors.mT)


SYSTEMS = (
    Optimizer(
        name="LoRA-Pro",
        paper="Wang 2024, 2407.18242",
        symbol="lora_pro",
        evidence="the least-squares step by numpy's lstsq; any Y moves the delta alike",
        rows=(27,),
        claim="lora_pro",
        make=lambda: optax.chain(lora_pro(), optax.scale_by_learning_rate(0.05)),
    ),
    Optimizer(
        name="LoRA-Pro, symmetric",
        paper="Wang 2024, 2407.18242; the choice of Y: textbook",
        symbol="lora_pro",
        evidence="the step of the delta does not depend on the factors",
        kind="component",
        make=lambda: optax.chain(lora_pro("symmetric"), optax.scale_by_learning_rate(0.05)),
        gauge=True,
    ),
    Optimizer(
        name="LoRA-Pro, full moments",
        paper="Wang 2024, 2407.18242",
        symbol="lora_pro",
        evidence="Adam on the equivalent gradient by numpy",
        kind="component",
        make=lambda: optax.chain(lora_pro(moments="full"), optax.scale_by_learning_rate(0.05)),
    ),
)
