"""Task arithmetic: the sum of deltas with a tuned factor against their plain mean."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="task_arithmetic",
    systems=("task_arithmetic",),
    method="task_arithmetic",
    reference="Ilharco 2022, 2212.04089: a factor chosen on held-out data beats averaging",
    baseline=text_merges.AVERAGE,
)
