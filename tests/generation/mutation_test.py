"""The tests of generation can fail: a piece broken on purpose, and a test seen to notice."""

import jax
import jax.numpy as jnp
import pytest

from jlora.generation.audit import metrics as audit
from jlora.generation.baselines import nearest, ridge, soup, span
from jlora.generation.codecs import conv as codec_conv
from jlora.generation.codecs import pca as codec_pca
from jlora.generation.codecs import token as codec_token
from jlora.generation.diffusion import ema, guidance, loss, samplers
from jlora.generation.tokens import normalise
from jlora.generation.tokens import site_tokens as tokens
from tests.doubles import load


def times(factor):
    """A function whose result (leaf by leaf) is wrong by a factor."""

    def mutant(right):
        return lambda *a, **k: jax.tree.map(lambda x: x * factor, right(*a, **k))

    return mutant


def instead(other):
    return lambda right: other


def backwards(right):
    return lambda *a, **k: jnp.flip(right(*a, **k), 0)


# (module, its broken piece, how, a test of the module, its arguments)
BROKEN = [
    (audit, "novelty_ratio", times(1.1), "novelty_of_a_copy_is_zero_and_of_a_new_seed_is_one", ()),
    (audit, "affine_residual", times(1.1), "soup_distance_and_affine_residual_match_dense", ()),
    (audit, "effective_rank", times(1.2), "effective_rank_counts_directions", ()),
    (codec_conv, "instance_norm", instead(lambda x: x), "layers_against_torch", ()),
    (codec_pca, "decode", times(1.1), "unwhitened_latent_errors_are_weight_errors", ()),
    (codec_token, "losses", times(1.01), "loss_against_numpy", ()),
    (ema, "averaged", times(0.9), "average_is_the_corrected_recursion_of_the_parameters", ()),
    (
        guidance,
        "combine",
        instead(lambda c, n, s: c + s * (c - n)),
        "combine_is_the_extrapolation",
        (),
    ),
    (
        loss,
        "weight",
        instead(lambda objective, t: jnp.ones_like(t)),
        "min_snr_weighs_the_x0_error_alike_in_every_kind",
        ("cosine", "v"),
    ),
    (loss, "draw_times", times(1.05), "times_follow_their_law", ()),
    (nearest, "similarity", times(-1.0), "similarities_match_numpy", ()),
    (nearest, "leave_out", instead(lambda s, groups: s), "leave_out_excludes_the_whole_task", ()),
    (normalise, "invert", times(1.01), "invert_is_the_inverse", ("site_rms",)),
    (
        ridge,
        "residual_map",
        instead(lambda p, groups: p),
        "prediction_and_leave_one_task_out_match_a_refit_loop",
        ("kernel",),
    ),
    (
        samplers,
        "ddim_step",
        instead(lambda path, eta, x0, eps, t, s, noise: x0),
        "ddim_with_eta_one_is_the_ddpm_posterior",
        ("cosine",),
    ),
    (
        samplers,
        "flow_step",
        instead(lambda path, z, slope, t, s: z),
        "euler_is_ddim_without_noise",
        ("cosine",),
    ),
    (soup, "task_weights", times(2.0), "task_weights_average_each_task", ()),
    (span, "affine_weights", times(0.9), "projection_matches_least_squares", ()),
    (tokens, "tokenise", backwards, "layout_against_numpy", ()),
    (tokens, "detokenise", times(2.0), "exact_inverse_over_a_bank", ()),
]


@pytest.fixture(autouse=True)
def uncached():
    jax.clear_caches()  # compiled programs know nothing of the broken piece, or nothing else
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("module", "piece", "how", "test", "args"),
    BROKEN,
    ids=[f"{row[0].__name__.rsplit('.', 1)[-1]}.{row[1]}" for row in BROKEN],
)
def test_a_broken_piece_is_noticed(monkeypatch, module, piece, how, test, args):
    right = getattr(module, piece)
    monkeypatch.setattr(module, piece, how(right))
    tests = load(module.__name__.rsplit(".", 1)[-1], "generation")
    monkeypatch.setattr(tests, piece, how(right), raising=False)  # where it was imported by name
    with pytest.raises(AssertionError):
        getattr(tests, f"test_{test}")(*(tests.KERNELS[0] if a == "kernel" else a for a in args))
