"""The record of a merging method, and the laws that it is checked by.

Laws, by the names used in `breaks`:

=============  =================================================================================
weight_one     one adapter of weight 1 is returned as it is
minus_one      one adapter of weight -1 gives minus what weight 1 gives, or is refused
signs          the sign of a weight is the sign of its adapter, or negative weights are refused
absent         an adapter of weight 0 is not there; weights 0 alone give 0
bounded        for weights [1, -0.999, ...] the norm is at most 4 sums of the adapters' norms
bank           a bank gives what the list of its adapters gives
idempotent     equal adapters whose weights sum to 1 give that adapter
permutation    the order of (adapter, weight, id) does not matter
gauge          (u G, G^-1 v) is the same adapter
certificate    the distance to the exact weighted sum is at most what `certificate` says
jit            jitted is eager
sharded        sharded over 8 devices is on one
gradient       the gradient with respect to weights and factors is finite, and not zero
difference     that gradient is the derivative: central differences in float64 agree
memory         no array is as large as a quarter of a dense delta, at a site of 4096 x 4096
=============  =================================================================================
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

from jlora.system import System
from jlora.types import Dynamic

# reasons that several records of `breaks` share
TRIMMED = "small elements are trimmed"
DROPPED = "elements are dropped at random"
BLIND_VOTE = "PEFT's vote does not see weights"
AS_WRITTEN = "the factors are merged as they are written"
SUMMED_APART = "factors are summed apart: N copies of weight 1/N give N times one"
FLAT = "the spectrum is flattened"
SMALL_ENTRIES = "small entries are trimmed"
UNITS = "units are clustered as they are: minus one is not the mirror image of it"
HELD = "by the factors: the singular bases are held fixed (by the weights it is exact)"

LAWS = (
    "weight_one",
    "minus_one",
    "signs",
    "absent",
    "bounded",
    "bank",
    "idempotent",
    "permutation",
    "gauge",
    "certificate",
    "jit",
    "sharded",
    "gradient",
    "difference",
    "memory",
    "dtypes",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merging(System):
    """A merging method. The laws are checked with `options`; `breaks` names broken ones."""

    laws: ClassVar[tuple[str, ...]] = tuple(LAWS)
    suite: ClassVar[tuple[str, ...]] = ("tests/merging/engine/laws_test.py",)

    function: Callable[..., Dynamic]  # of one site and slice, or of whole Deltas
    scope: str = "site"  # "site": fn(LowRank, weights) -> LowRank; "adapter": of Deltas
    size: int | None = None  # the number of adapters it takes; None: any
    randomised: bool = False  # a site's function takes `keys` [N], an adapter's `key`
    loop: str = "vmap"  # "map": slices one after the other, to bound the memory
    options: Mapping[str, Dynamic] = dataclasses.field(default_factory=dict)  # for the laws
    certificate: Callable[..., Dynamic] | None = None  # (bank, weights, **options) -> error bound
    tight: bool = False  # the certificate is the error itself
    rule: Callable[..., Dynamic] | None = None  # element-wise: (bank, weights, **options) -> `Rule`
    by_outputs: bool = False  # the rule is of the transposed bank: its blocks are outputs
    signed: bool = True  # negative weights have a meaning; else they are refused
    capped: bool = True  # an option `rank` beyond a site's min(d_in, d_out) means full rank there
    atol: float = 1e-4  # of the laws, relative to the norm of the inputs

    def __post_init__(self):
        System.__post_init__(self)
        if self.scope not in ("site", "adapter"):
            raise ValueError(f"{self.name}: scope: got {self.scope!r}, expected site or adapter")
