"""Stage `denoiser`: what the generator stands on is computed from the zoo's latents exactly."""

import numpy as np
import pytest

from experiments.pipeline import Context
from experiments.stages import codec, conditions, denoiser
from jlora.generation.generators import prior


@pytest.fixture(scope="module")
def fixed(tiny_world, tiny_encoded):
    """(computed parts, the choice of the prior, latents [n, S, L])."""
    data = codec.jnp.asarray(tiny_encoded.x)
    norm = codec._normaliser(tiny_encoded, "generator")
    name, settings = codec.codec_config(tiny_world.config, "generator", len(data))
    rows = codec._normalised(tiny_encoded, norm, "generator")
    state, _ = codec.codec.by_name(name).fit(denoiser.jax.random.key(0), rows, settings)
    fitted = codec.Fitted(norm, state)
    encoded = tiny_encoded._replace(fitted={"generator": fitted}, kinds={"generator": name})
    return *denoiser.fixed_parts(tiny_world, encoded), np.asarray(
        codec.latents(encoded, "generator")
    )


def test_prior_plus_scaled_residual_is_the_latent(fixed, tiny_world, tiny_encoded):
    parts, choice, z = fixed
    raw = conditions.canonical(tiny_world, tiny_encoded.names)
    cond = conditions.scaled(parts.stats, denoiser.jnp.asarray(raw))
    means = np.stack([prior.mean(parts.prior, choice.kernel, c, False) for c in cond])
    back = means[np.asarray(parts.task)] + np.asarray(parts.scale)[None] * parts.residual
    np.testing.assert_allclose(back, z, atol=1e-4)
    np.testing.assert_allclose((np.asarray(parts.residual) ** 2).mean((0, 2)), 1, rtol=1e-3)
    soups = np.stack([z[tiny_encoded.task == k].mean(0) for k in range(len(tiny_encoded.names))])
    np.testing.assert_allclose(parts.prior.values, soups, atol=1e-5)


def test_held_out_tasks_are_not_in_the_table_of_training(fixed, tiny_world, tiny_encoded):
    parts, _, _ = fixed
    count = len(tiny_encoded.names) + len(tiny_world.pool)
    assert parts.table.members.shape[0] == count
    held = {t.name for t in tiny_world.tasks if t.level != "seen"}
    texts = set(np.asarray(parts.table.members).ravel().tolist())
    for name in held & {t.name for t in tiny_world.tasks if t.level == "unseen_corpus"}:
        assert not texts & set(tiny_world.rows[name, "train"].index.tolist())


def test_the_three_models_are_pieces_of_their_steps(fixed, tiny_world, tmp_path):
    config = tiny_world.config
    parts, choice, _ = fixed
    prepared = denoiser.Prepared(parts, choice, lambda *a: a)
    pieces = denoiser.pieces(Context(config, tmp_path), prepared)
    assert {p.path: p.size for p in pieces} == {
        "generator": config.steps + config.task_steps,
        "pdiff_global": config.pdiff_steps,
        "pdiff_task": config.pdiff_steps,
    }
