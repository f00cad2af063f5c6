"""Adapter soups: the mean of two runs of one task against one of them."""

import jax

from experiments.claims import text_merges
from jlora import merging
from jlora.generation.baselines import soup as soups


def soup(adapters, weights, key):
    """The exact weighted sum, as `delta_soups` forms it for a bank; nothing is random (`key`)."""
    bank = merging.gather(adapters)
    rank = 2 * next(iter(bank.bank.values()))[0].shape[-1]
    made = soups.delta_soups(bank.bank, weights[None], rank).deltas
    return merging.to_adapter(jax.tree.map(lambda x: x[0], made), bank.sites)


CLAIM = text_merges.claim(
    name="soups",
    systems=("Adapter soups",),
    method="soup",
    reference="Wortsman 2022, 2203.05482: averaging fine-tuned models of one task improves them",
    merge=soup,
    baseline=text_merges.SINGLE,
    kind="copies",
)
