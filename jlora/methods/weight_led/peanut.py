"""PEANuT: a small network that reads the weight gives the first factor of the delta.

==================  ===========================================================
W                   `w`, frozen, [d_in, d_out]
A, B                `a` [d_out, r], `b` [r, d_out], trained
:math:`E_l, D_l`    `enc`, `dec` [depth, r, r], trained; none of depth 0
f, s                the activation, and the constant `scaling`
==================  ===========================================================

.. math::
    h_0 = f(W A), \\quad h_l = f(h_{l-1} E_l), \\qquad
    g_0 = h_L, \\quad g_l = f(g_{l-1} D_l) + h_{L-l}, \\qquad
    W' = W + s \\, g_L B

The rows of W are the samples of the network. The delta has rank r or less and is led by the weight;
a step computes W A, 2 r d_in d_out operations next to the matmul, and no delta. Init: B = 0, hence
the identity; the others uniform in ±1/sqrt(fan-in).

Zhong et al., `PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers
<https://arxiv.org/abs/2410.01870>`_, 2024 (also NEAT).

Source: paper; residual connections as PEFT 0.21.
Deviates: PEFT forms the delta in every step.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora import numerics
from jlora.core.checks import check_whole
from jlora.core.method import Method, low_rank
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class PEANuT(Method):
    """Adapter of `rank` whose first factor is a network of `depth` layers each way.

    Raises:
      ValueError: rank < 1, depth < 0, an unknown activation.
    """

    rank: int = 32
    depth: int = 0
    activation: str = "relu"
    scaling: float = 1.0

    def __post_init__(self) -> None:
        check_whole("PEANuT.rank", self.rank)
        check_whole("PEANuT.depth", self.depth, 0)
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"PEANuT.activation: got {self.activation!r}, expected one of {list(ACTIVATIONS)}"
            )

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """a [d_out, r], b [r, d_out] = 0, and of a depth enc, dec [depth, r, r]."""
        r, dtype, keys = self.rank, site.param_dtype, jax.random.split(key, 3)

        def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            bound = 1 / math.sqrt(shape[-2])
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        p = {"a": uniform(keys[0], (site.d_out, r)), "b": jnp.zeros((r, site.d_out), dtype)}
        if self.depth:
            p["enc"] = uniform(keys[1], (self.depth, r, r))
            p["dec"] = uniform(keys[2], (self.depth, r, r))
        return p, {}

    def first(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """The first factor of the delta: the network of the weight.

        Args:
          w: the weight.
          p: a [d_out, r], and of a depth enc, dec [depth, r, r].

        Returns:
          s g(w), [d_in, r].
        """
        f = ACTIVATIONS[self.activation]
        h, kept = f(numerics.matmul(w.astype(p["a"].dtype), p["a"])), []
        for k in range(self.depth):
            kept.append(h)
            h = f(numerics.matmul(h, p["enc"][k]))
        for k in range(self.depth):
            h = f(numerics.matmul(h, p["dec"][k])) + kept.pop()
        return self.scaling * h

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """w + s g b, [d_in, d_out]; exactly w while b is zero."""
        return w + self.first(w, p) @ p["b"]

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]."""
        y = x @ w
        return y + low_rank(x, self.first(w.dense(), p), p["b"]).astype(y.dtype)


SYSTEM = System(
    name="PEANuT",
    paper="Zhong 2024, 2410.01870",
    symbol="PEANuT",
    evidence="the network layer by layer; outputs of torch PEFT to 1e-5",
    tests=("tests/io/peft/types_test.py",),
    examples=(PEANuT(rank=3, depth=1, activation="tanh"),),
)
