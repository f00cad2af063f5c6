"""The table of merges: one row a method; the law suite, the registry and `merge` read it.

Laws, by the names used in `breaks`:

=============  =================================================================================
weight_one     one adapter of weight 1 is returned as it is
idempotent     equal adapters whose weights sum to 1 give that adapter
permutation    the order of (adapter, weight, id) does not matter
gauge          (u G, G^-1 v) is the same adapter
certificate    the distance to the exact weighted sum is at most what `certificate` says
jit            jitted is eager
sharded        sharded over 8 devices is on one
gradient       the gradient with respect to weights and factors is finite
=============  =================================================================================

Source: our reading.
Deviates: nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jlora.merging.concat import concat

LAWS = (
    "weight_one",
    "idempotent",
    "permutation",
    "gauge",
    "certificate",
    "jit",
    "sharded",
    "gradient",
)


@dataclasses.dataclass(frozen=True)
class Merging:
    """A row of the table. The laws are checked with `options`; `breaks` names broken ones."""

    name: str  # what `jl.merging.merge` calls it
    function: Callable[..., Any]  # of one site and slice, or of whole Deltas
    paper: str  # first author, year, arXiv number
    kind: str = "mechanism"  # own mechanism, composition of others, or recipe
    scope: str = "site"  # "site": fn(LowRank, weights) -> LowRank; "adapter": of Deltas
    randomised: bool = False  # a site's function takes `keys` [N], an adapter's `key`
    loop: str = "vmap"  # "map": slices one after the other, to bound the memory
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for the laws
    certificate: Callable[..., Any] | None = None  # (bank, weights, **options) -> error bound
    tight: bool = False  # the certificate is the error itself
    atol: float = 1e-4  # of the laws, relative to the norm of the inputs
    breaks: Mapping[str, str] = dataclasses.field(default_factory=dict)  # law -> reason
    tests: tuple[str, ...] = ()  # beside the law suite; tests/merging/<module>_test.py if empty
    evidence: str = "numpy value; law suite"  # what has been measured about it

    def __post_init__(self):
        if self.scope not in ("site", "adapter"):
            raise ValueError(f"{self.name}: scope: got {self.scope!r}, expected site or adapter")
        for law in self.breaks.keys() - set(LAWS):
            raise ValueError(f"{self.name}: breaks: got {law!r}, expected one of {LAWS}")


ROWS: tuple[Merging, ...] = (
    # --- exact and spherical ---
    Merging("concat", concat, "Prabhakar 2024, 2410.13025; Wang 2024, 2409.05976"),
    # --- spectral, in the core space ---
    # --- elementwise and factor space ---
    # --- systems and learned ---
)

METHODS: dict[str, Merging] = {row.name: row for row in ROWS}
