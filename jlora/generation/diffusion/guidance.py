r"""Classifier-free guidance: push a prediction away from the null condition's.

.. math::
    \hat y = y_\varnothing + w\,(y_c - y_\varnothing), \qquad
    \hat y = b_\varnothing + w_c\,(b_c - b_\varnothing) + w_s\,(y_c - b_c)

The weights of each sum add to one and the four prediction kinds are affine in one another at fixed
(z, t), so the result is the same in eps, x0, v and velocity space.

Symbols: y -> prediction of ``params``, b -> prediction of ``base_params``, w -> ``scale``,
:math:`w_c, w_s` -> ``scale_condition``, ``scale_tuned``.
Shapes: predictions [S, L] of one example, scales scalar float32 (data: a sweep does not recompile).
Papers: Ho and Salimans 2022; the two-scale form after HM-CFG (arXiv 2511.03156).
Source: paper; the two-scale form is reconstructed from an abstract.
Deviates: w = 1 is the plain conditional prediction (some texts call that w = 0).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jlora.system import System
from jlora.types import Tree

# (params, z [S, L], t, cond [C, E], null) -> (prediction [S, L], hidden activation)
Model = Callable[..., tuple[Float[Array, "..."], Tree]]


def combine(
    null: Float[Array, "..."], conditional: Float[Array, "..."], scale: Float[Array, ""]
) -> Float[Array, "..."]:
    """null + scale (conditional - null).

    Args:
      null: prediction of the null condition.
      conditional: prediction of the condition.
      scale: w; 1 is the conditional prediction.

    Returns:
      The guided prediction.
    """
    return null + scale * (conditional - null)


def combine_two(
    base_null: Float[Array, "..."],
    base_conditional: Float[Array, "..."],
    tuned_conditional: Float[Array, "..."],
    scale_condition: Float[Array, ""],
    scale_tuned: Float[Array, ""],
) -> Float[Array, "..."]:
    """One scale for the condition, one for what tuning added to the base.

    Args:
      base_null: the base's prediction of the null condition.
      base_conditional: the base's prediction of the condition.
      tuned_conditional: the tuned model's prediction of the condition.
      scale_condition: w_c.
      scale_tuned: w_s.

    Returns:
      The guided prediction.
    """
    condition = scale_condition * (base_conditional - base_null)
    return base_null + condition + scale_tuned * (tuned_conditional - base_conditional)


def plain(model: Model) -> Callable[..., Float[Array, "..."]]:
    """The conditional prediction alone.

    Args:
      model: the denoiser.

    Returns:
      denoise(params, z, t, cond).
    """

    def denoise(params, z, t, cond):
        return model(params, z, t, cond, jnp.asarray(False))[0]

    return denoise


def guided(model: Model) -> Callable[..., Float[Array, "..."]]:
    """Guidance with one scale; both predictions in one batched evaluation.

    Args:
      model: the denoiser.

    Returns:
      denoise(params, z, t, cond, scale).
    """

    def denoise(params, z, t, cond, scale):
        def one(null: Bool[Array, ""]):
            return model(params, z, t, cond, null)[0]

        null, conditional = jax.vmap(one)(jnp.asarray([True, False]))
        return combine(null, conditional, scale)

    return denoise


def guided_two(model: Model) -> Callable[..., Float[Array, "..."]]:
    """Guidance with one scale for the condition and one for tuning.

    Args:
      model: the denoiser.

    Returns:
      denoise((base_params, params), z, t, cond, scale_condition, scale_tuned).
    """

    def denoise(params, z, t, cond, scale_condition, scale_tuned):
        base, tuned = params

        def one(null: Bool[Array, ""]):
            return model(base, z, t, cond, null)[0]

        null, conditional = jax.vmap(one)(jnp.asarray([True, False]))
        after = model(tuned, z, t, cond, jnp.asarray(False))[0]
        return combine_two(null, conditional, after, scale_condition, scale_tuned)

    return denoise


SYSTEM = System(
    name="Classifier-free guidance",
    paper="Ho 2022, 2207.12598",
    symbol="guided",
    evidence="extrapolation by numpy; commutes with conversion of predictions",
    kind="component",
)
