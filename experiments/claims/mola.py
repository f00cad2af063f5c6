r"""MoLA: more experts in the upper layers than in the lower ones, at equal total, on base L.

==========  ======================================================================================
N_l         experts of layer l of 6, all on the seven kernels of the layer, two per token
t           one of the eight kinds of text of `decoder_domains`, in rows that turn from kind to kind
x_st        held-out loss of kind t with N = (2, 2, 3, 3, 4, 4)
y_st        the same with N = (3, 3, 3, 3, 3, 3)
z_st        control: x with every router shuffled, so that each expert speaks for the next
==========  ======================================================================================

.. math:: x_{st} < y_{st}

Recorded too: (4, 4, 3, 3, 2, 2), and one LoRA of about as many trained numbers. Each has a rate of
its own, chosen on validation rows.
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
from jlora.methods import Experts

RANK, TOP, BALANCE, MOST = 4, 2, 1e-2, 4
RATES = (1e-3, 3e-3, 9e-3)
COUNTS = {"rising": (2, 2, 3, 3, 4, 4), "even": (3,) * 6, "falling": (4, 4, 3, 3, 2, 2)}
LORA = 14  # rank with about as many trained numbers as three experts and their router


def start(name: str, seed: int) -> jl.Adapter:
    """An allocation of experts, or "LoRA", before training."""
    if name == "LoRA":
        return lib.fresh(jl.LoRA(LORA, alpha=float(LORA)), seed)
    method = Experts(MOST, TOP, RANK, alpha=float(RANK), counts=COUNTS[name])
    return lib.fresh(method, seed)


def shuffled(adapter: jl.Adapter) -> jl.Adapter:
    """The control: in each layer, what decides for an expert decides for the next one there is."""

    def turned(path: str, router: jax.Array) -> jax.Array:
        layers = zip(router, np.asarray(adapter.frozen[path]["count"]).reshape(-1), strict=True)
        return jnp.stack([jnp.concatenate([jnp.roll(r[:, :n], 1, axis=-1), r[:, n:]], axis=-1)
                          for r, n in layers])  # fmt: skip

    trainable = {path: {k: turned(path, x) if k == "router" else x for k, x in arrays.items()}
                 for path, arrays in adapter.trainable.items()}  # fmt: skip
    return adapter.replace(trainable=trainable)


def trained(name: str, rate: float, seed: int) -> jl.Adapter:
    """An allocation after training on rows of all kinds."""
    return lib.train(start(name, seed), rate, seed, balance=BALANCE)


@functools.cache
def rate_of(name: str) -> float:
    """The rate of the lowest loss on validation rows."""
    few = domains.world().validation
    return lib.best(RATES, lambda r: lib.measured(trained(name, r, lib.TUNING), few).mean())


def run(seed: int, workdir: Any) -> Figures:
    """Held-out loss of each kind of text, one seed."""
    at, loss, more = domains.world().test, {}, {}
    for name in (*COUNTS, "LoRA"):
        adapter = trained(name, rate_of(name), seed)
        loss[name] = lib.by_kind(lib.measured(adapter, at), at)
        if name == "rising":
            loss["shuffled"] = lib.by_kind(lib.measured(shuffled(adapter), at), at)
        numbers = sum(x.size for x in jax.tree.leaves(adapter.trainable))
        if name != "LoRA":  # experts that are not there are zeros without gradient
            numbers = int(numbers * sum(COUNTS[name]) / (MOST * len(COUNTS[name])))
        more |= {f"{name}: rate": rate_of(name), f"{name}: trained numbers": numbers}
    more |= {f"{name}: loss": float(x.mean()) for name, x in loss.items()}
    sides = (tuple(loss[name].tolist()) for name in ("rising", "even", "shuffled"))
    return Figures(domains.NAMES, *sides, more=more)


CLAIM = Claim(
    name="mola",
    systems=("Experts",),
    statement=f"held-out loss of {len(domains.NAMES)} kinds of text after {lib.STEPS} steps of "
    f"base L on rows of several kinds: {COUNTS['rising']} experts in its six layers < 3 in each",
    reference="Gao 2024, 2402.08562: the inverted triangle is better than the rectangle",
    baseline="3 experts in each layer",
    control="the trained adapter with its routers shuffled",
    unit="loss",
    assets=domains.ASSETS,
    run=run,
    less_is_better=True,
)
