r"""OSF: the small singular directions of a weight are trained, orthogonally to the large ones.

=========================  ===========================================================
W                          `w`, frozen, [d_in, d_out], of m = min(d_in, d_out) directions
:math:`U_k, V_k`           `high_in` [d_in, k], `high_out` [k, d_out], frozen: the k largest
:math:`U_0, \Sigma_0, V_0` `u0` [d_in, m - k], `s0` [m - k], `v0` [m - k, d_out], frozen: the others
:math:`U, \Sigma, V`       `u`, `s`, `v`, trained, of these shapes
=========================  ===========================================================

.. math::
    W' = W - U_0 \Sigma_0 V_0 + U \Sigma V, \qquad
    \nabla_U \leftarrow (1 - U_k U_k^T) \nabla_U, \qquad
    \nabla_V \leftarrow \nabla_V (1 - V_k^T V_k)

The gradients of U and V are projected, so that steps of gradient descent leave the large
directions, in which a model keeps what it has learned before, alone. Optimisers that scale every
number by itself (Adam) do not keep that exactly. Init: U, Sigma, V = U_0, Sigma_0, V_0, hence the
identity. What is trained is of the size of the weight: this is constrained full fine-tuning.

Nayak et al., `Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning
<https://arxiv.org/abs/2504.07097>`_, 2025.

Source: peft 0.21.2, read for its behaviour (the paper's text was not to be had).
Deviates: nothing that is known.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora import numerics
from jlora.core.method import Method, low_rank
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic


def kept_of(kept: int | float | None, size: int) -> int:
    """How many directions stay as they are.

    Args:
      kept: a number, a fraction in (0, 1) of all, or None: a half.
      size: how many there are, min(d_in, d_out).

    Returns:
      0 to `size`; fractions rounded down.
    """
    if kept is None:
        return size // 2
    return min(size, int(size * kept) if isinstance(kept, float) else kept)


def halves(w: Float[Array, "d_in d_out"], kept: int) -> Arrays:
    """The two parts of the SVD of a weight.

    Args:
      w: the weight.
      kept: directions of the first part, less than min(d_in, d_out).

    Returns:
      high_in, high_out, u0, s0, v0.
    """
    u, s, vt = numerics.svd(w)
    high = {"high_in": u[:, :kept], "high_out": vt[:kept]}
    return high | {"u0": u[:, kept:], "s0": s[kept:], "v0": vt[kept:]}


@jax.custom_vjp
def across(u: Float[Array, "n r"], high: Float[Array, "n k"]) -> Float[Array, "n r"]:
    """`u` itself, whose gradient loses what lies in the columns of `high`.

    Args:
      u: trained.
      high: orthonormal columns, without a gradient.

    Returns:
      `u`.
    """
    return u


def _forward(u: Array, high: Array) -> tuple[Array, Array]:
    return u, high


def _backward(high: Array, g: Array) -> tuple[Array, None]:
    return g - numerics.matmul(high, numerics.matmul(high.T, g)), None


across.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class OSF(Method):
    """Orthogonal subspace fine-tuning; `kept` directions, or a fraction (None: a half), stay.

    Raises:
      ValueError: a number below 1, a fraction outside (0, 1); at init, where no direction is kept
        or none is left.
    """

    kept: int | float | None = None

    def __post_init__(self) -> None:
        kept, fraction = self.kept, isinstance(self.kept, float)
        if kept is not None and not (0 < kept < 1 if fraction else kept >= 1):
            raise ValueError(f"OSF.kept: got {kept}, expected a number of directions or 0 < it < 1")

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """u [d_in, m - k], s [m - k], v [m - k, d_out]; frozen u0, s0, v0, high_in, high_out."""
        size = min(site.d_in, site.d_out)
        kept = kept_of(self.kept, size)
        if not 0 < kept < size:
            raise ValueError(f"{site.path}: OSF kept: got {kept} of {size} directions, expected "
                             f"1 to {size - 1}")  # fmt: skip
        frozen = halves(context.weight(), kept)
        return {name: frozen[f"{name}0"] for name in "usv"}, frozen

    def prepare(self, p: Arrays) -> Arrays:
        """As of every method, with the gradients of u and v projected."""
        p = super().prepare(p)
        v = across(p["v"].T, p["high_out"].T).T
        return {**p, "u": across(p["u"], p["high_in"]), "v": v}

    def factors(self, p: Arrays) -> tuple[jax.Array, jax.Array]:
        """u [d_in, 2 (m - k)] = [u s, u0 s0], v [2 (m - k), d_out] = [v; -v0]."""
        u = jnp.concatenate([p["u"] * p["s"][None, :], p["u0"] * p["s0"][None, :]], axis=1)
        return u, jnp.concatenate([p["v"], -p["v0"]], axis=0)

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]; the two products cancel exactly at init."""
        y = x @ w
        delta = low_rank(x, p["u"] * p["s"][None, :], p["v"])
        delta = delta - low_rank(x, p["u0"] * p["s0"][None, :], p["v0"])
        return y + delta.astype(y.dtype)


SYSTEM = System(
    name="OSF",
    paper="Nayak 2025, 2504.07097",
    symbol="OSF",
    evidence="the two parts against numpy's SVD; large directions stay under gradient descent; "
    "outputs and gradients of torch PEFT to 1e-5",
    tests=("tests/io/peft/types_test.py",),
    missing="the paper was not read; a claim of its stream of tasks",
    examples=(OSF(kept=3),),
)
