r"""FlyLoRA merged: eight adapters that share a frozen sparse A lose less than eight of LoRA.

==========  ======================================================================================
t           one of the eight kinds of text of `decoder_domains`, an adapter of base L for each
own_t       held-out loss of kind t with its own adapter
c           factor on the merged delta, the best on validation rows, one per method and seed
merged_t    held-out loss of kind t with one adapter that is c times the mean of all eight
==========  ======================================================================================

.. math:: x_t = merged^{Fly}_t - own^{Fly}_t \; < \; y_t = merged^{LoRA}_t - own^{LoRA}_t

Adapters that share A are merged by the mean of their arrays, B and the balance of ranks; those of
LoRA by the exact mean of their deltas. The control takes the mean of all arrays too, of adapters of
FlyLoRA each of which drew an A of its own. Rates are chosen per method on validation rows of three
kinds.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.claims import decoder_domains as domains
from experiments.claims import decoder_training as lib
from experiments.claims.protocol import Claim, Figures
from jlora.methods import FlyLoRA

METHODS = {
    "FlyLoRA": FlyLoRA(32, 8, alpha=64.0),
    "LoRA": jl.LoRA(rank=32, alpha=32.0),
    "FlyLoRA, an A per kind": FlyLoRA(32, 8, alpha=64.0),
}
ALONE = "FlyLoRA, an A per kind"
RATES = {"FlyLoRA": (2e-3, 6e-3, 1.8e-2), "LoRA": (1e-3, 3e-3, 9e-3)}
TUNED_ON = 3  # kinds of text
FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # on the mean; 8 is the sum


def start(name: str, kind: int, seed: int) -> jl.Adapter:
    """An adapter before training; of `ALONE` each kind has a key of its own."""
    return lib.fresh(METHODS[name], 100 * seed + kind + 1 if name == ALONE else 100 * seed)


@functools.cache
def own(name: str, kind: int, rate: float, seed: int) -> jl.Adapter:
    """The adapter of one kind of text."""
    return lib.train(start(name, kind, seed), rate, seed, kind)


@functools.cache
def rate_of(name: str) -> float:
    """The rate of the lowest loss of the first kinds' own adapters on validation rows."""
    few = domains.world().validation

    def loss(rate: float) -> float:
        each = [lib.by_kind(lib.measured(own(name, d, rate, lib.TUNING), few), few)[d]
                for d in range(TUNED_ON)]  # fmt: skip
        return float(np.mean(each))

    return lib.best(RATES[name], loss)


def merged(name: str, every: list[jl.Adapter], factor: float) -> jl.Adapter:
    """`factor` times the mean of adapters.

    Args:
      name: key of METHODS: deltas of LoRA are averaged, arrays of FlyLoRA.
      every: an adapter per kind of text.
      factor: on the delta.
    """
    if name == "LoRA":
        weights = jnp.full(len(every), 1.0 / len(every), jnp.float32)
        mean = jl.merging.merge("concat", every, weights)
    else:
        mean = jax.tree.map(lambda *xs: jnp.stack(xs).mean(0), *every)
    frozen = {path: {k: x * jnp.float32(factor) if k == "scale" else x for k, x in arrays.items()}
              for path, arrays in mean.frozen.items()}  # fmt: skip
    return mean.replace(frozen=frozen)


def measured(name: str, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(own, merged) loss of each kind of text on test rows, and the factor."""
    world, kinds = domains.world(), range(len(domains.NAMES))
    rate = rate_of("FlyLoRA" if name == ALONE else name)
    every = [own(name, d, rate, seed) for d in kinds]
    factor = lib.best(
        FACTORS, lambda c: lib.measured(merged(name, every, c), world.validation).mean()
    )
    test = world.test
    apart = [lib.by_kind(lib.measured(a, test), test)[d] for d, a in enumerate(every)]
    together = lib.by_kind(lib.measured(merged(name, every, factor), test), test)
    return np.asarray(apart), together, factor


def run(seed: int, workdir: Any) -> Figures:
    """What each kind of text loses by the merge, one seed."""
    lost, more = {}, {}
    for name in METHODS:
        apart, together, factor = measured(name, seed)
        lost[name] = together - apart
        more |= {f"{name}: own loss": float(apart.mean()), f"{name}: factor": factor,
                 f"{name}: merged loss": float(together.mean())}  # fmt: skip
        if name != ALONE:
            more[f"{name}: rate"] = rate_of(name)
    at = domains.world().test
    more["base L: loss"] = float(lib.by_kind(domains.measured(None, at)[0], at).mean())
    return Figures(domains.NAMES, *(tuple(lost[n].tolist()) for n in METHODS), more=more)


CLAIM = Claim(
    name="flylora_merge",
    systems=("FlyLoRA",),
    statement=f"held-out loss of one adapter merged of {len(domains.NAMES)} kinds of text minus "
    "that of each kind's own: FlyLoRA with one frozen A < LoRA of the same rank",
    reference="Zou 2025, 2510.08396: adapters that share a sparse A merge with less loss",
    baseline="LoRA of rank 32, merged by the mean of deltas",
    control="FlyLoRA with an A per kind of text, merged by the mean of arrays as well",
    unit="loss minus own",
    assets=domains.ASSETS,
    run=run,
    less_is_better=True,
)
