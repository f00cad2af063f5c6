"""Defaults are what the papers and the official codes use, as the docstrings say."""

import inspect

import pytest

from jlora.federated.fed_sb import bases
from jlora.federated.hetlora import pruned_rank
from jlora.federated.lora_fair import lora_fair
from jlora.merging.elementwise.breadcrumbs import breadcrumbs_rule, breadcrumbs_ties_rule
from jlora.merging.elementwise.consensus import consensus_rule
from jlora.merging.elementwise.della import della_linear, della_rule
from jlora.merging.elementwise.magnitude import magnitude_rule
from jlora.merging.elementwise.sce import sce_rule
from jlora.merging.exact.karcher import karcher
from jlora.merging.exact.lcm_arithmetic import lcm_arithmetic
from jlora.merging.learned.adamerging import adamerging
from jlora.merging.learned.do_merging import do_merging
from jlora.merging.learned.lorahub import lorahub, lorahub_gradient
from jlora.merging.peft.factors import peft_dare_linear, peft_magnitude_prune, peft_ties
from jlora.merging.peft.svd import peft_dare_ties_svd, peft_ties_svd
from jlora.merging.spectral.cart import cart
from jlora.merging.spectral.core_space import merge_core
from jlora.merging.spectral.iso import iso_cts
from jlora.merging.spectral.knots import knots
from jlora.merging.spectral.lego import lego
from jlora.merging.spectral.robust_merge import robust_merge

DEFAULTS = [
    (knots, {"rule": "ties", "density": 0.2, "scale": 1.0}),
    (merge_core, {"rule": "ties", "density": 0.2, "scale": 1.0}),
    (iso_cts, {"common": 0.8}),
    (cart, {"rank": None, "scale": 1.0}),
    (robust_merge, {"density": 0.2, "floor": 0.8}),
    (karcher, {"steps": 10}),
    (magnitude_rule, {"density": 0.2, "scale": 1.0}),
    (della_rule, {"density": 0.5, "epsilon": 0.15, "vote": "sum", "normalize": True}),
    (della_linear, {"density": 0.5, "epsilon": 0.15, "scale": 1.0}),
    (breadcrumbs_rule, {"density": 0.85, "gamma": 0.01, "scale": 1.0}),
    (breadcrumbs_ties_rule, {"density": 0.85, "gamma": 0.01, "scale": 1.0}),
    (sce_rule, {"density": 0.1, "scale": 1.0}),
    (consensus_rule, {"sharpness": 0.4, "least": 2, "scale": 1.0}),
    (peft_magnitude_prune, {"density": 0.5}),
    (peft_ties, {"density": 0.5, "vote": "total"}),
    (peft_dare_linear, {"density": 0.5}),
    (peft_ties_svd, {"density": 0.5, "vote": "total"}),
    (peft_dare_ties_svd, {"density": 0.5, "vote": "total"}),
    (do_merging, {"steps": 100, "rate": 0.5, "gamma": 0.01}),
    (lego, {"units": "factors", "reweight": True, "norm": "l2", "steps": 10}),
    (adamerging, {"layerwise": True, "start": 0.3, "rate": 1e-3}),
    (lorahub, {"budget": 40, "space": "factors", "bound": 1.5, "l1": 0.05, "sigma": 0.5}),
    (lorahub_gradient, {"space": "deltas", "bound": 1.5, "l1": 0.05}),
    (lcm_arithmetic, {"style": 0.8, "strength": 1.0}),
    (lora_fair, {"similarity": "cos", "penalty": 0.01}),
    (pruned_rank, {"gamma": 0.99}),
    (bases, {"eta": 1.0}),
]


@pytest.mark.parametrize("function, expected", DEFAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_defaults(function, expected):
    known = inspect.signature(function).parameters
    assert {name: known[name].default for name in expected} == expected
