r"""GLAD: gradients of LoRA that are regularised towards a region where few steps change little.

=============  ================================================================================
θ              what is trained, `Adapter.trainable`
g              the gradient of the loss at θ
h              the gradient of a general loss, as of the distance from the unadapted model
ρ, α           radius, and share of the gradient that is taken at the radius
=============  ================================================================================

The paper says that the gradient is regularised to steer the factors to a stable region, and that
this keeps what the base model knows of classes that were not trained on. Its formula is not
published, so both forms that fit the description are here:

.. math::
    \text{flat:} \quad g' = (1 - \alpha)\,g + \alpha\,
    \nabla L\!\left(\theta + \rho \frac{g}{\lVert g \rVert}\right)

.. math::
    \text{agreeing:} \quad g' = g - \min\!\left(0,
    \frac{\langle g, h \rangle}{\lVert h \rVert^2}\right) h

Norms and products are over all arrays together. To first order :math:`g' - g` of *flat* is
:math:`\alpha \rho H g / \lVert g \rVert` with the Hessian H, a penalty on the norm of the gradient;
*agreeing* takes away what works against the general loss and never turns against g. Both are
gradients, to be given to any optimizer; each takes one more backward pass.

Reference: Peng et al. 2025, arXiv:2507.13089, of which the abstract was read. *flat*: Foret et al.
    2021, arXiv:2010.01412 (alpha 1) and Zhao et al. 2022, arXiv:2202.03599; *agreeing*: Zhu et al.
    2023, arXiv:2205.14865.
Deviates: whether the paper's formula is one of them is not known.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.system import System
from jlora.types import Tree

Form = Literal["flat", "agreeing"]
FORMS: tuple[Form, ...] = ("flat", "agreeing")


class Regularised(NamedTuple):
    """The loss, and the gradient to train with."""

    value: Array  # [], at θ
    grads: Tree  # g', of the form of what is trained
    cosine: Array  # [], of g' and g; 0 where one of them is zero


def glad(
    loss: Callable[[Tree], Float[Array, ""]],
    trainable: Tree,
    form: Form = "flat",
    *,
    rho: float = 0.05,
    alpha: float = 1.0,
    general: Callable[[Tree], Float[Array, ""]] | None = None,
) -> Regularised:
    """The regularised gradient of a loss.

    Args:
      loss: (trainable) -> [], on the rows of the step.
      trainable: θ, any tree of floating arrays.
      form: "flat" asks nothing of the model, "agreeing" needs a general loss.
      rho: radius of "flat", positive; 0.05 as in SAM.
      alpha: share of "flat", from 0 (plain gradients) to 1 (SAM), which is the default.
      general: (trainable) -> [] of "agreeing", as the divergence of the unadapted model's
        predictions from the adapted one's on the same rows.

    Returns:
      Value, gradient and how far it turned.

    Raises:
      ValueError: an unknown form, rho or alpha out of range, "agreeing" without a general loss or
        "flat" with one.
    """
    if form not in FORMS:
        raise ValueError(f"form: got {form!r}, expected one of {FORMS}")
    if not 0 < rho < float("inf"):
        raise ValueError(f"rho: got {rho}, expected a positive number")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha}, expected 0 <= alpha <= 1")
    if (general is None) == (form == "agreeing"):
        got = "none" if general is None else "one"
        raise ValueError(f"general: got {got} for form {form!r}, expected one for 'agreeing' alone")
    value, g = jax.value_and_grad(loss)(trainable)
    if general is None:
        step = rho * _inverse(norm(g))
        there = jax.tree.map(lambda t, d: t + step.astype(t.dtype) * d, trainable, g)
        gradient = jax.tree.map(lambda x, y: (1 - alpha) * x + alpha * y, g, jax.grad(loss)(there))
    else:
        h = jax.grad(general)(trainable)
        against = jnp.minimum(0.0, dot(g, h)) * _inverse(norm(h)) ** 2
        gradient = jax.tree.map(lambda x, y: x - against.astype(x.dtype) * y, g, h)
    cosine = dot(gradient, g) * _inverse(norm(gradient)) * _inverse(norm(g))
    return Regularised(value, gradient, cosine)


def sharpness(
    key: PRNGKeyArray,
    loss: Callable[[Tree], Float[Array, ""]],
    trainable: Tree,
    radius: float = 0.05,
    draws: int = 8,
) -> Float[Array, ""]:
    """By how much the loss rises on average at a distance, in random directions.

    Args:
      key: of the directions.
      loss: (trainable) -> [].
      trainable: θ.
      radius: the distance, positive.
      draws: directions, at least 1.

    Returns:
      A scalar; negative where most directions lead down.

    Raises:
      ValueError: a radius that is not positive, or no direction.
    """
    if not radius > 0 or draws < 1:
        raise ValueError(f"radius, draws: got {radius}, {draws}, expected > 0 and at least 1")
    leaves, tree = jax.tree.flatten(trainable)

    def one(key: Array) -> Array:
        keys = jax.random.split(key, len(leaves))
        noise = [jax.random.normal(k, t.shape, t.dtype) for k, t in zip(keys, leaves, strict=True)]
        step = radius * _inverse(norm(noise))
        there = [t + step.astype(t.dtype) * z for t, z in zip(leaves, noise, strict=True)]
        return loss(jax.tree.unflatten(tree, there))

    losses = jax.lax.map(one, jax.random.split(key, draws))
    return jnp.mean(losses) - loss(trainable)


def dot(x: Tree, y: Tree) -> Float[Array, ""]:
    """The inner product of all arrays of trees of one form, in at least float32.

    Args:
      x: a tree.
      y: another.

    Returns:
      A scalar.
    """
    products = jax.tree.map(lambda s, t: jnp.sum(s * t, dtype=jnp.float32), x, y)
    return sum(jax.tree.leaves(products), jnp.zeros((), jnp.float32))


def norm(x: Tree) -> Float[Array, ""]:
    """The Euclidean norm of all arrays of a tree.

    Args:
      x: a tree.

    Returns:
      A scalar.
    """
    return jnp.sqrt(dot(x, x))


def _inverse(x: Array) -> Array:
    """1 / x, and 0 of 0."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1.0), 0.0)


SYSTEM = System(
    name="GLAD",
    paper="Peng 2025, 2507.13089",
    symbol="glad",
    evidence="both forms on quadratic losses by numpy; the flatter of two basins is chosen",
    rows=(30,),
    claim="glad",
)
