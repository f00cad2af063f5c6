"""LoKr: a Kronecker product as the delta, run by the mixed-product rule.

With d_in = i1 i2 and d_out = o1 o2 (`split` chooses them, or `sizes` = (i1, o1) gives them):
symbols: W1 -> `w1` [i1, o1], or A1 B1 -> `a1` [i1, r], `b1` [r, o1]; W2 -> `w2` [i2, o2], or
A2 B2 -> `a2` [i2, r], `b2` [r, o2]; s = alpha / rank -> `scale`.

.. math::
    \\Delta W = s \\, W_1 \\otimes W_2, \\qquad
    x (W_1 \\otimes W_2) = \\mathrm{vec}(W_1^T X W_2), \\quad X = \\mathrm{mat}_{i_1, i_2}(x)

so a step costs T r (d_in + i1 o1 + d_out) instead of T d_in d_out, and forms nothing larger than
W1, W2. Rank of the delta: rank(W1) rank(W2).

W2 is factored where r < max(i2, o2) / 2; W1 too under `decompose_both` and r < max(i1, o1) / 2.
Of a convolution, i1 i2 are the channels and the window belongs to the second factor. Where it lies
before the channels (Flax), `w2` is [window, i2, o2], `a2` [window, i2, r]; where after them, the
rows of W2 are i2 * window. With `tucker`, `a2` is [i2, r] and has a core `t2`
[before, after, r, r] over the window: :math:`(A_2)_{bca,k} = \\sum_j t_{ba,jk} a_{cj}`.

With `swapped`, a convolution whose W2 is whole has `w2` [before, i2, after, o2] and the channels in
the other order, :math:`W_2 \\otimes W_1` at each place of the window:

.. math::
    \\Delta W_{b (i_2 i_1) a, (o_2 o_1)} = s \\, (W_1)_{i_1 o_1} (W_2)_{b i_2 a, o_2} .

Init: the first factor (W1, or B1) is 0, the rest uniform in ±1/sqrt(fan-in): the identity.

Edalati et al., `KronA <https://arxiv.org/abs/2212.10650>`_, 2022; Marjit et al., `DiffuseKronA
<https://arxiv.org/abs/2402.17412>`_, 2024 (both factors whole, of chosen sizes); Yeh et al.,
`LyCORIS <https://arxiv.org/abs/2309.14859>`_, 2024.

Source: papers; factorisation rule, scale and init as PEFT 0.21.
Deviates: PEFT multiplies out the delta in every step. LyCORIS takes s = 1 where both factors are
full; here, as in PEFT, s = alpha / rank always (a reader of such files sets `scale` to 1).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora import algebra
from jlora.core.checks import check_whole
from jlora.core.conv import tucker, window
from jlora.core.method import Method, low_rank
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic


def split(dim: int, factor: int | None = None) -> tuple[int, int]:
    """A size as a product of two factors.

    Args:
      dim: d_in or d_out.
      factor: bounds the first factor; one that divides dim is the first factor itself. None: near
        the root.

    Returns:
      (m, n) with m n = dim, m the largest divisor of at most min(factor, sqrt(dim)).
    """
    if factor is not None and dim % factor == 0:
        return factor, dim // factor
    limit = math.isqrt(dim) if factor is None else min(factor, math.isqrt(dim))
    m = next(m for m in range(limit, 0, -1) if dim % m == 0)
    return m, dim // m


@dataclasses.dataclass(frozen=True)
class LoKr(Method):
    """Kronecker adapter; `factor` bounds the size of the first factor (None: near the root).

    Raises:
      ValueError: rank, factor or a size < 1, or both of factor and sizes; at init, sizes that do
        not divide the channels and d_out.
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"a1": -1, "b1": -2, "a2": -1, "b2": -2}

    rank: int = 8
    alpha: float = dataclasses.field(default=8.0, compare=False)
    factor: int | None = None
    decompose_both: bool = False
    tucker: bool = False  # a core over the window of a convolution; of others no difference
    swapped: bool = False  # of a convolution with a whole W2, as PEFT's one-dimensional ones
    sizes: tuple[int, int] | None = None  # (i1, o1) of the first factor, in place of `factor`

    def __post_init__(self) -> None:
        for got in self.sizes or ():
            check_whole("LoKr.sizes", got)
        if self.sizes and (len(self.sizes) != 2 or self.factor is not None):
            raise ValueError(f"LoKr.sizes: got {self.sizes} and the factor {self.factor}, expected "
                             "(i1, o1) and None")  # fmt: skip
        for name, got in (("rank", self.rank), ("factor", self.factor)):
            if got is not None:
                check_whole(f"LoKr.{name}", got)

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """w1 or a1, b1, and w2 or a2, b2 and perhaps t2; frozen scale []."""
        before, channels, after = window(site)
        (i1, i2), (o1, o2) = self._split(site, channels)
        r, dtype, keys = self.rank, site.param_dtype, jax.random.split(key, 3)

        def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
            bound = 1 / math.sqrt(fan_in)
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        if self.decompose_both and r < max(i1, o1) / 2:
            trainable = {"a1": uniform(keys[0], (i1, r), i1), "b1": jnp.zeros((r, o1), dtype)}
        else:
            trainable = {"w1": jnp.zeros((i1, o1), dtype)}
        rows = (i2 * after,) if before == 1 else (before, i2 * after)
        if r >= max(i2, o2) / 2:
            conv = "conv" in site.ops and site.kinds.count("i") > 1
            shape = (before, i2, after, o2) if self.swapped and conv else (*rows, o2)
            trainable["w2"] = uniform(keys[1], shape, math.prod(rows))
        else:
            trainable["b2"] = uniform(keys[2], (r, o2), r)
            if self.tucker and before * after > 1:
                trainable["a2"] = uniform(keys[1], (i2, r), i2)
                trainable["t2"] = uniform(jax.random.fold_in(key, 1), (before, after, r, r), r)
            else:
                trainable["a2"] = uniform(keys[1], (*rows, r), math.prod(rows))
        return trainable, {"scale": jnp.asarray(self.alpha / r, dtype)}

    def _split(self, site: Site, channels: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(i1, i2), (o1, o2) of a site."""
        if self.sizes is None:
            return split(channels, self.factor), split(site.d_out, self.factor)
        (i1, o1), d_out = self.sizes, site.d_out
        if channels % i1 or d_out % o1:
            raise ValueError(f"{site.path}: LoKr sizes: got {self.sizes}, expected divisors of "
                             f"{channels} and {d_out}")  # fmt: skip
        return (i1, channels // i1), (o1, d_out // o1)

    def parts(self, p: Arrays) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The two factors of the Kronecker product, the second one factored.

        The delta is a ⊗ (u @ v), that of each place of the window above the next. A reversed one
        has no such parts.

        Args:
          p: the arrays, as `prepare` returns them.

        Returns:
          a [i1, o1] with the scale, u [i2, R] or [window, i2, R], v [R, o2].
        """
        a = _first(p)
        if "t2" in p:
            u = tucker(p["a2"], p["t2"])  # [before, i2, after, r]
            rows = (-1,) if u.shape[0] == 1 else (u.shape[0], u.shape[1] * u.shape[2])
            return a, u.reshape(*rows, u.shape[3]), p["b2"]
        if "a2" in p:
            return a, p["a2"], p["b2"]
        w2 = p["w2"]
        if w2.ndim == 3 or w2.shape[1] <= w2.shape[0]:
            return a, w2, jnp.eye(w2.shape[-1], dtype=w2.dtype)
        return a, jnp.eye(w2.shape[0], dtype=w2.dtype), w2

    def kron(self, p: Arrays) -> tuple[jax.Array, jax.Array, jax.Array] | None:
        """The delta as a Kronecker product, where it is one.

        Args:
          p: the arrays, as `prepare` returns them.

        Returns:
          a [i1, o1], u [i2, R], v [R, o2] with a ⊗ (u @ v) the delta; None if a window leads.
        """
        if _is_swapped(p):
            return None
        parts = self.parts(p)
        return parts if parts[1].ndim == 2 else None

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """u [d_in, R], v [R, d_out], R = min(i1, o1) times the rank of the second factor."""
        if _is_swapped(p):
            eye = jnp.eye(min(_first(p).shape), dtype=p["w2"].dtype)
            left, right = (eye, _first(p)) if len(eye) == len(_first(p)) else (_first(p), eye)
            u = jnp.einsum("bcas,ik->bciask", p["w2"], left)
            return u.reshape(-1, u.shape[-2] * u.shape[-1]), algebra.kron(
                jnp.eye(u.shape[-2], dtype=right.dtype), right
            )
        a, u, v = self.parts(p)
        if u.ndim == 2:
            return algebra.low_rank(algebra.Kron(a, u, v))
        a, v = (jnp.broadcast_to(t, (u.shape[0], *t.shape)) for t in (a, v))
        left, right = algebra.low_rank(algebra.Kron(a, u, v))  # right is one for all places
        return left.reshape(-1, left.shape[2]), right[0]

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """w + s W1 ⊗ W2, [d_in, d_out]."""
        if _is_swapped(p):
            return w + jnp.einsum("bcas,io->bciaso", p["w2"], _first(p)).reshape(w.shape)
        a, u, v = self.parts(p)
        if u.ndim == 3:
            a = jnp.broadcast_to(a, (u.shape[0], *a.shape))
        return w + algebra.kron(a, u @ v).reshape(w.shape)

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; rows of a table and patches take the low-rank form."""
        y = x @ w
        windowed = "t2" in p or (p["w2"] if "w2" in p else p["a2"]).ndim > 2
        if windowed or not isinstance(x, jax.Array):
            return y + low_rank(x, *self.factors(p)).astype(y.dtype)
        first = _first(p)
        second = [p[k].astype(x.dtype) for k in ("a2", "b2", "w2") if k in p]
        grid = x.reshape(*x.shape[:-1], first.shape[0], -1)
        letters = "kr,rl" if len(second) == 2 else "kl"
        delta = jnp.einsum(f"...pk,pq,{letters}->...ql", grid, first.astype(x.dtype), *second)
        return y + delta.reshape(y.shape).astype(y.dtype)


def _first(p: Arrays) -> jax.Array:
    """W1 [i1, o1] with the scale."""
    if "w1" in p:
        return p["scale"] * p["w1"]
    return p["scale"] * jnp.matmul(p["a1"], p["b1"], precision="highest")


def _is_swapped(p: Arrays) -> bool:
    return "w2" in p and p["w2"].ndim == 4


SYSTEM = System(
    name="LoKr",
    paper="Edalati 2022, 2212.10650; Yeh 2024, 2309.14859; Marjit 2024, 2402.17412",
    symbol="LoKr",
    evidence="FLOPs of the fast path; outputs of torch PEFT to 1e-5",
    rows=(7,),
    tests=("tests/io/peft/parity_test.py",),
    claim="diffuse_krona",
    examples=(
        LoKr(rank=1, factor=2),
        LoKr(rank=8, factor=2),
        LoKr(rank=1, decompose_both=True),
    ),
)
