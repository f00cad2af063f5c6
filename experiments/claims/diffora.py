r"""DiffoRA on base L: LoRA on the half of the kernels that it keeps, against all at half the rank.

==========  ======================================================================================
t           one of the four kinds of text of `decoder_layers`, 48 rows of each to train on
x_st        test loss of kind t with LoRA of rank r on 21 of the 42 kernels of base L, those of the
            largest logits
y_st        the same with rank r / 2 on all: as many trained numbers but for the kernels' sizes
z_st        control: rank r on 21 kernels by chance, mean of two draws
==========  ======================================================================================

.. math:: x_{st} < y_{st}

Recorded too: the kernels that are kept.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.claims import decoder_layers as lib
from experiments.claims.protocol import Claim, Figures
from experiments.variant_study.continuation import KINDS
from jlora.schedules import diffora

RANK, DRAWS = 8, 2


def slope(alpha: jax.Array, adapter: jl.Adapter, places: Any, training: Any, validation: Any):
    """The first-order gradient of the relaxed matrix."""
    del training
    return diffora.slope(alpha, adapter, places, validation)


def shown(adapter: jl.Adapter, alpha: jax.Array, places: Any) -> jl.Adapter:
    """The adapter whose deltas are weighted by the relaxed matrix."""
    return diffora.weighted(adapter, diffora.matrix(alpha), places)


def run(seed: int, workdir: Any) -> Figures:
    """Test loss of each kind of text, one seed."""
    adapter, thin = lib.fresh(RANK, seed), lib.fresh(RANK // 2, seed)
    places: Any = diffora.modules(adapter)
    size = 1 + max(n for numbers in places.values() for n in numbers)
    sides, more, share = ([], [], []), {}, []
    for kind, name in enumerate(KINDS):
        logits = lib.search(adapter, places, kind, seed, slope, shown)
        chosen = np.asarray(diffora.flexora.select(jnp.asarray(logits), size // 2))
        share.append(chosen)
        loss, rate = lib.tuned(lib.kept(adapter, chosen, places), kind, seed)
        uniform, rate_of_all = lib.tuned(thin, kind, seed)
        draws = [lib.at_random(size, size // 2, d, kind, seed) for d in range(DRAWS)]
        chance = [lib.tuned(lib.kept(adapter, m, places), kind, seed)[0] for m in draws]
        for side, value in zip(sides, (loss, uniform, float(np.mean(chance))), strict=True):
            side.append(value)
        more |= {f"{name}: rate": rate, f"{name}: rate of all kernels": rate_of_all}
    for path, numbers in places.items():
        values = np.mean(share, axis=0)[list(numbers)]
        more[f"share of kinds and layers that train {path.split('/')[-2]}"] = float(values.mean())
    names = ("kept", "all kernels", "by chance")
    more |= {f"{n}: loss": float(np.mean(side)) for n, side in zip(names, sides, strict=True)}
    return Figures(KINDS, *(tuple(side) for side in sides), more=more)


CLAIM = Claim(
    name="diffora",
    systems=("DiffoRA",),
    statement=f"test loss with {lib.ROWS} training rows of a kind of text: LoRA of rank {RANK} on "
    f"the half of base L's kernels that DiffoRA keeps < rank {RANK // 2} on all",
    reference="Jiang 2025, 2502.08905: choosing modules is better than adapting all",
    baseline=f"LoRA of rank {RANK // 2} on all kernels of base L",
    control=f"LoRA of rank {RANK} on half of the kernels by chance, mean of {DRAWS} draws",
    unit="loss",
    assets=lib.ASSETS,
    run=run,
    less_is_better=True,
)
