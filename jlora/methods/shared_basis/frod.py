r"""FRoD: in a basis that makes the weight diagonal, the diagonal and a few entries are trained.

==================  ===========================================================
W                   `w`, frozen, [d_in, d_out]
V                   `v` [d_in, d_in], frozen: the basis
U                   `u` [d_in, d_out], frozen, rows of length 1 (or 0)
:math:`\lambda_0`   `lam0` [d_in], frozen: :math:`W = V \, \mathrm{diag}(\lambda_0) \, U`
:math:`\lambda`     `lam` [d_in], trained
S                   `c` [n], trained, at `rows`, `cols` [n], int32, frozen, off the diagonal
==================  ===========================================================

.. math::
    W' = W + V \, (\mathrm{diag}(\lambda - \lambda_0) + S) \, U

so the delta has full rank with d_in + n numbers, n = floor(rate d_in^2). The places are drawn by
`seed` alone, with torch's generator. Init: lambda = lambda_0 and S = 0, hence the identity.

FRoD, AAAI 2026, `<https://doi.org/10.1609/aaai.v40i31.39813>`_.

Source: peft 0.21.2, read for its behaviour (the paper's text was not to be had).
Deviates: the basis of a fresh adapter is that of the left singular vectors of the weight; the paper
and PEFT share one among the layers of a role, which `jl.inits.frod` gives. Readers of PEFT's files
take theirs.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jlora import numerics
from jlora.core import compat
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.sparse.shira import scattered, sparse_product
from jlora.system import System
from jlora.torch_random import Generator
from jlora.types import Dynamic

LEAST = 1e-12  # a shorter row is none
SPANS = 1e-4  # what a basis may lose of a weight, relative to its largest entry


def places(size: int, rate: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct places off the diagonal of a square matrix, as PEFT draws them for one role.

    Args:
      size: of the matrix, d_in.
      rate: of its entries, 0 to 1; above 0, at least one is drawn.
      seed: of torch's generator.

    Returns:
      (rows, cols), int32 [n].
    """
    total = size * (size - 1)
    count = min(int(size * size * rate), total)
    if rate > 0 and total:
        count = max(1, count)
    flat = Generator(seed).permutation(total, count).astype(np.int32)
    cols = flat // np.int32(max(size - 1, 1))
    rows = flat % np.int32(max(size - 1, 1))
    return rows + (rows >= cols), cols


def coordinates(v: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A weight in a basis.

    Args:
      v: [d_in, d_in], the basis in its columns.
      w: [d_in, d_out], the weight.

    Returns:
      lam0 [d_in], u [d_in, d_out], float32 of float64's values.

    Raises:
      ValueError: the basis does not span the weight.
    """
    basis, weight = v.astype(np.float64), w.astype(np.float64)
    try:
        rows = np.linalg.solve(basis, weight)
    except np.linalg.LinAlgError:
        rows = np.linalg.pinv(basis, rcond=1e-6) @ weight
    lam0 = np.linalg.norm(rows, axis=1)
    u = np.where((lam0 > LEAST)[:, None], rows / np.maximum(lam0, LEAST)[:, None], 0)
    lam0, u = lam0.astype(np.float32), u.astype(np.float32)
    lost = np.abs(basis @ (lam0.astype(np.float64)[:, None] * u) - weight).max()
    if not lost <= SPANS * np.abs(weight).max():
        raise ValueError(f"FRoD: the basis loses {lost} of a weight, expected one that spans it")
    return lam0, u


@dataclasses.dataclass(frozen=True)
class FRoD(Method):
    """Adapter of the diagonal and `rate` of the other entries of a weight in its basis.

    Raises:
      ValueError: a rate outside 0..1.
    """

    rate: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate <= 1.0:
            raise ValueError(f"FRoD.rate: got {self.rate}, expected 0 <= it <= 1")

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """lam [d_in], c [n] = 0; frozen lam0, v, u, and rows, cols [n] int32 of `seed`."""
        v, s, u = numerics.svd(context.weight(), full_matrices=True)
        short = max(0, site.d_in - site.d_out)
        lam0 = jnp.pad(s, (0, short))
        u = jnp.pad(u[: site.d_in], ((0, short), (0, 0)))
        rows, cols = places(site.d_in, self.rate, self.seed)
        frozen = {
            "v": v,
            "u": u,
            "lam0": lam0,
            "rows": jnp.asarray(rows),
            "cols": jnp.asarray(cols),
        }
        return {"lam": lam0, "c": jnp.zeros(rows.size, site.param_dtype)}, frozen

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """w with the changed entries in the basis, [d_in, d_out]."""
        inner = scattered(jnp.diag(p["lam"] - p["lam0"]), p["c"], p["rows"], p["cols"])
        return w + numerics.matmul(numerics.matmul(p["v"], inner), p["u"])

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; rows of a table and patches run on the merged weight."""
        if not isinstance(x, jax.Array):
            return x @ w.merged(self, p)
        y = x @ w
        z = compat.matmul(x, p["v"].astype(x.dtype)).astype(p["lam"].dtype)
        axes = tuple(range(x.ndim - 1))
        turned = z * jnp.expand_dims(p["lam"] - p["lam0"], axes)
        turned = turned + sparse_product(z, p["c"], p["rows"], p["cols"], z.shape[-1])
        return y + compat.matmul(turned.astype(x.dtype), p["u"].astype(x.dtype)).astype(y.dtype)


SYSTEM = System(
    name="FRoD",
    paper="AAAI 2026, 10.1609/aaai.v40i31.39813",
    symbol="FRoD",
    evidence="entries one by one in numpy's basis; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/types_test.py",),
    missing="the paper was not read",
    examples=(FRoD(rate=0.2),),
)
