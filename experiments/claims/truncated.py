"""The sum cut to one adapter's rank costs at most a point."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="truncated",
    systems=("truncated",),
    method="truncated",
    reference="Eckart 1936: the best approximation of that rank",
    options={"rank": 4},
    margin=-0.01,
)
