"""Every method where x is never written down: table lookups, convolutions, tied tables.

Lifted and merged agree in value and gradient; a method without a merged weight runs where it can
and says so where it cannot.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora import registry
from jlora.contract import FAST_COMPILE, close
from jlora.core.lookup import Lookup

RNG = np.random.default_rng(0)
PARAMS = {
    "table": jnp.asarray(RNG.normal(size=(12, 8)), jnp.float32),
    "kernel": jnp.asarray(RNG.normal(size=(3, 3, 4, 12)) / 3, jnp.float32),
}
IDS = jnp.asarray(RNG.integers(0, 12, (4, 5)), jnp.int32).at[0, :3].set(jnp.asarray([-1, -40, 12]))
IMAGE = jnp.asarray(RNG.normal(size=(4, 5, 7, 4)), jnp.float32)
CTX = {
    "table": {"tokens": RNG.random((4, 5)) > 0.5},
    "kernel": {"tokens": RNG.random((4, 5, 7)) > 0.5},
}


def lookup(params):
    return params["table"][IDS]


def tied(params):
    rows = jnp.take(params["table"], IDS, axis=0, fill_value=0)  # ids outside of it: padding
    return jnp.tanh(rows) @ params["table"].T


def convolve(params):
    return jax.lax.conv_general_dilated(
        IMAGE, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


MODELS = {"lookup": (lookup, "table"), "tied": (tied, "table"), "convolve": (convolve, "kernel")}


def noisy(method, model, where):
    made = jl.init(jax.random.key(0), model, PARAMS, methods={where: method})
    move = lambda t: t + jnp.asarray(0.3 * RNG.normal(size=t.shape), t.dtype)  # noqa: E731
    return made.replace(trainable=jax.tree.map(move, made.trainable))


def check(method, name):
    model, where = MODELS[name]
    adapter = noisy(method, model, where)

    def step(run):
        def loss(trainable):
            y = run(adapter.replace(trainable=trainable))
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(loss, has_aux=True)

    def both(trainable):
        lifted = step(lambda a: jl.lift(model)(PARAMS, a, ctx=CTX[where]))(trainable)
        return lifted, step(lambda a: model(jl.merge(PARAMS, a)))(trainable)

    close(*jax.jit(both, compiler_options=FAST_COMPILE)(adapter.trainable))


METHODS = {  # of matrices that have a merge
    name: system.examples[0]
    for name, system in registry.methods().items()
    if "L3" not in system.breaks and not type(system.examples[0]).vectors
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_lifted_is_merged(method, model):
    check(METHODS[method], model)


@pytest.mark.parametrize("model", ["lookup", "convolve"])
def test_experts_route_tokens_that_are_not_written_down(model):
    fn, where = MODELS[model]
    adapter = noisy(jl.Experts(experts=3, top_k=3, rank=2), fn, where)
    y, aux = jl.lift(fn, aux=True)(PARAMS, adapter)
    assert y.shape == fn(PARAMS).shape and float(aux[where]["load"].sum()) == pytest.approx(1)
    ragged = jl.Experts(experts=3, top_k=3, rank=2, backend="ragged")
    with pytest.raises(ValueError, match=r"backend 'ragged' needs tokens"):
        jl.lift(fn)(PARAMS, noisy(ragged, fn, where))


ROUTED = (
    jl.methods.SMoRA(rank=2, top_k=1),
    jl.methods.FlyLoRA(rank=2, top_k=1),
    jl.methods.MeteoRA(experts=2, top_k=1, rank=2, train_experts=True),
    jl.methods.LoRAMixer(experts=2, top_k=1, rank=2),
)


@pytest.mark.parametrize(("model", "methods"), [("lookup", ROUTED), ("convolve", ROUTED[:1])])
def test_routers_see_tokens_that_are_not_written_down(model, methods):
    fn, where = MODELS[model]
    for method in methods:
        y, aux = jl.lift(fn, aux=True)(PARAMS, noisy(method, fn, where))
        assert float(aux[where]["counts"].sum()) == y[..., 0].size and not np.allclose(
            y, fn(PARAMS)
        )


@pytest.mark.parametrize("model", ["lookup", "convolve"])
def test_token_masks_reach_rows_and_patches(model):
    fn, where = MODELS[model]
    inner = jl.DoRA(rank=2)
    adapter = noisy(jl.TokenMask(inner), fn, where)
    got = jl.lift(fn)(PARAMS, adapter, ctx=CTX[where])
    site = adapter.sites[0][0]
    tuned = jl.lift(fn)(PARAMS, adapter.replace(sites=((site, inner),)))
    mask = CTX[where]["tokens"][..., None]
    np.testing.assert_allclose(got, np.where(mask, tuned, fn(PARAMS)), rtol=1e-4, atol=1e-5)


def test_mutation_a_method_that_scales_lookups_is_seen(monkeypatch):
    good = jl.IA3.apply
    twice = lambda self, x, w, p, ctx: 2 * good(self, x, w, p, ctx)  # noqa: E731
    monkeypatch.setattr(jl.IA3, "apply", twice)
    with pytest.raises(AssertionError):
        check(METHODS["IA3"], "lookup")


@pytest.mark.parametrize("model", ["lookup", "tied"])
def test_mutation_an_id_outside_that_counts_as_the_last_row_is_seen(monkeypatch, model):
    monkeypatch.setattr(Lookup, "settle", lambda self, y: y)
    with pytest.raises(AssertionError):
        check(METHODS["LoRA"], model)
