"""Weight decomposition of any delta: a learned length for every column, and a method for direction.

Symbols: the method of the direction -> `method`, its delta :math:`\\Delta W = u v` or, of LoKr,
:math:`a \\otimes c`; m -> `m` [d_out].

.. math::
    W' = V \\, \\mathrm{diag}(m / \\|V\\|_c), \\qquad V = W + \\Delta W

with :math:`\\|V\\|_c` the norms of the columns (one an output feature), taken as constants by the
gradient. With LoRA it is DoRA; with LoHa and LoKr LyCORIS calls it DoHa and DoKr. V is never
formed: with factors, or with a Kronecker product whose column (k, l) has the length
:math:`\\|a_k\\| \\|c_l\\|`,

.. math::
    \\|V\\|_c^2 = \\|W\\|_c^2 + 1^T ((2 u^T W + u^T u \\, v) \\odot v), \\qquad
    \\|V_{kl}\\|^2 = \\|W_{kl}\\|^2 + 2 \\sum_{ij} a_{ik} W_{(ij),(kl)} c_{jl}
                   + \\|a_k\\|^2 \\|c_l\\|^2 .

Init: that of the method, and m = the norms of W, hence the identity.

Liu et al., `DoRA <https://arxiv.org/abs/2402.09353>`_, 2024; Yeh et al.,
`LyCORIS <https://arxiv.org/abs/2309.14859>`_, 2024.

Source: LyCORIS 4.1 (`weight_decompose`, by output); the detached norm is DoRA's.
Deviates: closed-form norms (LyCORIS forms V, and lets the gradient through its norm).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.core.adapter import Arrays, Method, Site
from jlora.methods.dora import column_norms, gain


@dataclasses.dataclass(frozen=True)
class Decomposed(Method):
    """`method` for the directions of the columns, `m` for their lengths.

    Raises:
      ValueError: a method without factors, or one that has an `m` of its own (when it is made).
    """

    method: Method

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method) or type(self.method).factors is Method.factors:
            raise ValueError(f"Decomposed: expected a method with factors, got {self.method}")

    @property
    def rank_axes(self) -> Mapping[str, int]:  # type: ignore[override]
        return self.method.rank_axes

    def shared(self, key: jax.Array, sites: tuple[Site, ...]) -> tuple[Arrays, Arrays]:
        """As the method."""
        return self.method.shared(key, sites)

    def init(self, key: jax.Array, site: Site) -> tuple[Arrays, Arrays]:
        """The method's own arrays and m [d_out] = the column norms of what it begins as."""
        trainable, frozen = self.method.init(key, site)
        if "m" in trainable | frozen:
            raise ValueError(f"Decomposed: {type(self.method).__name__} has an `m` of its own")
        p = {**site.shared, **frozen, **trainable}
        return {**trainable, "m": self._norms(site.weight(), p)}, frozen

    def merge(self, w: jax.Array, p: Arrays) -> jax.Array:
        """V m / |V|, [d_in, d_out]."""
        v = self.method.merge(w, p)
        norm = jnp.linalg.norm(jax.lax.stop_gradient(v), axis=0)
        return v * gain(p["m"], norm)[None, :]

    def apply(self, x: Any, w: Any, p: Arrays, ctx: Mapping[str, Any]) -> Any:
        """x [..., d_in] -> [..., d_out], the method's own fast path and a gain."""
        out = self.method.apply(x, w, p, ctx)
        y, *reports = out if isinstance(out, tuple) else (out,)
        norm = jax.lax.stop_gradient(self._norms(w.dense(), p))
        y = y * gain(p["m"], norm).astype(y.dtype).reshape(*[1] * (y.ndim - 1), -1)
        return (y, *reports) if reports else y

    def _norms(self, w: jax.Array, p: Arrays) -> jax.Array:
        """The norms [d_out] of the columns of W + delta."""
        kron = getattr(self.method, "kron", lambda p: None)(p)
        if kron is None:
            u, v = self.method.factors(p)  # type: ignore[misc]
            return column_norms(w, u, v, jnp.ones((), u.dtype))
        return kron_norms(w, kron[0], kron[1] @ kron[2])


def kron_norms(w: jax.Array, a: jax.Array, c: jax.Array) -> jax.Array:
    """The norms [o1 o2] of the columns of w + a ⊗ c, a [i1, o1], c [i2, o2]; in the dtype of a."""
    w = w.astype(a.dtype)
    blocks = w.reshape(a.shape[0], c.shape[0], a.shape[1], c.shape[1])
    cross = jnp.sum(jnp.einsum("ijkl,ik->jkl", blocks, a) * c[:, None, :], axis=0)
    lengths = jnp.outer(jnp.sum(a * a, axis=0), jnp.sum(c * c, axis=0))
    square = jnp.sum(w * w, axis=0) + (2 * cross + lengths).reshape(-1)
    return jnp.sqrt(jnp.maximum(square, 0))
