"""Uni-LoRA: an isometry from one vector to all factors, and what that vector learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora as jl
from jlora.methods.shared_basis.unilora import UniLoRA

METHOD = UniLoRA(rank=2, size=24)
PARAMS = {
    "up": jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 12)) / 3, jnp.float32),
    "down": jnp.asarray(np.random.default_rng(1).normal(size=(2, 12, 8)) / 3, jnp.float32),
}
X = jnp.asarray(np.random.default_rng(2).normal(size=(3, 8)), jnp.float32)


def model(p, x):
    return lax.scan(lambda h, w: (h @ w["up"] @ w["down"], None), x, p)[0]


def adapter(seed=0, method=METHOD):
    made = jl.init(jax.random.key(seed), model, PARAMS, X, methods={"up|down": method})
    rng = np.random.default_rng(seed + 3)
    move = lambda t: t + jnp.asarray(rng.normal(size=t.shape), t.dtype)  # noqa: E731
    return made.replace(trainable=jax.tree.map(move, made.trainable))


def projection(made, d=24):
    """P [D, d]: row k has the scale of entry k in the column that entry k takes from theta."""
    rows = []
    for name in ("up", "down"):
        for k in "ab":
            index = np.asarray(made.frozen[name][f"index_{k}"]).reshape(-1)
            scale = np.asarray(made.frozen[name][f"scale_{k}"], np.float64).reshape(-1)
            block = np.zeros((index.size, d))
            block[np.arange(index.size), index] = scale
            rows.append(block)
    return np.concatenate(rows)


@pytest.mark.parametrize("size", [24, 23])
def test_the_map_is_a_balanced_isometry(size):
    p = projection(adapter(method=UniLoRA(rank=2, size=size)), size)
    assert p.shape == (2 * 2 * (8 + 12) * 2, size)
    np.testing.assert_allclose(p.T @ p, np.eye(size), atol=1e-6)
    uses = (p > 0).sum(0)
    assert uses.max() - uses.min() <= 1


def test_value(bench):
    made = bench.noisy(UniLoRA(rank=2, size=7))
    p, theta = bench.numbers(made), np.asarray(made.trainable["*0"]["theta"], np.float64)
    a = theta[p["index_a"].astype(int)] * p["scale_a"]
    b = theta[p["index_b"].astype(int)] * p["scale_b"]
    bench.agree(made, bench.w + a @ b)


def by_hand(made):
    """The sum of the outputs and theta's gradient through P, in float64."""
    theta, x = np.asarray(made.trainable["*0"]["theta"], np.float64), np.asarray(X, np.float64)
    steps = []
    for i in range(2):
        for name in ("up", "down"):
            f = {k: np.asarray(t[i]) for k, t in made.frozen[name].items()}
            a, b = (theta[f[f"index_{k}"]] * f[f"scale_{k}"] for k in "ab")
            steps.append((x, f, a, b, np.asarray(PARAMS[name][i], np.float64) + a @ b))
            x = x @ steps[-1][-1]
    g, total = np.ones_like(x), np.zeros_like(theta)
    for h, f, a, b, w in steps[::-1]:
        dw = h.T @ g
        np.add.at(total, f["index_a"], (dw @ b.T) * f["scale_a"])
        np.add.at(total, f["index_b"], (a.T @ dw) * f["scale_b"])
        g = g @ w.T
    return (x.sum(), total)


def test_theta_learns_from_all_sites_and_layers():
    made = adapter()
    assert made.size == 24

    def loss(trainable):
        return jnp.sum(jl.lift(model)(PARAMS, made.replace(trainable=trainable), X))

    value, grads = jax.jit(jax.value_and_grad(loss))(made.trainable)
    want, total = by_hand(made)
    np.testing.assert_allclose(value, want, rtol=1e-3)
    np.testing.assert_allclose(grads["*0"]["theta"], total, rtol=1e-3, atol=1e-3)


def test_mutation_an_assignment_that_is_not_balanced_is_seen(monkeypatch):
    def same(key, n):
        return jnp.zeros(n, jnp.int32)

    monkeypatch.setattr(jax.random, "permutation", same)
    p = projection(adapter())
    assert not np.allclose(p.T @ p, np.eye(24), atol=1e-3)


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"UniLoRA.size: got 1000 for 160 entries"):
        adapter(method=UniLoRA(rank=2, size=1000))
    with pytest.raises(ValueError, match=r"UniLoRA.rank: got 0"):
        UniLoRA(rank=0)
