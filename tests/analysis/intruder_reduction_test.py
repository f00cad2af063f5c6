"""Reduction: the equation by numpy, limits of the factor, ranks and scales that stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.analysis import intruder_reduction as lib

D, RANK, TOP = 36, 2, 4
RNG = np.random.default_rng(1)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(2, D, D)), jnp.float32)}
X = jnp.ones((3, D))


def model(p, x):
    return jax.lax.scan(lambda h, w: (h, h @ w), x, p["w"])[1]


@pytest.fixture(scope="module")
def adapter():
    """Layer 0: weak factors; layer 1: a strong one and a weak one."""
    a = jl.init(jax.random.key(0), model, PARAMS, X, methods={"w": jl.LoRA(RANK, alpha=4.0)})
    draw = lambda *s: RNG.normal(size=s).astype("f4")  # noqa: E731
    left, right = draw(2, D, RANK) * 0.05, draw(2, RANK, D) * 0.05
    left[1, :, 0] *= 20
    right[1, 0] *= 20
    return a.replace(trainable={"w": {"a": jnp.asarray(left), "b": jnp.asarray(right)}})


@pytest.fixture(scope="module")
def reduced():
    return jax.jit(lib.reduced, static_argnums=(2, 3, 4))


def by_numpy(adapter, factor):
    """dW_lambda of every layer, and the norms of what the rank cut off."""
    out, cut = [], []
    for layer in range(2):
        t = {k: np.asarray(v[layer], "f8") for k, v in adapter.trainable["w"].items()}
        w = np.asarray(PARAMS["w"][layer], "f8")
        after = w + float(adapter.frozen["w"]["scale"][layer]) * t["a"] @ t["b"]
        old, (u, s, v) = np.linalg.svd(w)[2], np.linalg.svd(after)
        for j in range(TOP):
            if np.abs(old @ v[j]).max() < 0.5:
                after = after + (factor - 1) * s[j] * np.outer(u[:, j], v[j])
        u, s, v = np.linalg.svd(after - w)
        out.append(u[:, :RANK] * s[:RANK] @ v[:RANK])
        cut.append(np.linalg.norm(s[RANK:]))
    return np.stack(out), np.asarray(cut)


def check(reduced, adapter, factor):
    got = reduced(PARAMS, adapter, factor, TOP, 0.5)
    want, cut = by_numpy(adapter, factor)
    np.testing.assert_allclose(jl.delta(PARAMS, got.adapter)["w"], want, atol=2e-4)
    np.testing.assert_allclose(got.cut["w"], cut, atol=2e-4)
    return got


def test_the_equation(reduced, adapter):
    got = check(reduced, adapter, 0.75)
    assert not got.seen["w"].flags[0].any() and int(got.seen["w"].flags[1].sum()) == 1
    (_, method), = got.adapter.sites  # fmt: skip
    assert method == jl.LoRA(RANK) and method.alpha == RANK
    np.testing.assert_array_equal(got.adapter.frozen["w"]["scale"], [1.0, 1.0])
    assert jax.tree.structure(got.adapter.trainable) == jax.tree.structure(adapter.trainable)


def test_mutation_the_other_sense_of_lambda(reduced, adapter):
    def other(params, adapter, factor, top, epsilon):
        return reduced(params, adapter, 1 - factor, top, epsilon)

    with pytest.raises(AssertionError):
        check(other, adapter, 0.75)


def test_one_changes_nothing_and_less_is_less(reduced, adapter):
    whole = reduced(PARAMS, adapter, 1.0, TOP, 0.5)
    np.testing.assert_allclose(
        jl.delta(PARAMS, whole.adapter)["w"], jl.delta(PARAMS, adapter)["w"], atol=2e-4
    )
    after = jl.merge(PARAMS, adapter)["w"]
    none = lib.scaled(PARAMS["w"], after, 0.0, TOP)
    u, s, v = (np.asarray(t[1, ..., 0] if k == "u" else t[1, 0]) for k, t in
               whole.seen["w"]._asdict().items() if k in "usv")  # fmt: skip
    assert s > 10 and abs(u @ np.asarray(none[1]) @ v) < 1e-3
    np.testing.assert_allclose(none[0], after[0], atol=1e-5)


def test_chosen_scales_any_direction(adapter):
    after = jl.merge(PARAMS, adapter)["w"]
    seen = lib.intruders(PARAMS["w"], after, TOP)
    flags = jnp.zeros((2, TOP), bool).at[:, 2].set(True)
    got = np.linalg.svd(lib.chosen(after, seen, flags, 0.5), compute_uv=False)
    want = np.linalg.svd(np.asarray(after, "f8"), compute_uv=False)
    want[:, 2] /= 2
    np.testing.assert_allclose(got, -np.sort(-want, axis=1), atol=1e-3)


def test_refusals(adapter):
    with pytest.raises(ValueError, match=r"factor: got 1.5, expected in \[0, 1\]"):
        lib.reduced(PARAMS, adapter, 1.5)
    (site, method), = adapter.sites  # fmt: skip

    class Closed(jl.LoRA):
        def of_factors(self, u, v):
            return None

    odd = adapter.replace(sites=((site, Closed(rank=method.rank)),))
    with pytest.raises(ValueError, match="expected a method of given factors"):
        lib.reduced(PARAMS, odd)
