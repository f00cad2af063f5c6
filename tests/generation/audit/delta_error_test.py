"""Delta terms: dense numpy agrees, also where the textbook form cancels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.audit import delta_error
from jlora.generation.audit.delta_error import DeltaView
from jlora.generation.tokens import normalise
from jlora.generation.tokens import site_tokens as tokens

RNG = np.random.default_rng(0)
FULL = {
    "p": {"a": (2, 7, 3), "b": (2, 3, 5)},
    "q": {"a": (4, 3), "b": (3, 8)},
}


def tree(scale=1.0):
    draw = lambda s: jnp.asarray(scale * RNG.normal(size=s).astype("f4"))  # noqa: E731
    return {k: {n: draw(s) for n, s in v.items()} for k, v in FULL.items()}


def dense(x):
    """Deltas of a tree in the order of its tokens, float64."""
    out = []
    for site in (x["p"], x["q"]):
        delta = np.asarray(site["a"], "f8") @ np.asarray(site["b"], "f8")
        out += list(delta) if delta.ndim == 3 else [delta]
    return out


def expected(x_hat, x):
    pairs = list(zip(dense(x_hat), dense(x), strict=True))
    return (
        [np.sum((h - d) ** 2) for h, d in pairs],
        [np.sum(h * d) for h, d in pairs],
        [np.sum(d * d) for _, d in pairs],
        [np.sum(h * h) for h, _ in pairs],
    )


@pytest.mark.parametrize("step", [1.0, 1e-4])
def test_against_dense_numpy(step):
    x, move = tree(), tree(step)
    x_hat = jax.tree.map(jnp.add, x, move)
    spec = tokens.from_tree(x)
    t_hat, t = tokens.tokenise(spec, x_hat), tokens.tokenise(spec, x)
    got = jax.jit(delta_error.delta_terms)(DeltaView(spec), t_hat, t)
    for have, want in zip(got, expected(x_hat, x), strict=True):
        np.testing.assert_allclose(have, want, rtol=2e-3)
    if step < 1e-3:  # mutation: the textbook form has lost the error to cancellation
        textbook = got.norm - 2 * got.inner + got.norm_hat
        assert np.any(np.abs(textbook - got.error) > 0.05 * got.error)


def test_frozen_a_and_normaliser():
    """Normalised tokens of b alone, with A frozen: the same deltas."""
    x, x_hat = tree(), tree()
    frozen = {k: {"a": v["a"]} for k, v in x.items()}
    only = [{k: {"b": v["b"]} for k, v in t.items()} for t in (x_hat, x)]
    spec = tokens.from_tree(only[0])
    t_hat, t = (tokens.tokenise(spec, o) for o in only)
    zoo = jnp.stack([t_hat, t, 3 * t])
    norm = normalise.fit("site_rms", zoo, mask=spec.mask, types=spec.types)
    view = DeltaView(spec, norm, frozen)
    got = jax.jit(delta_error.delta_terms)(
        view, normalise.apply(norm, t_hat), normalise.apply(norm, t)
    )
    same_a = {k: {"a": x[k]["a"], "b": x_hat[k]["b"]} for k in x}
    for have, want in zip(got, expected(same_a, x), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4)
    by_task = normalise.fit("task", zoo, tasks=np.array([0, 0, 1]))
    with pytest.raises(ValueError, match="requires a task id"):
        delta_error.delta_terms(DeltaView(spec, by_task, frozen), t_hat, t)


def test_no_dense_delta():
    x = tree()
    spec = tokens.from_tree(x)
    t = tokens.tokenise(spec, x)
    text = str(
        jax.make_jaxpr(
            jax.grad(lambda h: delta_error.delta_terms(DeltaView(spec), h, t).error.sum())
        )(t)
    )
    assert "7,5]" not in text and "4,8]" not in text


def test_without_a_view_tokens_are_deltas():
    x_hat, x = (jnp.asarray(RNG.normal(size=(3, 5)).astype("f4")) for _ in range(2))
    got = delta_error.delta_terms(None, x_hat, x)
    np.testing.assert_allclose(got.error, np.sum((x_hat - x) ** 2, 1), rtol=1e-5)
    np.testing.assert_allclose(got.inner, np.sum(x_hat * x, 1), rtol=1e-4)
