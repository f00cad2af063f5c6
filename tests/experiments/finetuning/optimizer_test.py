"""Optimizers by their names: the rule of the library, then moments or none, decay and rate."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from experiments.finetuning import adapter as adapters
from experiments.finetuning import packing, step
from experiments.finetuning.optimizer import optimizer
from experiments.finetuning.settings import OPTIMIZERS, Settings
from jlora.models import decoder

RNG = np.random.default_rng(0)
DRAW = lambda: {"a": RNG.normal(size=(5, 2)), "b": RNG.normal(size=(2, 4))}  # noqa: E731
VALUE, GRADIENT, SCALE = DRAW(), DRAW(), 3.0
SETTINGS = Settings(lr=0.1, warmup=0.0, schedule="constant", clip=0.0, weight_decay=0.5)


def first_update(settings, gradient=GRADIENT):
    """Of the optimizer on one site, in float32."""
    value, gradient = (
        {"site": {k: jnp.asarray(x, jnp.float32) for k, x in t.items()}} for t in (VALUE, gradient)
    )
    opt = optimizer(settings, 10)
    frozen = {"site": {"scale": jnp.float32(SCALE)}}
    with jax.numpy_dtype_promotion("standard"):  # as in `step`
        return opt.update(gradient, opt.init(value), value, frozen=frozen)[0]["site"]


def adam(gradient):
    """The first step of Adam, whose moments are those of one gradient."""
    return gradient / (np.abs(gradient) + 1e-8)


def test_riemannian_is_the_preconditioned_gradient_under_adamw():
    a, b = VALUE["a"], VALUE["b"]
    want = {
        "a": adam(GRADIENT["a"] @ np.linalg.inv(b @ b.T + 1e-6 * np.eye(2))),
        "b": adam(np.linalg.inv(a.T @ a + 1e-6 * np.eye(2)) @ GRADIENT["b"]),
    }
    got = first_update(dataclasses.replace(SETTINGS, optimizer="riemannian"))
    for name in got:
        np.testing.assert_allclose(got[name], -0.1 * (want[name] + 0.5 * VALUE[name]), atol=1e-5)


def test_lora_pro_moves_the_delta_as_the_full_gradient_does_at_most():
    """No direction of the factors is closer to G; without Adam the delta goes against it."""
    s = dataclasses.replace(SETTINGS, optimizer="lora_pro", weight_decay=0.0)
    a, b = VALUE["a"], VALUE["b"]
    g = RNG.normal(size=(5, 4))
    got = first_update(s, {"a": SCALE * g @ b.T, "b": SCALE * a.T @ g})
    moved = SCALE * (got["a"] @ b + a @ got["b"])
    inside = g - (np.eye(5) - a @ np.linalg.pinv(a)) @ g @ (np.eye(4) - np.linalg.pinv(b) @ b)
    np.testing.assert_allclose(moved, -0.1 * inside, atol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_runs_in_a_step_of_the_decoder(name):
    """Only traced: what an optimizer asks for is there, and the state keeps its form."""
    config = decoder.DecoderConfig(
        "llama", vocab=40, layers=2, width=16, heads=4, kv_heads=2, head_width=8, ffn=32,
        max_positions=64, tied=True,
    )  # fmt: skip
    s = Settings(rank=2, alpha=4.0, optimizer=name, lora_plus=4.0)
    params = jax.eval_shape(lambda: decoder.init(jax.random.key(0), config))
    fresh = functools.partial(adapters.fresh, config=config, settings=s)
    adapter = jax.eval_shape(fresh, jax.random.key(0), params)
    opt = optimizer(s, 5)
    state = jax.eval_shape(lambda t: step.initial(t, opt, 5), adapter.trainable)
    rows = packing.Rows(*(jax.ShapeDtypeStruct((1, 2, 8), d) for d in (*["int32"] * 3, "float32")))
    run = step.make(jl.lift(adapters.forward(config, s)), opt)
    after, _ = jax.eval_shape(run, params, adapter, state, rows, jax.random.key(0))
    same = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), after, state)
    assert all(jax.tree.leaves(same))


def test_hyper_parameters_reach_the_rule():
    base = dataclasses.replace(SETTINGS, optimizer="alt_lora", weight_decay=0.0)
    plain = first_update(base)
    adaptive = first_update(dataclasses.replace(base, optimizer_args='{"adaptive": true}'))
    assert not np.any(plain["a"]) and np.any(plain["b"])  # B is first
    assert not np.allclose(plain["b"], adaptive["b"])
    slow = first_update(dataclasses.replace(SETTINGS, optimizer_args='{"eps": 100.0}'))
    want = optax.adamw(0.1, eps=100.0, weight_decay=0.5)
    value = {k: jnp.asarray(x, jnp.float32) for k, x in VALUE.items()}
    with jax.numpy_dtype_promotion("standard"):
        gradient = {k: jnp.asarray(x, jnp.float32) for k, x in GRADIENT.items()}
        known = want.update(gradient, want.init(value), value)[0]
    np.testing.assert_allclose(slow["a"], known["a"], rtol=1e-6)
