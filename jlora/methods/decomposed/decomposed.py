"""Weight decomposition of any delta: learned lengths of columns or rows, a method for direction.

Symbols: the method of the direction -> `method`, its delta :math:`\\Delta W = u v` or, of LoKr,
:math:`a \\otimes c`; m -> `m`, [d_out] for columns, [1, channels] or [channels, 1] for rows.

.. math::
    W' = V \\, \\mathrm{diag}(m / \\|V\\|_c) \\quad \\text{or} \\quad
    W' = \\mathrm{diag}(m / \\|V\\|_r) \\, V, \\qquad V = W + \\Delta W

with :math:`\\|V\\|_c` the norms of the columns (one an output feature, `by="out"`) or
:math:`\\|V\\|_r` those of the rows (one an input feature, `by="in"`; in a convolution the rows of a
channel have one norm together), taken as constants by the gradient. With LoRA it is, by columns,
DoRA; with LoHa and LoKr LyCORIS calls it DoHa and DoKr. V is never kept: its norms are DoRA's
closed form of the factors (as accurate as there), and with a Kronecker product one sum over W,

.. math::
    \\|V\\|_c^2 = \\|W\\|_c^2 + 1^T ((2 u^T W + u^T u \\, v) \\odot v), \\qquad
    \\|V_{kl}\\|^2 = \\sum_{ij} (W_{(ij),(kl)} + a_{ik} c_{jl})^2 ,

and rows are the columns of the transposes. The gain of a row is a gain of x, so by rows the matmul
is the model's own, of x diag(g).

Init: that of the method, and m = the norms of W, hence the identity.

Liu et al., `DoRA <https://arxiv.org/abs/2402.09353>`_, 2024; Yeh et al.,
`LyCORIS <https://arxiv.org/abs/2309.14859>`_, 2024.

Source: LyCORIS 4.1 (`weight_decompose`, `wd_on_output` on or off); the detached norm is DoRA's.
Deviates: norms without V (LyCORIS forms it, and lets the gradient through its norm); by rows a
convolution or lookup multiplies with the merged weight, for its x is never written down.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora.core.conv import window
from jlora.core.method import Method, Wrapper
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.decomposed.dora import column_norms, gain, row_norms
from jlora.methods.kronecker.lokr import LoKr
from jlora.methods.low_rank.loha import LoHa
from jlora.methods.low_rank.lora import LoRA
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class Decomposed(Wrapper):
    """`method` for the directions of the columns (or rows), `m` for their lengths.

    Raises:
      ValueError: a method without factors, or one that has an `m` of its own (when it is made); a
        `by` other than "out" and "in".
    """

    by: str = "out"  # whose lengths: "out" of the columns, "in" of the rows

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method) or type(self.method).factors is Method.factors:
            raise ValueError(f"Decomposed: expected a method with factors, got {self.method}")
        if self.by not in ("out", "in"):
            raise ValueError(f"Decomposed.by: expected 'out' or 'in', got {self.by!r}")

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """The method's own arrays and m = the norms of what it begins as.

        m is [d_out]; by rows [1, channels], or [channels, 1] where the channels come before the
        window in d_in (torch's layout).
        """
        trainable, frozen = self.method.init(key, site, context)
        if "m" in trainable | frozen:
            raise ValueError(f"Decomposed: {type(self.method).__name__} has an `m` of its own")
        p = {**context.shared, **frozen, **trainable}
        norms = self._norms(context.weight(), p, rows_shape(site) if self.by == "in" else None)
        return {**trainable, "m": norms}, frozen

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """V m / |V|, [d_in, d_out]."""
        v = self.method.merge(w, p)
        fixed = jax.lax.stop_gradient(v)
        if self.by == "out":
            return v * gain(p["m"], jnp.linalg.norm(fixed, axis=0))[None, :]
        norm = _together(jnp.linalg.norm(fixed, axis=1), p["m"].shape)
        return v * _rows(gain(p["m"], norm), len(v))[:, None]

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out], the method's own fast path and a gain."""
        if self.by == "in":
            if not isinstance(x, jax.Array):
                return x @ w.merged(self, p)
            norm = self._norms(*jax.lax.stop_gradient((w.dense(), p)), p["m"].shape)
            by = _rows(gain(p["m"], norm), x.shape[-1]).astype(x.dtype)
            return self.method.apply(x * by.reshape(*[1] * (x.ndim - 1), -1), w, p, ctx)
        out = self.method.apply(x, w, p, ctx)
        y, *reports = out if isinstance(out, tuple) else (out,)
        norm = self._norms(*jax.lax.stop_gradient((w.dense(), p)))
        y = y * gain(p["m"], norm).astype(y.dtype).reshape(*[1] * (y.ndim - 1), -1)
        return (y, *reports) if reports else y

    def _norms(self, w: jax.Array, p: Arrays, rows: tuple[int, ...] | None = None) -> jax.Array:
        """The norms of the columns of W + delta, [d_out], or those of its rows, of shape `rows`."""
        factors = getattr(self.method, "kron", lambda p: None)(p)
        if factors is not None:
            with jax.default_matmul_precision("highest"):
                second = factors[1] @ factors[2]
            norms = kron_norms(w, factors[0], second, axis=0 if rows is None else 1)
            return norms if rows is None else _together(norms, rows)
        u, v = self.method.factors(p)  # type: ignore[misc]
        if rows is None:
            return column_norms(w, u, v, jnp.ones((), u.dtype))
        return _together(row_norms(w, u, v), rows)


def rows_shape(site: Site) -> tuple[int, int]:
    """The shape of m by rows: it tells whether the window or the channels come first in d_in.

    Args:
      site: a convolution, or another site.

    Returns:
      (1, channels), or (channels, 1) where the channels come before the window.
    """
    _, channels, after = window(site)
    return (channels, 1) if after > 1 else (1, channels)


def _places(shape: tuple[int, ...], rows: int) -> tuple[int, int]:
    """`rows` as [window, channels] or [channels, window], as `shape` of m says."""
    before, channels = shape
    return (rows // channels, channels) if before == 1 else (before, rows // before)


def _together(norms: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The norms [d_in] of rows -> of channels, each of all places of its window, of `shape`."""
    square = jnp.square(norms).reshape(_places(shape, len(norms)))
    return jnp.sqrt(jnp.sum(square, axis=0 if shape[0] == 1 else 1, keepdims=True))


def _rows(gains: jax.Array, rows: int) -> jax.Array:
    """Gains of channels -> of rows, [d_in]."""
    return jnp.broadcast_to(gains, _places(gains.shape, rows)).reshape(-1)


def kron_norms(
    w: Float[Array, "d_in d_out"], a: Float[Array, "i1 o1"], c: Float[Array, "i2 o2"], axis: int = 0
) -> jax.Array:
    """The norms of the columns or rows of w + a ⊗ c. One pass over w, nothing kept.

    Args:
      w: the base matrix, d_in = i1 i2, d_out = o1 o2.
      a: left factor.
      c: right factor.
      axis: 0: the norms of the columns; 1: of the rows.

    Returns:
      [d_out] or [d_in], in the dtype of a.
    """
    blocks = w.astype(a.dtype).reshape(a.shape[0], c.shape[0], a.shape[1], c.shape[1])
    v = blocks + a[:, None, :, None] * c[None, :, None, :]
    return jnp.sqrt(jnp.sum(v * v, axis=(2 * axis, 2 * axis + 1))).reshape(-1)


SYSTEM = System(
    name="Decomposed",
    paper="Liu 2024, 2402.09353; Yeh 2024, 2309.14859",
    symbol="Decomposed",
    evidence="LyCORIS's outputs of DoHa, DoKr and DoRA with cores, by output and by input, to "
    "1e-5, its files back bitwise",
    examples=(
        Decomposed(LoHa(rank=2)),
        Decomposed(LoKr(rank=1, factor=2)),
        Decomposed(LoRA(rank=2), by="in"),
    ),
)
