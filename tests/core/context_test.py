"""Side inputs and outputs: keys a site and a step, ctx, aux through scan, remat and cond."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jlora as jl


def leaf(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Told(jl.LoRA):
    """Reports its input and its key; adds a side input."""

    def apply(self, x, w, p, ctx):
        report = {"sum": jnp.sum(x)}
        if "key" in ctx:
            report["draw"] = jax.random.uniform(ctx["key"])
        y = super().apply(x, w, {**p}, {})
        return (y + ctx["shift"] if "shift" in ctx else y), report


PARAMS = {"stack": leaf(3, 4, 4), "one": leaf(4, 4, seed=1)}
X = leaf(2, 4, seed=2)


def fn(p, x):
    h = jnp.tanh(x @ p["one"])
    h, _ = lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), h, p["stack"])
    h = lax.cond(h[0, 0] > 5, lambda h: h, lambda h: jnp.tanh(h @ p["one"]), h)
    return h @ p["one"]


def adapter(method):
    return jl.init(jax.random.key(0), fn, PARAMS, X, methods={"stack|one": method})


def test_reports():
    y, aux = jax.jit(lambda a: jl.lift(fn, aux=True)(PARAMS, a, X))(adapter(Told(2)))
    assert set(aux) == {"one", "stack", "one#2", "one#3"}
    assert aux["stack"]["sum"].shape == (3,) and aux["one"]["sum"].shape == ()
    h = jnp.tanh(X @ PARAMS["one"])
    np.testing.assert_allclose(aux["one"]["sum"], X.sum(), rtol=1e-5)
    np.testing.assert_allclose(aux["stack"]["sum"][0], h.sum(), rtol=1e-5)
    np.testing.assert_allclose(y, fn(PARAMS, X), rtol=1e-5, atol=1e-6)


def test_a_branch_not_taken_reports_zero():
    def branchy(p, x):
        return lax.cond(x[0, 0] > 9, lambda x: x @ p["one"], lambda x: x, x)

    a = jl.init(jax.random.key(0), branchy, PARAMS, X, methods={"one": Told(2)})
    _, aux = jl.lift(branchy, aux=True)(PARAMS, a, X)
    assert float(aux["one"]["sum"]) == 0
    _, aux = jl.lift(branchy, aux=True)(PARAMS, a, X + 10)
    np.testing.assert_allclose(aux["one"]["sum"], (X + 10).sum(), rtol=1e-6)


def test_keys_differ_by_site_use_and_step():
    run = jax.jit(lambda a, key: jl.lift(fn, aux=True)(PARAMS, a, X, ctx={"key": key})[1])
    aux = run(adapter(Told(2)), jax.random.key(5))
    draws = np.concatenate([np.ravel(r["draw"]) for r in aux.values()])
    assert draws.size == 6 and np.unique(draws).size == 6
    again = run(adapter(Told(2)), jax.random.key(5))
    chex.assert_trees_all_equal(aux, again)
    other = run(adapter(Told(2)), jax.random.key(6))
    assert not np.intersect1d(draws, np.ravel(other["stack"]["draw"])).size


def test_keys_differ_between_two_scans_and_experts():
    def twice(p, x):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["stack"])
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["stack"])
        return jnp.einsum("ebd,edf->ebf", jnp.stack([h, h, h]), p["stack"])

    a = jl.init(jax.random.key(0), twice, PARAMS, X, methods={"stack": Told(2)})
    _, aux = jl.lift(twice, aux=True)(PARAMS, a, X, ctx={"key": jax.random.key(5)})
    assert set(aux) == {"stack", "stack#2", "stack#3"}
    draws = np.concatenate([np.ravel(r["draw"]) for r in aux.values()])
    assert draws.size == 9 and np.unique(draws).size == 9


def test_side_inputs_have_gradients_through_scan():
    def loss(shift):
        y, _ = jl.lift(fn, aux=True)(PARAMS, a, X, ctx={"shift": shift})
        return jnp.sum(y)

    a = adapter(Told(2))
    loss, e = jax.jit(loss), 1e-2
    g = jax.grad(loss)(0.1)
    np.testing.assert_allclose(g, (loss(0.1 + e) - loss(0.1 - e)) / (2 * e), rtol=2e-2)


def test_reports_under_vmap_and_experts_have_the_stack_in_front():
    def experts(p, x):
        return jnp.einsum("etd,edf->etf", x, p["stack"])

    x = leaf(3, 2, 4)
    a = jl.init(jax.random.key(0), experts, PARAMS, x, methods={"stack": Told(2)})
    _, aux = jl.lift(experts, aux=True)(PARAMS, a, x)
    np.testing.assert_allclose(aux["stack"]["sum"], x.sum((1, 2)), rtol=1e-5, atol=1e-6)
    bank = jl.stack([a, a])
    _, aux = jax.vmap(lambda a: jl.lift(experts, aux=True)(PARAMS, a, x))(bank)
    assert aux["stack"]["sum"].shape == (2, 3)
