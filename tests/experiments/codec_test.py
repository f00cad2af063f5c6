"""Stage `codec`: the generator's latents against a singular value decomposition in numpy."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.pipeline import Context
from experiments.stages import codec


@pytest.fixture(scope="module")
def fitted(tiny_world, tiny_encoded, tmp_path_factory):
    """The generator's codec, fitted and read back, and its folder."""
    folder = tmp_path_factory.mktemp("codec")
    context = Context(tiny_world.config, folder)
    piece = codec.pieces(context, tiny_encoded)[0]
    assert piece.path == "generator"

    class Count:
        steps = 0

        def step(self, count, **shown):
            self.steps += count

    bar = Count()
    piece.make(folder, bar)
    assert bar.steps == piece.size == 1
    name, settings = codec.codec_config(tiny_world.config, "generator", len(tiny_encoded.x))
    like = codec.codec.template(name, settings, *tiny_encoded.x.shape[1:])
    state = jax.tree.map(jnp.asarray, codec.load_tree(folder / "generator", like))
    norm = codec._normaliser(tiny_encoded, "generator")
    return folder, codec.Fitted(norm, state)


def test_latents_decode_to_the_best_subspace_of_each_token(fitted, tiny_world, tiny_encoded):
    """Without whitening the PCA codec is a projection: numpy's truncated SVD, token by token."""
    coded = tiny_encoded._replace(fitted={"generator": fitted[1]}, kinds={"generator": "pca"})
    z = codec.latents(coded, "generator")
    keep = tiny_world.config.latent
    assert z.shape == (len(coded.x), coded.spec.length, keep)
    back = np.stack([codec.decode("pca", fitted[1], one) for one in z])
    x = coded.x.astype(np.float64)
    for token in range(coded.spec.length):
        mean = x[:, token].mean(0)
        u, s, v = np.linalg.svd(x[:, token] - mean, full_matrices=False)
        want = mean + (u[:, :keep] * s[:keep]) @ v[:keep]
        np.testing.assert_allclose(back[:, token], want, atol=1e-5)
        assert np.abs(back[:, token] - x[:, token]).max() > 1e-3  # three numbers do not hold all


def test_each_variant_is_normalised_as_its_paper_says(tiny_encoded):
    x = tiny_encoded.x.astype(np.float64)
    whole = np.asarray(codec._normalised(
        tiny_encoded, codec._normaliser(tiny_encoded, "pdiff_global"), "pdiff_global"
    ))  # fmt: skip
    own = np.asarray(codec._normalised(
        tiny_encoded, codec._normaliser(tiny_encoded, "pdiff_task"), "pdiff_task"
    ))  # fmt: skip
    real = np.broadcast_to(tiny_encoded.spec.mask, x.shape)
    want = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    np.testing.assert_allclose(whole[real], want[real], atol=1e-3)
    for task in range(len(tiny_encoded.names)):
        rows = tiny_encoded.task == task
        np.testing.assert_allclose(own[rows].mean(0), 0, atol=1e-4)  # the task's mean is lost
        assert np.abs(whole[rows].mean(0)).max() > 0.1


def test_a_curve_is_kept_with_its_codec(tiny_world, tiny_encoded, tmp_path, bar, monkeypatch):
    """A run that was killed between two codecs lost the curve of the first."""
    small = codec.codec.by_name("token_ae").config(latent=3, steps=2)  # for the paper's
    monkeypatch.setattr(codec, "codec_config", lambda config, variant, rows: ("token_ae", small))
    pieces = codec.pieces(Context(tiny_world.config, tmp_path), tiny_encoded)
    assert [p.path for p in pieces] == ["generator", "pdiff_global", "pdiff_task"]
    pieces[1].make(tmp_path, bar)
    curve = json.loads(Path(tmp_path / "curves_pdiff_global.json").read_text())["pdiff_global"]
    assert len(curve) == bar.count == pieces[1].size == 2 and np.isfinite(curve).all()
    assert (tmp_path / "pdiff_global").is_dir()


def test_an_empty_bank_is_refused(tiny_encoded):
    empty = jax.tree.map(lambda x: x[None][:0], tiny_encoded.template.trainable)
    with pytest.raises(codec.StageError, match="an empty bank"):
        codec.bank(tiny_encoded, empty)
