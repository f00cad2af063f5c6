"""AdaMerging: coefficients per layer by the entropy of unlabelled rows, against the tuned sum."""

import functools

from experiments.claims import learned_merges, text_merges

CLAIM = text_merges.claim(
    name="adamerging",
    systems=("AdaMerging",),
    method="adamerging",
    reference="Yang 2023, 2310.02575: better than task arithmetic, without labels",
)._replace(run=functools.partial(learned_merges.unlabelled, "adamerging"))
