"""Rows of the table of merges: methods on the elements of dW, and PEFT's merges of factors.

Each row is the arguments of `table.Merging`. Those that are streamed run slice by slice.

.. math:: \\text{row} \\mapsto (\\text{name}, f, \\text{laws that } f \\text{ breaks, with reasons})

Source: our reading.
Deviates: nothing.
"""

from collections.abc import Callable
from typing import Any

from jlora.merging.elementwise.breadcrumbs import (
    breadcrumbs,
    breadcrumbs_rule,
    breadcrumbs_ties,
    breadcrumbs_ties_rule,
)
from jlora.merging.elementwise.consensus import consensus, consensus_rule
from jlora.merging.elementwise.dare import dare_linear, dare_linear_rule, dare_ties, dare_ties_rule
from jlora.merging.elementwise.della import della, della_linear, della_linear_rule, della_rule
from jlora.merging.elementwise.magnitude import magnitude, magnitude_rule
from jlora.merging.elementwise.model_stock import model_stock
from jlora.merging.elementwise.sce import sce, sce_rule
from jlora.merging.elementwise.task_arithmetic import task_arithmetic
from jlora.merging.elementwise.ties import ties, ties_rule
from jlora.merging.exact.concat import concat_error
from jlora.merging.peft.factors import (
    peft_cat,
    peft_dare_linear,
    peft_dare_ties,
    peft_linear,
    peft_magnitude_prune,
    peft_ties,
)
from jlora.merging.peft.svd import (
    peft_dare_linear_svd,
    peft_dare_ties_svd,
    peft_magnitude_prune_svd,
    peft_svd,
    peft_svd_error,
    peft_ties_svd,
)

TRIMMED = "small elements are trimmed"
DROPPED = "elements are dropped at random"
CROSSED = "factors are summed apart: N copies of weight 1/N give N times one"
GAUGE = "the factors are merged as they are written"
SHARED = "PEFT divides by the number of adapters that agree: N copies of weight 1/N give 1/N of one"
VOTE = {"signs": "PEFT's vote does not see weights", "absent": "PEFT's vote does not see weights"}
CUT = "ranks beyond an adapter's are cut off: what they add to the derivative is left out"
DELLA, CRUMBS = "Deep 2024, 2406.11617", "Davari 2023, 2312.06795"
DARE = "Yu 2023, 2311.03099"
PEFT = "Mangrulkar 2022, PEFT 0.21.2"
FACTOR_TESTS = ("tests/merging/peft/factors_test.py", "tests/merging/peft/peft_torch_test.py")
SVD_TESTS = ("tests/merging/peft/svd_test.py", "tests/merging/peft/peft_torch_test.py")
NUMPY = "dense numpy value, limits, the paper's claim in small; law suite"


def _streamed(
    name: str, function: Callable[..., Any], rule: Callable[..., Any], paper: str, why: str,
    **more: Any,
) -> Any:  # fmt: skip
    """A streamed method that is not the identity on one adapter, nor on equal ones."""
    base = {"loop": "map", "options": {"density": 0.5}, "evidence": NUMPY, "rule": rule,
            "breaks": {"weight_one": why, "idempotent": why}}  # fmt: skip
    return {"name": name, "function": function, "paper": paper, **base, **more}


def _factor(
    name: str, function: Callable[..., Any], why: str, vote: Any = None, **more: Any
) -> Any:
    breaks = {"idempotent": CROSSED, "gauge": GAUGE} | ({"weight_one": why} if why else {})
    breaks |= vote or {}
    base = {"paper": PEFT, "kind": "composition", "breaks": breaks, "tests": FACTOR_TESTS,
            "evidence": "PEFT's bits on its own models; numpy value"}  # fmt: skip
    return {"name": name, "function": function, **base, **more}


def _peft_svd(name: str, function: Callable[..., Any], breaks: Any, **more: Any) -> Any:
    breaks = breaks | ({} if "certificate" in more else {"difference": CUT})
    base = {"paper": PEFT, "kind": "composition", "loop": "map", "breaks": breaks,
            "tests": SVD_TESTS, "evidence": "PEFT's product on its own models"}  # fmt: skip
    return {"name": name, "function": function, **base, **more}


HALF = {"density": 0.5}
ROWS: tuple[dict[str, Any], ...] = (
    {
        "name": "task_arithmetic",
        "function": task_arithmetic,
        "paper": "Ilharco 2022, 2212.04089",
        "certificate": concat_error,
        "tight": True,
        "evidence": "numpy value; negation and analogy; law suite",
    },
    _streamed("ties", ties, ties_rule, "Yadav 2023, 2306.01708", TRIMMED),
    _streamed(
        "magnitude", magnitude, magnitude_rule, "Yadav 2023, 2306.01708 (trimming alone)", TRIMMED
    ),
    _streamed("dare_linear", dare_linear, dare_linear_rule, DARE, DROPPED, randomised=True),
    _streamed("dare_ties", dare_ties, dare_ties_rule, DARE, DROPPED, randomised=True),
    _streamed("della", della, della_rule, DELLA, DROPPED, randomised=True, by_outputs=True),
    _streamed(
        "della_linear",
        della_linear,
        della_linear_rule,
        DELLA,
        DROPPED,
        randomised=True,
        by_outputs=True,
    ),
    _streamed("breadcrumbs", breadcrumbs, breadcrumbs_rule, CRUMBS, TRIMMED),
    _streamed("breadcrumbs_ties", breadcrumbs_ties, breadcrumbs_ties_rule, CRUMBS, TRIMMED),
    _streamed(
        "sce", sce, sce_rule, "Wan 2024, 2408.07990", "elements that do not vary are not selected"
    ),
    _streamed(
        "consensus",
        consensus,
        consensus_rule,
        "Wang 2024, 2405.07813",
        "",
        options={"least": 1},
        breaks={},
    ),
    {
        "name": "model_stock",
        "function": model_stock,
        "paper": "Jang 2024, 2403.19522",
        "breaks": {"signs": "the ratio is that of the adapters as they were trained"},
        "evidence": NUMPY,
    },
    _factor("peft_linear", peft_linear, ""),
    _factor("peft_cat", peft_cat, "", breaks={}),
    _factor("peft_magnitude_prune", peft_magnitude_prune, TRIMMED, options=HALF),
    _factor("peft_ties", peft_ties, TRIMMED, VOTE, options=HALF),
    _factor("peft_dare_linear", peft_dare_linear, DROPPED, options=HALF, randomised=True),
    _factor("peft_dare_ties", peft_dare_ties, DROPPED, VOTE, options=HALF, randomised=True),
    _peft_svd("peft_svd", peft_svd, {}, certificate=peft_svd_error, tight=True),
    _peft_svd(
        "peft_magnitude_prune_svd",
        peft_magnitude_prune_svd,
        {"weight_one": TRIMMED, "idempotent": TRIMMED},
        options=HALF,
    ),
    _peft_svd(
        "peft_ties_svd",
        peft_ties_svd,
        {"weight_one": TRIMMED, "idempotent": SHARED, **VOTE},
        options=HALF,
    ),
    _peft_svd(
        "peft_dare_linear_svd",
        peft_dare_linear_svd,
        {"weight_one": DROPPED, "idempotent": DROPPED},
        options=HALF,
        randomised=True,
    ),
    _peft_svd(
        "peft_dare_ties_svd",
        peft_dare_ties_svd,
        {"weight_one": DROPPED, "idempotent": SHARED, **VOTE},
        options=HALF,
        randomised=True,
    ),
)
