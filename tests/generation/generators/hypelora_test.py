"""HypeLoRA's network by numpy, its start, and training through the lifted model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.contracts import tiny
from jlora.generation.generators import descent, hypelora
from jlora.generation.generators.hypelora import HypeLoRAConfig

KEY = jax.random.key(0)
CONFIG = HypeLoRAConfig(embedding=3, width=8, depth=2, attention=2, steps=60, rate=2e-2)
PARAMS = tiny.params()
TUNED = jl.lift(tiny.model)


def fresh(config=CONFIG, freeze_a=False):
    return hypelora.init(KEY, tiny.fresh(jl.LoRA(2, alpha=4.0, freeze_a=freeze_a), PARAMS), config)


@pytest.fixture(scope="module")
def state():
    return fresh()


@pytest.fixture(scope="module")
def moved(state):
    """The network with all parameters off their start."""
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda t: t + jnp.asarray(0.2 * rng.normal(size=t.shape), t.dtype), state.params
    )
    return dataclasses.replace(state, params=params)


def dense(p, x):
    return x @ np.asarray(p["kernel"], "f8") + np.asarray(p["bias"], "f8")


def gelu(x):  # the form by tanh, Flax's
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_the_mlp_writes_what_numpy_writes_and_alpha_mixes_it_with_the_start(moved):
    p, spec = moved.params, moved.spec
    h = np.asarray(p["embedding"], "f8")  # a row per slice: first, layers[0], layers[1], last
    for k in range(2):
        h = gelu(dense(p[f"Dense_{k}"], h))
    at = {"first": slice(0, 1), "last": slice(1, 2), "layers": slice(2, 4)}
    assert spec.names() == ("first", "last", "layers[0]", "layers[1]")
    whole, part = hypelora.adapter(moved), hypelora.adapter(moved, 0.25)
    for path, rows in at.items():
        for name, own in moved.template.trainable[path].items():
            made = dense(p["Heads_0"][f"{path}.{name}"], h[rows]).reshape(own.shape)
            np.testing.assert_allclose(whole.trainable[path][name], made, atol=2e-5)
            want = 0.25 * np.asarray(own, "f8") + 0.75 * made
            np.testing.assert_allclose(part.trainable[path][name], want, atol=2e-5)
            assert np.abs(want - made).max() > 1e-2


@pytest.mark.parametrize("network", hypelora.NETWORKS)
def test_a_fresh_network_changes_nothing_and_writes_an_a_of_the_usual_size(network):
    made = hypelora.adapter(fresh(dataclasses.replace(CONFIG, network=network, width=64)))
    merged = jl.merge(PARAMS, made)
    for name, kernel in PARAMS.items():
        np.testing.assert_array_equal(merged[name], kernel)
    a = np.concatenate([np.asarray(v["a"]).ravel() for v in made.trainable.values()])
    assert 0.05 < a.std() < 1.0


def test_what_the_template_freezes_is_not_written():
    state = fresh(freeze_a=True)
    made = hypelora.adapter(state)
    assert {name for leaves in made.trainable.values() for name in leaves} == {"b"}
    assert not any(name.endswith(".a") for name in state.params["Heads_0"])
    same = jax.tree.map(np.array_equal, made.frozen, state.template.frozen)
    assert all(jax.tree.leaves(same))


def objective(adapter, key, data):
    x, y = data
    return jnp.mean(jnp.square(TUNED(PARAMS, adapter, x, jnp.zeros(())) - y))


@pytest.fixture(scope="module")
def data():
    x = tiny.inputs(16)
    return x, tiny.model(tiny.params(5), x, jnp.zeros(()))


def test_the_loss_goes_down_through_lift_and_the_blend_ends_at_the_network(state, data):
    """The gradient reaches embeddings, network and every head."""
    zero = jnp.zeros(())
    settings = (state.spec, state.config, objective)
    trained, losses = hypelora.fit(KEY, state, objective, data)
    assert losses[-5:].mean() < 0.6 * losses[0]
    final = float(objective(hypelora.adapter(trained), KEY, data))
    assert final < 0.6 * float(objective(hypelora.adapter(state), KEY, data))
    change = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), trained.params, state.params)
    assert min(jax.tree.leaves(change)) > 1e-4
    # alpha: 0.99 at the first step, nothing of the template at the end
    first, last = (hypelora.loss(settings, trained.params, KEY, zero + done, (state.template, data))
                   for done in (0.0, 1.0))  # fmt: skip
    want = float(objective(hypelora.adapter(trained, 0.99), KEY, data))
    assert float(first) == pytest.approx(want, rel=1e-4)
    assert float(last) == pytest.approx(final, rel=1e-4) and abs(want - final) > 1e-2


def test_control_labels_that_are_not_of_the_inputs_are_not_learned(state, data):
    x, y = data
    wrong = x, y[np.random.default_rng(0).permutation(len(y))]
    trained, _ = hypelora.fit(KEY, state, objective, wrong)
    right, _ = hypelora.fit(KEY, state, objective, data)
    new = tiny.inputs(16, seed=9)
    new = new, tiny.model(tiny.params(5), new, jnp.zeros(()))
    errors = [float(objective(hypelora.adapter(s), KEY, new)) for s in (right, trained)]
    assert errors[0] < 0.8 * errors[1]


def test_settings_and_losses_without_a_meaning_are_errors(state, data):
    for changes, said in (
        ({"network": "lstm"}, "network: got 'lstm'"),
        ({"start": 1.5}, "start: got 1.5"),
        ({"network": "transformer", "width": 9}, "width: got 9, expected a multiple of 2"),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(CONFIG, **changes)
    with pytest.raises(FloatingPointError, match="not finite at step 0 of 60"):
        hypelora.fit(KEY, state, objective, (data[0], data[1] * jnp.nan))
    with pytest.raises(ValueError, match="steps: got 0, expected at least 1"):
        descent.minimise(hypelora.loss, hypelora.solver, (), {}, KEY, (), 0)
