"""BEFT: a vector is added to what matrices give, in the paper to the values of attention.

Symbols: a bias w [n], and what is added to it -> `v` [n] (`BEFT`); or a matrix W [d_in, d_out], and
what is added to its outputs -> `bias` [d_out] (`OutputBias`).

.. math::
    w' = w + v, \\qquad y = x W + \\mathrm{bias}

Both are one function where a matrix has a bias. `BEFT` merges into it; without one there is nothing
to merge into, and `OutputBias` runs alongside. Init: 0, hence the identity. `BitFit` trains the
bias itself; differences can be scaled and added up.

BEFT: Bias-Efficient Fine-Tuning of Language Models, `2509.15974 <https://arxiv.org/abs/2509.15974>`_,
2025.

Source: peft 0.21.2 and its documentation (the paper's text was not to be had).
Deviates: a pattern selects the biases; any vector that it matches is trained.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.selective.trained_vector import ANY_USE, TrainedVector
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class BEFT(TrainedVector):
    """Trainable `v` [n], added to the bias."""

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """v [n] = 0.

        Raises:
          ValueError: the leaf is no vector.
        """
        trainable, frozen = super().init(key, site, context)
        return {name: jnp.zeros_like(t) for name, t in trainable.items()}, frozen

    def merge(self, w: Float[Array, "1 n"], p: Arrays) -> Float[Array, "1 n"]:
        """w + v, [1, n]."""
        return w + p["v"][None, :]


@dataclasses.dataclass(frozen=True)
class OutputBias(Method):
    """Trainable `bias` [d_out], added to the outputs of a matrix."""

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """bias [d_out] = 0."""
        return {"bias": jnp.zeros(site.d_out, site.param_dtype)}, {}

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out]."""
        y = x @ w
        return y + jnp.expand_dims(p["bias"], tuple(range(y.ndim - 1))).astype(y.dtype)


SYSTEMS = (
    System(
        name="BEFT",
        paper="2025, 2509.15974",
        symbol="BEFT",
        evidence="torch PEFT's outputs to 1e-5, its files back bitwise",
        tests=("tests/io/peft/types_test.py",),
        missing="the paper was not read",
        examples=(BEFT(),),
        breaks=ANY_USE,
    ),
    System(
        name="OutputBias",
        paper="2025, 2509.15974",
        symbol="OutputBias",
        evidence="torch PEFT's outputs to 1e-5, its files back bitwise",
        tests=("tests/io/peft/types_test.py",),
        missing="the paper was not read",
        examples=(OutputBias(),),
        breaks={"L3": "there is no bias to merge into, and no weight adds a vector to its outputs"},
    ),
)
