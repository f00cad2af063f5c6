"""CART: cut around the mean of the adapters, against the tuned sum of deltas."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="cart",
    systems=("cart",),
    method="cart",
    reference="Choi 2024, 2412.12153: better than task arithmetic",
)
