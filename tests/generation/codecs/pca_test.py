"""PCA codec: sklearn agrees, n - 1 components lose nothing, latents have unit scale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA

from jlora.generation.codecs import pca as codec_pca
from jlora.generation.codecs.pca import PCAConfig

N, T, D = 10, 3, 24
KEY = jax.random.key(0)


def zoo(seed=0, n=N):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, T, D)) * np.geomspace(3, 0.3, D) + 1).astype("f4")


def run(config, x=None):
    x = jnp.asarray(zoo() if x is None else x)
    state, info = codec_pca.fit(KEY, x, config)
    z = jax.vmap(codec_pca.encode, (None, 0))(state, x)
    return state, info, z, np.asarray(jax.vmap(codec_pca.decode, (None, 0))(state, z))


@pytest.mark.parametrize("solver", ["svd", "gram"])
def test_against_sklearn(solver):
    _, info, z, back = run(PCAConfig(components=4, solver=solver))
    assert z.shape == (N, T, 4) and back.shape == (N, T, D)
    for t in range(T):
        oracle = PCA(4).fit(zoo()[:, t].astype("f8"))
        latent = oracle.transform(zoo()[:, t].astype("f8"))
        np.testing.assert_allclose(back[:, t], oracle.inverse_transform(latent), atol=1e-4)
        latent /= latent.std(0)
        sign = np.sign((latent * z[:, t]).sum(0))
        np.testing.assert_allclose(z[:, t], latent * sign, atol=1e-4)
        np.testing.assert_allclose(
            info.explained[t], oracle.explained_variance_ratio_.sum(), rtol=1e-4
        )


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("whiten", [False, True])
def test_lossless_at_n_minus_one(joint, whiten):
    config = PCAConfig(components=N - 1, joint=joint, length=3 if joint else 1, whiten=whiten)
    _, info, z, back = run(config)
    np.testing.assert_allclose(back, zoo(), atol=2e-5)
    np.testing.assert_allclose(info.total, 1, atol=1e-5)
    assert z.shape == ((N, 3, 3) if joint else (N, T, N - 1))
    np.testing.assert_allclose(np.mean(np.square(z)), 1, rtol=1e-4)
    if whiten:
        np.testing.assert_allclose(np.mean(np.square(z), 0), 1, rtol=1e-3)
    # Mutation: one component fewer is seen.
    config = dataclasses.replace(config, components=N - 2, length=1)
    assert np.abs(run(config)[-1] - zoo()).max() > 1e-2


def test_unwhitened_latent_errors_are_weight_errors():
    state, _, z, back = run(PCAConfig(components=5, joint=True, whiten=False))
    moved = codec_pca.decode(state, z[0] + 0.1)
    got = np.sum((np.asarray(moved) - back[0]) ** 2)
    np.testing.assert_allclose(got, 5 * (0.1 * float(state.scale[0, 0])) ** 2, rtol=1e-3)


def test_floor_and_constant_tokens():
    x = zoo()
    x[:, 1] = x[0, 1]
    _, info, z, back = run(PCAConfig(components=N), x)  # the n-th component has no energy
    np.testing.assert_allclose(back, x, atol=2e-5)
    assert np.all(np.isfinite(z)) and np.abs(z[:, 1]).max() < 0.5
    np.testing.assert_allclose(info.total, 1, rtol=1e-5)


def test_decode_is_affine_and_differentiable():
    state, _, z, _ = run(PCAConfig(components=4))
    jac = jax.jacobian(codec_pca.decode, argnums=1)(state, z[0])
    moved = codec_pca.decode(state, z[1]) - codec_pca.decode(state, z[0])
    np.testing.assert_allclose(jnp.einsum("tdsl,sl->td", jac, z[1] - z[0]), moved, atol=1e-4)


def test_errors():
    x = jnp.asarray(zoo())
    with pytest.raises(ValueError, match=r"components: got 11, expected 1 .. min"):
        codec_pca.fit(KEY, x, PCAConfig(components=11))
    with pytest.raises(ValueError, match="length 2 does not divide 5"):
        codec_pca.fit(KEY, x, PCAConfig(components=5, joint=True, length=2))
    with pytest.raises(ValueError, match="unknown solver 'lanczos'"):
        codec_pca.fit(KEY, x, PCAConfig(components=5, solver="lanczos"))
    with pytest.raises(ValueError, match=r"adapters \[3\] of 10"):
        codec_pca.fit(KEY, x.at[3, 0, 0].set(jnp.nan), PCAConfig(components=5))
