"""LoraHub: adapters of other tasks composed for a new one by a search without gradients."""

import functools

from experiments.claims import learned_merges, text_merges
from experiments.claims.protocol import Claim
from jlora.merging.learned import lorahub


def compose(loss, adapters, batch, key):
    """Coefficients of factors by 40 evaluations."""
    return lorahub.lorahub(loss, adapters, batch, key, budget=40).adapter


CLAIM = Claim(
    name="lorahub",
    systems=("LoraHub", "factor_mix"),
    statement="accuracy on a new task from 12 labelled rows: LoraHub > mean of the seven adapters",
    reference="Huang 2023, 2307.13269: a few examples of an unseen task are enough to compose",
    baseline="the mean of the adapters, its factor chosen on the same rows",
    control="the labels of the rows exchanged",
    unit="accuracy",
    assets=text_merges.ASSETS,
    run=functools.partial(learned_merges.few_shot, compose),
)
