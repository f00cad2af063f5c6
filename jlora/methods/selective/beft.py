"""BEFT: what is trained is added to biases, in the paper to those of the value projections.

Symbols: a bias w [n]; what is added to it -> `v` [n].

.. math::
    w' = w + v

Init: v = 0, hence the identity. `BitFit` trains the bias itself; differences can be scaled and
added up.

BEFT: Bias-Efficient Fine-Tuning of Language Models, `2509.15974 <https://arxiv.org/abs/2509.15974>`_,
2025.

Source: peft 0.21.2 and its documentation (the paper's text was not to be had).
Deviates: a pattern selects the biases; any vector that it matches is trained. PEFT also adds to the
output of modules without a bias, which cannot be merged there either; here there is no such site.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.core.site import Arrays, InitContext, Site
from jlora.methods.selective.trained_vector import ANY_USE, TrainedVector
from jlora.system import System


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


SYSTEM = System(
    name="BEFT",
    paper="2025, 2509.15974",
    symbol="BEFT",
    evidence="torch PEFT's outputs to 1e-5, its files back bitwise",
    tests=("tests/io/peft/types_test.py",),
    missing="the paper was not read",
    examples=(BEFT(),),
    breaks=ANY_USE,
)
