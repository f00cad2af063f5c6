"""Coefficients by gradient: derivatives, what a few examples recover, no dense delta."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.merging import gather
from jlora.merging.learned import coefficients as file
from jlora.merging.learned.coefficients import everywhere, learn, mixed, penalised


def leaf(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, jnp.float32)


PARAMS = {"up": leaf(9, 11), "down": leaf(2, 11, 11, seed=1)}
X = leaf(8, 9, seed=2)


def model(p, x):
    h = jnp.tanh(x @ p["up"])
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["down"])[0]


TUNED = jl.lift(model)


def adapter(seed, rank):
    a = jl.init(jax.random.key(seed), model, PARAMS, X, methods={"up|down": jl.LoRA(rank)})
    new = jax.tree.map(lambda t: leaf(*t.shape, seed=seed + 10), a.trainable)
    return a.replace(trainable=new)


ADAPTERS = [adapter(0, 2), adapter(1, 1), adapter(2, 2)]
TRUE = jnp.asarray([0.8, -0.4, 0.3])


def target(c):
    return model(jl.merge(PARAMS, mixed(gather(ADAPTERS), c)), X)


def loss(adapter, batch):
    x, y = batch
    return jnp.mean((TUNED(PARAMS, adapter, x) - y) ** 2)


def repeated(y, steps):
    return jax.tree.map(lambda t: jnp.broadcast_to(t, (steps, *t.shape)), (X, y))


def test_gradient_by_finite_differences_and_by_dense_merging():
    gathered, y = gather(ADAPTERS), target(TRUE)
    f = jax.jit(lambda c: penalised(loss, gathered, 0.1)(c, (X, y)))
    c, h = jnp.asarray([0.3, 0.2, -0.1]), 1e-2
    got = jax.grad(f)(c)
    numeric = [(f(c + h * e) - f(c - h * e)) / (2 * h) for e in jnp.eye(3)]
    np.testing.assert_allclose(got, np.asarray(numeric), rtol=2e-2, atol=1e-4)

    def dense(c):
        deltas = [jl.delta(PARAMS, a) for a in ADAPTERS]
        params = {k: w + sum(c[n] * d[k] for n, d in enumerate(deltas)) for k, w in PARAMS.items()}
        return jnp.mean((model(params, X) - y) ** 2) + 0.1 * jnp.mean(jnp.abs(c))

    np.testing.assert_allclose(f(c), dense(c), rtol=1e-4)
    np.testing.assert_allclose(got, jax.grad(dense)(c), rtol=1e-3, atol=1e-6)


def test_no_product_of_the_size_of_a_weight():
    gathered, y = gather(ADAPTERS), target(TRUE)
    made = jax.make_jaxpr(jax.grad(lambda c: penalised(loss, gathered, 0.0)(c, (X, y))))(TRUE)

    def dots(jaxpr):
        for e in jaxpr.eqns:
            if e.primitive.name == "dot_general":
                yield e.outvars[0].aval.shape
            for sub in jax.tree.leaves(e.params, is_leaf=lambda t: hasattr(t, "eqns")):
                inner = getattr(sub, "jaxpr", sub)
                if hasattr(inner, "eqns"):
                    yield from dots(inner)

    shapes = list(dots(made.jaxpr))
    assert len(shapes) > 10
    assert not [s for s in shapes if s[-2:] in {(9, 11), (11, 11)}]


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_few_examples_recover_the_coefficients(layerwise):
    gathered = gather(ADAPTERS)
    true = TRUE
    if layerwise:
        true = {
            "up": jnp.asarray([0.5, 0.2, 0.4]),
            "down": jnp.asarray([[0.2, 0.5], [0.4, 0.3], [0.3, 0.2]]),
        }
    start = everywhere(gathered, 1 / 3) if layerwise else gathered.weights
    run = jax.jit(lambda b: learn(loss, gathered, start, b, rate=3e-2))
    out = run(repeated(target(true), 300))
    assert float(out.values[-1]) < 1e-4 * float(out.values[0])
    chex.assert_trees_all_close(out.coefficients, true, atol=2e-2)
    merged = jl.merge(PARAMS, out.adapter)
    np.testing.assert_allclose(model(merged, X), target(true), atol=2e-2)


def test_bound_and_penalty():
    gathered = gather(ADAPTERS)
    data = repeated(target(3 * TRUE), 60)
    out = learn(loss, gathered, gathered.weights, data, rate=0.1, bound=0.5)
    assert np.abs(np.asarray(out.coefficients)).max() <= 0.5
    free = learn(loss, gathered, gathered.weights, data, rate=0.1)
    dear = learn(loss, gathered, gathered.weights, data, rate=0.1, l1=10.0)
    assert np.abs(np.asarray(dear.coefficients)).sum() < 0.3 * np.abs(
        np.asarray(free.coefficients)).sum()  # fmt: skip


def test_mutation_a_mix_that_ignores_the_coefficients(monkeypatch):
    monkeypatch.setattr(
        file, "mixed", lambda g, c, fn=None: jl.merging.to_adapter(
            jl.algebra.combine(g.bank, g.weights), g.sites))  # fmt: skip
    with pytest.raises(AssertionError):
        test_gradient_by_finite_differences_and_by_dense_merging()


@pytest.mark.parametrize("bad", [{"rate": 0.0}, {"l1": -1.0}, {"bound": 0.0}])
def test_refusals(bad):
    gathered = gather(ADAPTERS)
    with pytest.raises(ValueError, match="rate, l1, bound: got"):
        learn(loss, gathered, gathered.weights, repeated(X, 1), **bad)
