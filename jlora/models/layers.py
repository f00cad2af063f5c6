r"""The three element-wise hot spots of a transformer layer, each with a hand-written tangent rule.

Automatic differentiation of these functions is correct but keeps several arrays of activation size
alive between the forward and the backward pass. The rules below keep the least: one array for
``gelu``, one array and one number per row for ``layer_norm``, the probabilities for ``softmax``.
They are ``custom_jvp``, not ``custom_vjp``: every rule is linear in the tangent, so JAX transposes
it, and reverse mode, forward mode, higher order and ``vmap`` all work.

.. math::
    \operatorname{gelu}(x) = x\,\Phi(x), \qquad
    \operatorname{layer\_norm}(x) = \gamma \odot \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    \operatorname{attention}(q, k, v) = \operatorname{softmax}(q k^\top / \sqrt{d / H} + m)\, v

Source: Hendrycks and Gimpel 2016 (arXiv:1606.08415); Ba et al. 2016 (arXiv:1607.06450);
    Vaswani et al. 2017 (arXiv:1706.03762).
Deviates: no.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float

# A masked key gets this logit: finite, so that a row without any key is uniform and never NaN.
MASKED = -1e30


@jax.custom_jvp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU: x times the standard normal distribution function.

    Args:
      x: activations.

    Returns:
      The same shape and dtype.
    """
    return x * _normal_cdf(x)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    cdf = _normal_cdf(x)
    density = jnp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
    return x * cdf, (cdf + x * density) * dx


def _normal_cdf(x: Array) -> Array:
    # lax.erf, not erfc: one branch-free polynomial, and the tail lost to rounding is below 1e-7.
    return 0.5 + 0.5 * lax.erf(x * math.sqrt(0.5))


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "... d"], scale: Float[Array, "d"], bias: Float[Array, "d"], eps: float
) -> Float[Array, "... d"]:
    """Normalises the last axis; statistics in float32.

    Args:
      x: activations.
      scale: gamma.
      bias: beta.
      eps: added to the variance.

    Returns:
      The same shape and dtype as x.
    """
    return _normalise(x, scale, bias, eps)[0]


def _normalise(x: Array, scale: Array, bias: Array, eps: float) -> tuple[Array, Array, Array]:
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    rstd = lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    unit = centred * rstd
    y = unit * _row(scale, x.ndim) + _row(bias, x.ndim)
    return y.astype(x.dtype), unit, rstd


def _row(v: Array, ndim: int) -> Array:
    return v.astype(jnp.float32).reshape((1,) * (ndim - 1) + (-1,))


@partial(layer_norm.defjvp, symbolic_zeros=True)
def _layer_norm_jvp(eps, primals, tangents):
    x, scale, bias = primals
    dx, dscale, dbias = tangents
    y, unit, rstd = _normalise(x, scale, bias, eps)
    # With an adapter the base norms are constants: their tangents are symbolic zeros, and no
    # reduction over the rows is ever emitted for them.
    terms = []
    if not isinstance(dx, SymbolicZero):
        wide = dx.astype(jnp.float32)
        along = jnp.mean(wide * unit, axis=-1, keepdims=True)
        # rstd first, scale last: the factors kept for the backward pass are then a number per row
        # and a vector, never their product of activation size.
        inner = rstd * (wide - jnp.mean(wide, axis=-1, keepdims=True) - unit * along)
        terms.append(inner * _row(scale, x.ndim))
    if not isinstance(dscale, SymbolicZero):
        terms.append(unit * _row(dscale, x.ndim))
    if not isinstance(dbias, SymbolicZero):
        terms.append(jnp.broadcast_to(_row(dbias, x.ndim), x.shape))
    dy = sum(terms[1:], start=terms[0]) if terms else jnp.zeros_like(unit)
    return y, dy.astype(x.dtype)


@jax.custom_jvp
def softmax(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Softmax over the last axis.

    Args:
      x: logits.

    Returns:
      The same shape and dtype.
    """
    powers = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    return powers / jnp.sum(powers, axis=-1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(primals, tangents):
    y = softmax(primals[0])
    inner = y * tangents[0]
    return y, inner - y * jnp.sum(inner, axis=-1, keepdims=True)


def attention(
    q: Float[Array, "b t d"],
    k: Float[Array, "b t d"],
    v: Float[Array, "b t d"],
    bias: Float[Array, "b t"],
    heads: int,
) -> Float[Array, "b t d"]:
    """Multi-head attention; logits and softmax in float32.

    Args:
      q: queries of all heads.
      k: keys.
      v: values.
      bias: m, added to the logits of every query: 0 for a key to see, `MASKED` for one to hide.
      heads: H, which divides d.

    Returns:
      Mixed values, in the dtype of v.
    """
    b, t, d = q.shape
    # Heads before tokens: both products are then plain batched matmuls. The queries are scaled,
    # not the logits: d numbers per token instead of H * t.
    q, k, v = (x.reshape(b, t, heads, d // heads).transpose(0, 2, 1, 3) for x in (q, k, v))
    q = q * (heads / d) ** 0.5
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = softmax(logits + bias[:, None, None, :]).astype(v.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v).transpose(0, 2, 1, 3).reshape(b, t, d)


def mask_bias(mask: Bool[Array, "b t"]) -> Float[Array, "b t"]:
    """What `attention` adds to the logits.

    Args:
      mask: True for a token.

    Returns:
      0 for tokens, `MASKED` for others, float32.
    """
    return jnp.where(mask, jnp.float32(0.0), jnp.float32(MASKED))
