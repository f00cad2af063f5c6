"""LaMDA++: ranks by the spectrum of each weight are no worse than one rank for all."""

import functools

import numpy as np
import optax

import jlora as jl
from experiments.claims import text_methods as lib
from jlora.methods import LaMDA
from jlora.optimizers.gradual_freeze import gradual_freeze

LEVELS = (8, 12, 20, 24)  # the mean is the rank of the baseline


def solver(rate):
    """Adam, the rows of B frozen over the first 0.3 of all steps."""
    return optax.chain(optax.adam(rate), gradual_freeze(round(0.3 * lib.STEPS)))


def by_spectrum(adapter, params, levels):
    """Matrices of concentrated weights get the first of the levels."""
    found = jl.inits.spectral_ranks(adapter, params, sorted(levels))
    turned = dict(zip(sorted(levels), levels, strict=True))
    ranks = {path: np.vectorize(turned.get)(at) for path, at in found.items()}
    return jl.inits.cut(adapter, ranks)


def recipe(name, rank, change=None):
    """LaMDA on the attention kernels."""
    method = LaMDA(rank=rank, alpha=float(rank))
    return lib.on_attention(name, method, 3e-3, solver=solver, change=change)


def allocated(name, levels):
    """The recipe whose ranks go by the spectrum, in the order of the levels."""
    return recipe(name, max(levels), functools.partial(by_spectrum, levels=levels))


CLAIM = lib.claim(
    name="lamda_pp",
    systems=("LaMDA++",),
    recipe=allocated("LaMDA++ of ranks 8 to 24", LEVELS),
    baseline=recipe("LaMDA of rank 16", 16),
    reference="Azizi 2024, 2406.12832: LaMDA++ is better than LaMDA at one budget",
    others=(allocated("ranks the other way round", LEVELS[::-1]),),
    parameters="at the same mean rank",
)
