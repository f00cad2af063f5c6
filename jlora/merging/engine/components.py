"""What belongs to merging and is no row of its table: conversion, diagnostics, aggregations, ...

The registry reads `OTHERS`; rows of `table.ROWS` are in it by themselves. The tests of a row are
those of its module, unless it names others.

Source: our reading.
Deviates: nothing.
"""

from typing import NamedTuple


class Other(NamedTuple):
    """A row of the registry."""

    name: str  # "Conversion to LoRA"
    paper: str  # first author, year, arXiv number
    module: str  # "jlora.merging.convert"
    symbol: str  # what the module exports for it
    evidence: str  # what has been measured about it
    kind: str = "mechanism"  # own mechanism, composition of others, or recipe
    tests: tuple[str, ...] = ()  # tests/merging/<module>_test.py if empty


OTHERS: tuple[Other, ...] = (
    Other(
        "Safe spectral functions",
        "Daleckii 1965 (textbook)",
        "jlora.merging.engine.spectral_functions",
        "spectral",
        "derivatives against differences at repeated and zero singular values",
    ),
    Other(
        "Conversion to LoRA",
        "Eckart 1936 (textbook)",
        "jlora.merging.convert",
        "to_lora",
        "exact certificate by rank, energy and error; least total rank; one dense slice at a time",
    ),
    Other(
        "Interference diagnostics",
        "Yadav 2023, 2306.01708; Hu 2021, 2106.09685",
        "jlora.merging.diagnostics",
        "sign_conflict",
        "signs and overlaps by dense numpy; landmarks; mutation check",
    ),
    Other(
        "Merge by configuration, python -m jlora.merge",
        "Goddard 2024, 2403.13257 (mergekit)",
        "jlora.cli.merge.main",
        "main",
        "PEFT, Orbax and merged weights by numpy; tables and convolutions: PEFT's logits; "
        "failures leave nothing half-written",
        "composition",
        (
            "tests/cli/merge/main_test.py",
            "tests/cli/merge/config_test.py",
            "tests/cli/merge/layout_test.py",
            "tests/cli/merge/peft_files_test.py",
            "tests/cli/merge/torch_test.py",
        ),
    ),
    Other(
        "Duplicates, clusters and retrieval in a bank",
        "textbook",
        "jlora.retrieval.banks",
        "cluster",
        "clusters against scipy; gauge-free duplicates; retrieval by numpy",
    ),
    Other(
        "Coefficients by gradient",
        "Yang 2023, 2310.02575",
        "jlora.merging.learned.coefficients",
        "learn",
        "derivatives against differences and dense merging; no dense product; recovers the truth",
    ),
    Other(
        "LoraHub",
        "Huang 2023, 2307.13269",
        "jlora.merging.learned.lorahub",
        "lorahub",
        "objective by numpy; five examples beat every single adapter and the average",
    ),
    Other(
        "LoraHub by gradient",
        "Huang 2023, 2307.13269",
        "jlora.merging.learned.lorahub",
        "lorahub_gradient",
        "as LoraHub; the factor space is flat at its start",
        kind="composition",
    ),
    Other(
        "CMA-ES",
        "Hansen 2016, 1604.00772",
        "jlora.merging.learned.cma",
        "minimise",
        "bottom of a valley of condition 1000; corner of a box; mutation check",
        tests=("tests/merging/learned/lorahub_test.py",),
    ),
    Other(
        "AdaMerging",
        "Yang 2023, 2310.02575",
        "jlora.merging.learned.adamerging",
        "adamerging",
        "entropy by numpy; accuracy of three toy tasks without labels; mutation check",
    ),
    Other(
        "PSEC",
        "Liu 2025, 2502.05932",
        "jlora.compose.psec",
        "compose",
        "merged weights row by row; parameters compose what outputs cannot; mutation check",
    ),
    Other(
        "AutoLoRA: retrieval",
        "2025, 2508.02107",
        "jlora.retrieval.weight_encoder",
        "encode",
        "tokens by numpy; no gauge; unseen adapters found by text; mutation check",
    ),
    Other(
        "AutoLoRA: gated fusion",
        "2025, 2508.02107",
        "jlora.compose.gated_fusion",
        "gated",
        "gates by numpy; open gates are the plain sum; learns to leave adapters out",
        tests=("tests/retrieval/weight_encoder_test.py",),
    ),
    Other(
        "LCM-LoRA arithmetic",
        "Luo 2023, 2311.05556",
        "jlora.merging.exact.lcm_arithmetic",
        "lcm_arithmetic",
        "dense sum; fewer steps of a styled linear flow; mutation check",
        kind="composition",
    ),
)
