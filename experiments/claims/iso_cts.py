"""Iso-CTS: common and task-specific directions, one singular value, against Iso-C."""

from experiments.claims import text_merges

CLAIM = text_merges.claim(
    name="iso_cts",
    systems=("iso_cts",),
    method="iso_cts",
    reference="Marczak 2025, 2502.04959: better than Iso-C with many tasks",
    options={"common": 0.8},
    baseline="iso_c",
)
