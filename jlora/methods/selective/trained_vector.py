"""Vectors that are trained whole: the base of methods that replace a bias or a gain.

Symbols: a vector w [n]; its trained copy -> `v` [n].

.. math::
    w' = v
"""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float, PRNGKeyArray

from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site


@dataclasses.dataclass(frozen=True)
class TrainedVector(Method):
    """Trainable `v` [n], in the place of the vector."""

    vectors: ClassVar[bool] = True

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """v [n], the base's.

        Raises:
          ValueError: the leaf is no vector.
        """
        if "i" in site.kinds:
            raise ValueError(
                f"{site.path}: {type(self).__name__} trains vectors; got a matrix "
                f"[{site.d_in}, {site.d_out}]"
            )
        return {"v": context.weight()[0]}, {}

    def merge(self, w: Float[Array, "1 n"], p: Arrays) -> Float[Array, "1 n"]:
        """v for w, [1, n]."""
        return p["v"][None, :]


ANY_USE = {"L10": "a vector may meet any operation, so that none is refused"}  # `System.breaks`
