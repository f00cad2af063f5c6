"""Trainable tokens: some rows of an embedding table are trained, the others stay.

Symbols: ids i_1, ..., i_n -> `ids`; new rows v -> `rows` [n, d_out]; e_k: the k-th unit vector.

.. math::
    W'_{i_k} = v_k, \\qquad W'_j = W_j \\ \\text{for other } j, \\qquad
    y = x W (1 - \\textstyle\\sum_k x_{i_k}) + \\sum_k x_{i_k} v_k \\quad (x = e_j)

The second form is what a lookup runs: a looked-up row is the base's or a trained one. Elsewhere
(a head tied to the table) the merged table is formed. Init: the base's rows, hence the identity.

Source: PEFT 0.21 (`trainable_token_indices`), read for its behaviour.
Paper: none; new tokens of a vocabulary are trained so in practice.
Deviates: nothing.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from jlora.core.lookup import OneHotRows
from jlora.core.method import Method
from jlora.core.site import Arrays, InitContext, Site
from jlora.system import System
from jlora.types import Dynamic


@dataclasses.dataclass(frozen=True)
class TrainableTokens(Method):
    """Rows `ids` of a table. Trainable `rows` [n, d_out].

    Raises:
      ValueError: ids that are none, negative or given twice; at init, where an id is not a row of
        the table.
    """

    ids: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not self.ids or min(self.ids) < 0 or len(set(self.ids)) < len(self.ids):
            raise ValueError(f"TrainableTokens.ids: got {self.ids}, expected distinct rows")

    def init(self, key: PRNGKeyArray, site: Site, context: InitContext) -> tuple[Arrays, Arrays]:
        """rows [n, d_out], the base's."""
        if max(self.ids) >= site.d_in:
            raise ValueError(f"{site.path}: id {max(self.ids)}, expected one of {site.d_in} rows")
        return {"rows": context.weight()[np.asarray(self.ids)]}, {}

    def merge(self, w: Float[Array, "d_in d_out"], p: Arrays) -> jax.Array:
        """W with the rows in their places, [d_in, d_out]."""
        return w.at[np.asarray(self.ids)].set(p["rows"])

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """Rows of the table [..., d_out]; on other x [..., d_in] the matmul with the merged one."""
        if not isinstance(x, OneHotRows):
            return x @ w.merged(self, p)
        y = x @ w
        hot = np.zeros((w.shape[0], len(self.ids)), bool)
        hot[self.ids, np.arange(len(self.ids))] = True
        hits = x @ jnp.asarray(hot, y.dtype)
        kept = 1 - hits.sum(axis=-1, keepdims=True)
        return y * kept + hits @ p["rows"].astype(y.dtype)


SYSTEM = System(
    name="TrainableTokens",
    paper="none (practice; PEFT 0.21)",
    symbol="TrainableTokens",
    evidence="lookups by numpy; PEFT's golden adapter",
    examples=(TrainableTokens((0, 5)),),
    breaks={
        "L4": "outside of lookups the merged table is formed",
    },
)
