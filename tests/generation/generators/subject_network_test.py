"""The network of a subject by numpy, its penalty, and subjects that it was not trained on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.contracts import tiny
from jlora.generation.generators import heads
from jlora.generation.generators import subject_network as lib
from jlora.generation.generators.subject_network import SubjectConfig

KEY = jax.random.key(0)
CONFIG = SubjectConfig(width=8, depth=1, penalty=0.0, batch=8, steps=150, rate=1e-2)
PARAMS = tiny.params()
TUNED = jl.lift(tiny.model)
INPUTS = tiny.inputs(6)


def fresh(config=CONFIG):
    return lib.init(KEY, tiny.fresh(jl.LoRA(2, alpha=2.0), PARAMS), 2, config)


@pytest.fixture(scope="module")
def state():
    return fresh()


@pytest.fixture(scope="module")
def moved(state):
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda t: t + jnp.asarray(0.2 * rng.normal(size=t.shape), t.dtype), state.params
    )
    return dataclasses.replace(state, params=params)


def objective(adapter, key, data):
    y, x = data
    return jnp.mean(jnp.square(TUNED(PARAMS, adapter, x, jnp.zeros(())) - y))


@pytest.fixture(scope="module")
def subjects():
    """Conditions on a circle; subject c is the model whose last matrix is moved along c."""
    draw = np.random.default_rng(3)
    one, other = (0.3 * draw.normal(size=PARAMS["last"].shape) for _ in range(2))
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    conditions = jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], 1), jnp.float32)
    wanted = []
    for c in np.asarray(conditions):
        p = PARAMS | {"last": PARAMS["last"] + jnp.asarray(c[0] * one + c[1] * other, jnp.float32)}
        wanted.append(tiny.model(p, INPUTS, jnp.zeros(())))
    return conditions, jnp.stack(wanted)


def dense(p, x):
    return x @ np.asarray(p["kernel"], "f8") + np.asarray(p["bias"], "f8")


def test_the_network_by_numpy(moved):
    c, p = jnp.asarray([0.5, -1.0]), moved.params
    x = dense(p["condition"], np.asarray(c, "f8"))[None] + np.asarray(p["places"], "f8")
    own = p["Residual_0"]
    norm = own["LayerNorm_0"]
    y = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    y = y * np.asarray(norm["scale"]) + np.asarray(norm["bias"])
    y = dense(own["Dense_0"], y)
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    x = x + dense(own["Dense_1"], y)
    got = lib.adapter(moved, c).trainable
    for path, rows in {"first": [0], "last": [1], "layers": [2, 3]}.items():
        for name, value in got[path].items():
            want = dense(p["Heads_0"][f"{path}.{name}"], x[rows]).reshape(value.shape)
            np.testing.assert_allclose(value, want, atol=1e-4)


def test_a_fresh_network_changes_nothing(state):
    merged = jl.merge(PARAMS, lib.adapter(state, jnp.asarray([3.0, -2.0])))
    jax.tree.map(np.testing.assert_array_equal, merged, PARAMS)


def check_penalty(state, subjects):
    """The loss is that without a penalty and the mean square of what is written, by numpy."""
    conditions, wanted = subjects[0][:1], subjects[1][:1]  # one subject: it is drawn every time
    values = []
    for penalty in (0.0, 0.5):
        settings = (state.spec, dataclasses.replace(CONFIG, penalty=penalty), objective)
        data = (state.template, conditions, wanted, INPUTS)
        values.append(float(lib.loss(settings, state.params, KEY, jnp.zeros(()), data)))
    leaves = jax.tree.leaves(lib.adapter(state, conditions[0]).trainable)
    flat = np.concatenate([np.asarray(t, "f8").ravel() for t in leaves])
    np.testing.assert_allclose(values[1] - values[0], 0.5 * (flat**2).mean(), rtol=1e-3)


def test_the_penalty_by_numpy(moved, subjects):
    check_penalty(moved, subjects)


def test_mutation_a_penalty_of_a_sum(moved, subjects, monkeypatch):
    wrong = lambda tree: sum(jnp.sum(t**2) for t in jax.tree.leaves(tree))  # noqa: E731
    monkeypatch.setattr(heads, "mean_square", wrong)
    with pytest.raises(AssertionError):
        check_penalty(moved, subjects)


def test_subjects_that_were_not_trained_on_and_shuffled_conditions(state, subjects):
    conditions, wanted = subjects
    train, new = np.arange(24) % 4 != 0, np.arange(24) % 4 == 0

    def error(given, at):
        trained, losses = lib.fit(KEY, state, objective, given, wanted[train], INPUTS)
        assert np.isfinite(losses).all()
        run = lambda c, y: objective(lib.adapter(trained, c), KEY, (y, INPUTS))  # noqa: E731
        return float(jnp.mean(jax.vmap(run)(at, wanted[new])))

    plain = tiny.model(PARAMS, INPUTS, jnp.zeros(()))
    base = float(jnp.mean(jnp.square(plain[None] - wanted[new])))
    shuffled = conditions[train][np.random.default_rng(0).permutation(18)]
    assert error(conditions[train], conditions[new]) < 0.3 * base
    assert error(shuffled, conditions[new]) > 0.5 * base


@pytest.mark.parametrize("name, value", [("width", 0), ("steps", 0), ("penalty", -1.0)])
def test_errors(name, value):
    with pytest.raises(ValueError, match=f"got .*{name}={value}"):
        SubjectConfig(**{name: value})
