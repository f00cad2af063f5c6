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
        "jlora.merging.spectral",
        "spectral",
        "derivatives against differences at repeated and zero singular values",
    ),
)
