"""The table of merges: one row a method; the law suite, the registry and `merge` read it.

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

Source: our reading.
Deviates: nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jlora.merging.engine import elementwise_rows as elementwise
from jlora.merging.exact.concat import concat, concat_error
from jlora.merging.exact.karcher import karcher
from jlora.merging.exact.slerp import multislerp, nuslerp, slerp
from jlora.merging.exact.truncated import truncated, truncation_error
from jlora.merging.learned.do_merging import decoupled, do_merging
from jlora.merging.learned.lorahub import factor_mix
from jlora.merging.spectral.cart import cart
from jlora.merging.spectral.core_space import merge_core
from jlora.merging.spectral.iso import iso_c, iso_cts
from jlora.merging.spectral.knots import knots
from jlora.merging.spectral.lego import lego, lego_spectral
from jlora.merging.spectral.lion import lion, lion_orthogonal
from jlora.merging.spectral.robust_merge import robust_merge
from jlora.merging.spectral.tsv import tsv
from jlora.merging.spectral.wudi import wudi

MERGEKIT = "Goddard 2024, 2403.13257 (mergekit)"
TRIMMED = "small entries are trimmed"
EQUAL = "singular vectors of equal (padded: zero) singular values"
UNITS = "units are clustered as they are: minus one is not the mirror image of it"
FLATTENED = "the spectrum is flattened"
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


@dataclasses.dataclass(frozen=True)
class Merging:
    """A row of the table. The laws are checked with `options`; `breaks` names broken ones."""

    name: str  # what `jl.merging.merge` calls it
    function: Callable[..., Any]  # of one site and slice, or of whole Deltas
    paper: str  # first author, year, arXiv number
    kind: str = "mechanism"  # own mechanism, composition of others, or recipe
    scope: str = "site"  # "site": fn(LowRank, weights) -> LowRank; "adapter": of Deltas
    size: int | None = None  # the number of adapters it takes; None: any
    randomised: bool = False  # a site's function takes `keys` [N], an adapter's `key`
    loop: str = "vmap"  # "map": slices one after the other, to bound the memory
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for the laws
    certificate: Callable[..., Any] | None = None  # (bank, weights, **options) -> error bound
    tight: bool = False  # the certificate is the error itself
    rule: Callable[..., Any] | None = None  # element-wise: (bank, weights, **options) -> `Rule`
    by_outputs: bool = False  # the rule is of the transposed bank: its blocks are outputs
    signed: bool = True  # negative weights have a meaning; else they are refused
    capped: bool = True  # an option `rank` beyond a site's min(d_in, d_out) means full rank there
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
    Merging(
        "concat",
        concat,
        "Prabhakar 2024, 2410.13025; Wang 2024, 2409.05976",
        certificate=concat_error,
        tight=True,
    ),
    Merging(
        "truncated",
        truncated,
        "Eckart 1936 (textbook)",
        options={"rank": 4},
        certificate=truncation_error,
        tight=True,
        evidence="exact error against dense SVD; vmapped over weights and rank",
    ),
    Merging("slerp", slerp, MERGEKIT, size=2),
    Merging("nuslerp", nuslerp, MERGEKIT, size=2, tests=("tests/merging/exact/slerp_test.py",)),
    Merging("multislerp", multislerp, MERGEKIT, tests=("tests/merging/exact/slerp_test.py",)),
    Merging("karcher", karcher, MERGEKIT, evidence="stationarity of the mean; law suite"),
    # --- spectral, in the core space ---
    Merging(
        "knots",
        knots,
        "Stoica 2024, 2410.19735",
        options={"density": 0.2},
        breaks={"weight_one": TRIMMED, "idempotent": TRIMMED, "difference": HELD},
    ),
    Merging(
        "core_space",
        merge_core,
        "Panariello 2025; Yadav 2023, 2306.01708",
        options={"density": 0.2},
        breaks={"weight_one": TRIMMED, "difference": HELD},
    ),
    Merging(
        "tsv",
        tsv,
        "Gargiulo 2025, 2412.00081",
        breaks={"idempotent": "equal directions are made orthogonal: N copies give 1/N of one"},
    ),
    Merging(
        "iso_c",
        iso_c,
        "Marczak 2025, 2502.04959",
        breaks={"weight_one": FLATTENED, "idempotent": FLATTENED},
        tests=("tests/merging/spectral/iso_test.py",),
    ),
    Merging(
        "iso_cts",
        iso_cts,
        "Marczak 2025, 2502.04959",
        breaks={"weight_one": FLATTENED, "idempotent": FLATTENED},
        tests=("tests/merging/spectral/iso_test.py",),
    ),
    Merging(
        "wudi",
        wudi,
        "Cheng 2025, 2503.08099",
        atol=1e-3,
        breaks={"bounded": "opposite demands on nearly the same inputs have a large exact answer"},
        evidence="minimum of its loss against least squares; law suite",
    ),
    Merging(
        "cart",
        cart,
        "Choi 2024, 2412.12153",
        options={"rank": 2, "scale": 0.5},
    ),
    Merging(
        "robust_merge",
        robust_merge,
        "Zeng 2025, 2502.17159",
        options={"density": 0.5},
        breaks={
            "weight_one": TRIMMED,
            "idempotent": "the second factor is averaged: N copies give 1/N of one",
            "difference": HELD,
        },
    ),
    # --- elementwise and factor space ---
    *(Merging(**row) for row in elementwise.ROWS),
    # --- systems and learned ---
    Merging(
        "do_merging",
        do_merging,
        "Zheng 2025, 2505.15875",
        breaks={"idempotent": "equal adapters overlap, and are pushed apart"},
        evidence="descent and decoupling by dense numpy; a loud adapter keeps no direction",
    ),
    Merging(
        "do_decoupled",
        decoupled,
        "Zheng 2025, 2505.15875",
        evidence="numpy value; the direction does not see the scale of an adapter",
    ),
    Merging(
        "lego",
        lego,
        "Zhao 2024, 2409.16167",
        capped=False,
        breaks={"gauge": "units are columns of the factors as they are written", "signs": UNITS},
        evidence="loops by numpy; shuffled copies are one adapter; K = pool is the sum",
    ),
    Merging(
        "lego_spectral",
        lego_spectral,
        "Zhao 2024, 2409.16167",
        capped=False,
        breaks={"gradient": EQUAL, "difference": EQUAL, "signs": UNITS},
        evidence="as lego, on units without gauge",
    ),
    Merging(
        "lion",
        lion,
        "Zhang 2025, 2507.05678",
        evidence="norms and overlaps by numpy; a weak adapter is heard",
    ),
    Merging(
        "lion_orthogonal",
        lion_orthogonal,
        "Zhang 2025, 2507.05678",
        breaks={"idempotent": "equal adapters have no orthogonal frame"},
        evidence="frame by numpy; linear in each amplitude alone",
    ),
    Merging(
        "factor_mix",
        factor_mix,
        "Huang 2023, 2307.13269",
        signed=False,
        breaks={"gauge": "factors are summed as they are written"},
        tests=("tests/merging/learned/lorahub_test.py",),
    ),
)

METHODS: dict[str, Merging] = {row.name: row for row in ROWS}
