"""Balance states of a whole adapter: layers of a scan, several uses, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.routed.smora import SMoRA
from jlora.routing import bias_balanced
from jlora.routing.state import advance

RNG = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(3, 4, 4)), jnp.float32),
    "head": jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32),
}
X = jnp.asarray(RNG.normal(size=(20, 4)), jnp.float32)
METHOD = SMoRA(rank=4, top_k=1, rate=0.1)


def model(params, x):
    x = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]
    return (x @ params["head"]) @ params["head"]


ADAPTER = jl.init(jax.random.key(0), model, PARAMS, X, methods={"w": METHOD, "head": jl.LoRA(2)})


def reports(adapter):
    return jax.jit(jl.lift(model, aux=True))(PARAMS, adapter, X)[1]


def check():
    aux = reports(ADAPTER)
    after = advance(ADAPTER, aux)
    counts = np.asarray(aux["w"]["counts"])
    assert counts.shape == (3, 4) and (counts.sum(-1) == 20).all()
    np.testing.assert_allclose(after.frozen["w"]["bias"], 0.1 * np.sign(5 - counts), rtol=1e-6)
    assert after.trainable["w"]["a"] is ADAPTER.trainable["w"]["a"]
    assert after.frozen["head"] is ADAPTER.frozen["head"]


def test_every_layer_has_its_own_step():
    check()


def test_uses_of_a_site_are_summed():
    both = jl.init(jax.random.key(0), model, PARAMS, X, methods={"head": METHOD})
    aux = reports(both)
    assert aux.keys() == {"head", "head#2"}
    total = np.asarray(aux["head"]["counts"] + aux["head#2"]["counts"])
    want = 0.1 * np.sign(10 - total)
    np.testing.assert_allclose(advance(both, aux).frozen["head"]["bias"], want, rtol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="w: no counts among the reports of"):
        advance(ADAPTER, {})
    aux = {"w": {"counts": jnp.ones(4)}}
    with pytest.raises(ValueError, match=r"w: got counts of shape \(4,\), expected \(3,\) and"):
        advance(ADAPTER, aux)


def test_mutation_a_mean_over_layers_is_seen(monkeypatch):
    def stepped(bias, counts, rate):
        return bias + rate * jnp.sign(jnp.max(counts) - counts)

    monkeypatch.setattr(bias_balanced, "stepped", stepped)
    with pytest.raises(AssertionError):
        check()
