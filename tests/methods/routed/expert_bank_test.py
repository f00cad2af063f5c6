"""Adapters as experts: layers of a stack, smaller ranks, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.routed import expert_bank
from jlora.methods.routed.expert_bank import with_experts
from jlora.methods.routed.lora_mixer import LoRAMixer

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(2, 4, 4)) / 2, jnp.float32)}
X = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)


def model(params, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]


def made(method, seed=0):
    adapter = jl.init(jax.random.key(seed), model, PARAMS, X, methods={"w": method})
    rng = np.random.default_rng(seed)
    move = lambda t: t + jnp.asarray(rng.normal(size=t.shape) / 2, t.dtype)  # noqa: E731
    return adapter.replace(trainable=jax.tree.map(move, adapter.trainable))


LORAS = [made(jl.LoRA(rank, alpha=3.0), seed) for seed, rank in enumerate((1, 2, 2))]


def check(train_experts):
    """In the hard regime each token is the adapter of its label, in every layer."""
    method = LoRAMixer(experts=3, rank=2, regime="hard", train_experts=train_experts)
    mixer = with_experts(made(method), LORAS)
    labels = jnp.asarray([2, 0, 1], jnp.int32)
    got = jl.lift(model)(PARAMS, mixer, X, ctx={"labels": labels})
    for t, e in enumerate(labels):
        want = model(jl.merge(PARAMS, LORAS[e]), X[t])
        np.testing.assert_allclose(got[t], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("train_experts", [True, False])
def test_experts_are_the_adapters(train_experts):
    check(train_experts)


def test_refusals():
    mixer = made(LoRAMixer(experts=3, rank=2))
    with pytest.raises(ValueError, match="w: got 2 adapters for LoRAMixer"):
        with_experts(mixer, LORAS[:2])
    with pytest.raises(ValueError, match="adapter 2: w: got rank 4, expected at most 2"):
        with_experts(mixer, [*LORAS[:2], made(jl.LoRA(4))])
    with pytest.raises(ValueError, match=r"adapter 0: w: got DoRA.*, expected LoRA"):
        with_experts(mixer, [made(jl.DoRA(2)), *LORAS[1:]])
    with pytest.raises(ValueError, match="adapter 1: w: got nothing, expected LoRA"):
        with_experts(mixer, [LORAS[0], jl.Adapter({}, {}, ()), LORAS[2]])


def test_mutation_a_scale_that_is_lost_is_seen(monkeypatch):
    good = expert_bank._expert
    lost = lambda *a: {**good(*a), "scales": jnp.ones(2)}  # noqa: E731
    monkeypatch.setattr(expert_bank, "_expert", lost)
    with pytest.raises(AssertionError):
        check(True)
