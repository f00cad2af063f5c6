"""AdaLoRA's parameterisation: a low-rank delta in the form of a singular value decomposition.

=========  ===========================================================
W          `w`, frozen, [d_in, d_out]
A, B       `a` [d_in, r], `b` [r, d_out]
e          `e` [r], in the place of singular values
s          `scale`: alpha / (r + 1e-5)
=========  ===========================================================

.. math:: W' = W + s\\, A \\, \\mathrm{diag}(e) \\, B

One direction is switched off by one number, e_k = 0, and can come back; a penalty keeps A and B
near orthogonal, so that e tells which directions matter:

.. math:: \\Omega = \\lVert A^T A - I \\rVert_F^2 + \\lVert B B^T - I \\rVert_F^2

Init: A, B ~ N(0, 0.02^2) and e = 0, hence the identity.

Paper: Zhang et al. 2023, arXiv:2303.10512.
Source: paper; init, scale and its 1e-5 as PEFT 0.21.
Deviates: this is the parameterisation and its penalty; who gets which rank is another matter.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.adapter import Adapter
from jlora.core.checks import check_whole
from jlora.core.method import Method
from jlora.core.site import Arrays, Site
from jlora.system import System

STD, TINY = 0.02, 1e-5


@dataclasses.dataclass(frozen=True)
class AdaLoRA(Method):
    """Hyper-parameters; `rank` is the one to start with.

    Trainable `a` [d_in, r], `e` [r], `b` [r, d_out]; frozen `scale` [].
    Raises ValueError for a rank < 1.
    """

    rank: int = 12
    alpha: float = dataclasses.field(default=8.0, compare=False)

    rank_axes: ClassVar[Mapping[str, int]] = {"a": -1, "e": -1, "b": -2}

    def __post_init__(self):
        check_whole("AdaLoRA.rank", self.rank)

    def init(self, key: jax.Array, site: Site) -> tuple[Arrays, Arrays]:
        dtype, (first, second) = site.param_dtype, jax.random.split(key)
        a = STD * jax.random.normal(first, (site.d_in, self.rank), dtype)
        b = STD * jax.random.normal(second, (self.rank, site.d_out), dtype)
        scale = jnp.asarray(self.alpha / (self.rank + TINY), jnp.float32)
        return {"a": a, "e": jnp.zeros(self.rank, dtype), "b": b}, {"scale": scale}

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        e = p["e"] * p["scale"].astype(p["e"].dtype)
        return p["a"] * e[None, :], p["b"]


def orthogonality(adapter: Adapter) -> jax.Array:
    """The mean over its AdaLoRA matrices of Omega, float32 []; zero where there is none."""
    total, count = jnp.zeros((), jnp.float32), 0
    for site, method in adapter.sites:
        if not isinstance(method, AdaLoRA):
            continue
        a, b = (adapter.trainable[site.path][k].astype(jnp.float32) for k in ("a", "b"))
        eye = jnp.broadcast_to(jnp.eye(a.shape[-1]), (*a.shape[:-2], a.shape[-1], a.shape[-1]))
        total += jnp.sum((a.mT @ a - eye) ** 2) + jnp.sum((b @ b.mT - eye) ** 2)
        count += 2 * (a.size // (a.shape[-2] * a.shape[-1]))
    return total / max(count, 1)


SYSTEM = System(
    name="AdaLoRA",
    paper="Zhang 2023, 2303.10512",
    symbol="AdaLoRA",
    evidence="one number switches a direction, penalty by numpy; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/parity_test.py",),
    examples=(AdaLoRA(rank=2),),
)
