"""Model Stock: two runs of one task, interpolated by their angle, against their mean."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="model_stock",
    systems=("model_stock",),
    method="model_stock",
    reference="Jang 2024, 2403.19522: two fine-tuned models, better than averaging",
    kind="copies",
    baseline=text_merges.AVERAGE,
)
