r"""Flexora on base L: LoRA on the half of the layers that it selects, against LoRA on all.

==========  ======================================================================================
t           one of the four kinds of text of `decoder_layers`, 48 rows of each to train on
x_st        test loss of kind t with LoRA on the 3 of 6 layers that the unrolled gradient selects
y_st        the same with LoRA of the same rank on all layers
z_st        control: on 3 layers by chance, mean of two draws
==========  ======================================================================================

.. math:: x_{st} < y_{st}

Recorded too: which layers are selected, by the first-order gradient as well.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.claims import decoder_layers as lib
from experiments.claims.protocol import Claim, Figures
from experiments.variant_study.continuation import KINDS
from jlora.schedules import flexora

RANK, DRAWS = 8, 2


def unrolled(alpha: jax.Array, adapter: jl.Adapter, places: Any, training: Any, validation: Any):
    """The gradient through one step of training."""
    return flexora.unrolled(alpha, adapter, places, training, validation, lib.RATE)


def first_order(alpha: jax.Array, adapter: jl.Adapter, places: Any, training: Any, validation: Any):
    """The gradient at the factors as they are."""
    del training
    return flexora.first_order(alpha, adapter, places, validation)


def run(seed: int, workdir: Any) -> Figures:
    """Test loss of each kind of text, one seed."""
    adapter = lib.fresh(RANK, seed)
    layers = {site.path: tuple(range(site.stack[0])) for site, _ in adapter.sites}
    size = flexora.count(layers)
    half = size // 2
    sides, more, share = ([], [], []), {}, {"unrolled": [], "first order": []}
    for kind, name in enumerate(KINDS):
        chosen = {}
        for way, slope in (("unrolled", unrolled), ("first order", first_order)):
            alpha = lib.search(adapter, layers, kind, seed, slope, flexora.weighted)
            chosen[way] = np.asarray(flexora.select(jnp.asarray(alpha), half))
            share[way].append(chosen[way])
        loss, rate = lib.tuned(lib.kept(adapter, chosen["unrolled"], layers), kind, seed)
        whole, rate_of_all = lib.tuned(adapter, kind, seed)
        draws = [lib.at_random(size, half, d, kind, seed) for d in range(DRAWS)]
        chance = [lib.tuned(lib.kept(adapter, m, layers), kind, seed)[0] for m in draws]
        for side, value in zip(sides, (loss, whole, float(np.mean(chance))), strict=True):
            side.append(value)
        more |= {f"{name}: rate": rate, f"{name}: rate of all layers": rate_of_all}
    for way, picked in share.items():
        for layer, value in enumerate(np.mean(picked, axis=0)):
            more[f"{way}: share of kinds that train layer {layer}"] = float(value)
    names = ("selected", "all layers", "by chance")
    more |= {f"{n}: loss": float(np.mean(side)) for n, side in zip(names, sides, strict=True)}
    return Figures(KINDS, *(tuple(side) for side in sides), more=more)


CLAIM = Claim(
    name="flexora",
    systems=("Flexora",),
    statement=f"test loss with {lib.ROWS} training rows of a kind of text: LoRA of rank {RANK} on "
    "the 3 of 6 layers of base L that Flexora selects < LoRA on all of them",
    reference="Wei 2024, 2408.10774: selecting layers is better than training all",
    baseline=f"LoRA of rank {RANK} on all 6 layers",
    control=f"LoRA on 3 layers by chance, mean of {DRAWS} draws",
    unit="loss",
    assets=lib.ASSETS,
    run=run,
    less_is_better=True,
)
