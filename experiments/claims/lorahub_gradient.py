"""LoraHub by gradient: coefficients of deltas for a new task, against the tuned mean."""

import functools

import jax
import jax.numpy as jnp

from experiments.claims import learned_merges, text_merges
from experiments.claims.protocol import Claim
from jlora.merging.learned import lorahub


def compose(loss, adapters, batch, key):
    """Coefficients of deltas by 30 steps on the same rows; nothing is random (`key`)."""
    batches = jax.tree.map(lambda x: jnp.broadcast_to(x, (30, *x.shape)), batch)
    return lorahub.lorahub_gradient(loss, adapters, batches).adapter


CLAIM = Claim(
    name="lorahub_gradient",
    systems=("LoraHub by gradient",),
    statement="accuracy on a new task from 12 labelled rows: by gradient > mean of the others",
    reference="Huang 2023, 2307.13269, with gradients: a few examples are enough to compose",
    baseline="the mean of the adapters, its factor chosen on the same rows",
    control="the labels of the rows exchanged",
    unit="accuracy",
    assets=text_merges.ASSETS,
    run=functools.partial(learned_merges.few_shot, compose),
)
