"""How layers are read and written, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.generators import layer_reading

L, M, D, C = 2, 7, 5, 3


@functools.cache
def texts():
    """(features [N, L, m], embeddings [N, d], derivatives [L, d, d])."""
    rng = np.random.default_rng(0)
    f = 1.0 + rng.normal(size=(60, L, M)) * np.asarray([1.0, 3.0])[:, None]
    e = f[:, 1] @ rng.normal(size=(M, D)) + 0.3 * rng.normal(size=(60, D))
    return f, e, np.eye(D) + 0.3 * rng.normal(size=(L, D, D))


@functools.cache
def read():
    """Their reading."""
    return layer_reading.reading(*texts())


def test_the_embedding_is_read_from_the_last_layer():
    f, e, _ = texts()
    assert read().size[1] > 2 * read().size[0] > 0
    embedding, x = layer_reading.seen(read(), jnp.asarray(f, "f4"), 0.25)
    length = np.sqrt(np.sum((e - e.mean(0)) ** 2, 1).mean())
    last = f[:, 1] - f[:, 1].mean(0)
    plain = last @ np.linalg.lstsq(last, (e - e.mean(0)) / length, rcond=None)[0]
    np.testing.assert_allclose(embedding, plain, atol=5e-3)
    assert np.abs(np.asarray(embedding) - plain).max() > 1e-5, "the ridge is there"
    assert x.shape == (60, D + L * M)
    np.testing.assert_allclose(
        np.sum(np.asarray(x)[:, D : D + M] ** 2, 1).mean(), 0.25**2, rtol=1e-4
    )


def test_what_is_written_is_turned_into_what_is_meant():
    _, _, j = texts()
    turned = np.asarray(read().turn, "f8") @ np.swapaxes(j, 1, 2)  # V J^T of the unit vectors
    assert np.abs(turned - np.eye(D)).max() < 0.2
    for k in range(L):
        small = 1e-2 * np.trace(j[k] @ j[k].T) / D
        want = np.linalg.inv(j[k] @ j[k].T + small * np.eye(D)) @ j[k]
        np.testing.assert_allclose(read().turn[k], want, rtol=1e-4, atol=1e-5)


def test_factors_add_the_scores_in_the_place_of_the_bases_own():
    f, e, _ = texts()
    rng = np.random.default_rng(2)
    share, w = 0.5, rng.normal(size=(D + L * M, C))
    centre, heads = rng.normal(size=D + L * M), np.linalg.qr(rng.normal(size=(D, C)))[0].T
    plain = read()._replace(turn=jnp.broadcast_to(jnp.eye(D), (L, D, D)))
    given = [jnp.asarray(t, "f4") for t in (w, centre, heads)]
    a, b = (np.asarray(t, "f8") for t in FACTORS(plain, share, *given))
    mean = f.mean(0)
    on = f * (np.sum(mean**2, 1) / np.sum(f * mean, 2))[:, :, None]  # where the constant is 1
    got = sum(on[:, k] @ a[k] @ b[k] for k in range(L)) @ heads.T
    _, x = layer_reading.seen(plain, jnp.asarray(on, "f4"), share)
    x = np.asarray(x, "f8")
    own = (e.mean(0) + float(plain.length) * x[:, :D]) @ heads.T  # of the base, as f says it
    want = (x - centre) @ w - own
    want -= want.mean(1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
    # Mutations: the base's own part that stays, and a centre that is not taken off, would be seen.
    for other in ((x - centre) @ w, x @ w - own):
        assert np.abs(got - (other - other.mean(1, keepdims=True))).max() > 0.1


FACTORS = jax.jit(layer_reading.factors)


def test_texts_that_cannot_be_read_are_refused():
    f, e, j = texts()
    with pytest.raises(ValueError, match="got NaN or infinity"):
        layer_reading.reading(f * np.nan, e, j)
    with pytest.raises(ValueError, match="the same for every text"):
        layer_reading.reading(np.ones_like(f), e, j)
