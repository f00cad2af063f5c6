"""The protocol: every codec by name, its state through jit, its template."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.codecs import codec
from jlora.generation.codecs.pca import PCAConfig

T, D = 3, 20
SMALL = {
    "pca": {"components": 4},
    "token_ae": {"latent": 4, "width": 8, "depth": 1, "embed": 2},
    "conv_ae": {"enc_channels": (2,), "dec_channels": (2,)},
}
SHAPES = {"pca": (T, 4), "token_ae": (T, 4), "conv_ae": (12, 2)}


@pytest.mark.parametrize("name", SMALL)
def test_states_are_data_and_templates_fit(name):
    one = codec.by_name(name)
    config = one.config(**SMALL[name])
    state = one.init(jax.random.key(0), config, T, D)
    like = codec.template(name, config, T, D)
    assert jax.tree.structure(like) == jax.tree.structure(state)
    match = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, like, state)
    assert jax.tree.all(match)

    @jax.jit
    def round_trip(state, x):
        z = one.encode(state, x)
        return z, jax.value_and_grad(lambda z: jnp.sum(jnp.square(one.decode(state, z) - x)))(z)

    z, (value, grad) = round_trip(state, jnp.ones((T, D)))
    assert z.shape == SHAPES[name] == grad.shape
    assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_fit_by_name():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, T, D)).astype("f4"))
    one = codec.by_name("pca")
    config = PCAConfig(components=4)
    state, _ = one.fit(jax.random.key(0), x, config, view=None, callback=None, resume=None)
    assert jax.tree.structure(codec.template("pca", config, T, D)) == jax.tree.structure(state)
    np.testing.assert_allclose(one.decode(state, one.encode(state, x[0])), x[0], atol=1e-4)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"unknown codec 'vae', expected one of \('pca'"):
        codec.by_name("vae")
