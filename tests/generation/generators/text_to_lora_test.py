"""Text-to-LoRA's network by numpy, its start, and the penalty."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.contracts import generator, tiny
from jlora.generation.generators import heads, text_to_lora
from jlora.generation.generators.text_to_lora import Network, Text2LoRAConfig
from jlora.generation.tokens import site_tokens

KEY = jax.random.key(0)
CONFIG = Text2LoRAConfig(embedding=3, width=4, steps=1, batch=2)


@pytest.fixture(scope="module")
def case():
    """A network of an adapter's b with all parameters off their start, and a condition."""
    template = tiny.fresh(jl.LoRA(2, alpha=4.0, freeze_a=True), tiny.params())
    model = Network(site_tokens.from_adapter(template), CONFIG, ())
    rng = np.random.default_rng(1)
    c = jnp.asarray(rng.normal(size=5), jnp.float32)
    params = heads.draw(KEY, model, c)
    params = jax.tree.map(
        lambda t: t + jnp.asarray(0.2 * rng.normal(size=t.shape), t.dtype), params
    )
    return template, model, params, c


def dense(p, x):
    return x @ np.asarray(p["kernel"], "f8") + np.asarray(p["bias"], "f8")


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * np.asarray(p["scale"], "f8") + np.asarray(p["bias"], "f8")


def gelu(x):  # the form by tanh, Flax's
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def by_numpy(p, c, layer_of, module_of):
    u = norm(p["norm"], dense(p["description"], np.asarray(c, "f8")))
    rows = [np.concatenate([u, np.asarray(p["layer"], "f8")[i], np.asarray(p["module"], "f8")[k]])
            for i, k in zip(layer_of, module_of, strict=True)]  # fmt: skip
    h = dense(p["mixed"], gelu(dense(p["mix"], np.stack(rows))))
    for k in range(3):
        q = p[f"block{k}"]
        h = h + dense(q["Dense_1"], gelu(dense(q["Dense_0"], norm(q["LayerNorm_0"], h))))
    return h


def test_the_network_is_that_of_the_equations(case):
    template, model, p, c = case
    found = jax.jit(model.apply)({"params": p}, c)
    slices = {"first": [0], "last": [1], "layers": [2, 3]}  # tokens, by path and then by layer
    h = by_numpy(p, c, [0, 0, 0, 1], [0, 1, 2, 2])
    wrong = by_numpy(p, c, [0, 0, 0, 0], [0, 1, 2, 2])  # mutation: no layer is known
    for path, rows in slices.items():
        head, own = p["heads"][f"{path}.b"], template.trainable[path]["b"]
        want = dense(head, h[rows]).reshape(own.shape)
        np.testing.assert_allclose(found[path]["b"], want, atol=2e-5)
        if path == "layers":
            assert np.abs(dense(head, wrong[rows]).reshape(own.shape) - want).max() > 1e-2


def test_through_the_loss_it_starts_at_the_template_and_is_shrunk(case):
    template, model, params, c = case
    model = dataclasses.replace(model, zero=("a", "b"))
    start = heads.draw(KEY, model, c)
    seen = jnp.ones(())

    def objective(adapter, task, key, data):
        total = sum(jnp.sum(jnp.abs(t)) for t in jax.tree.leaves(adapter.trainable))
        return data * total

    through = jax.jit(text_to_lora.through, static_argnums=0)
    given = (template, jnp.stack([c, c]), seen)
    fresh = through((model, objective), start, KEY, jnp.zeros(()), given)
    assert float(fresh) == 0.0  # b of the template is zero, and so is what is added
    found = through((model, objective), params, KEY, jnp.zeros(()), given)
    written = [np.asarray(t, "f8") for t in
               jax.tree.leaves(model.apply({"params": params}, c))]  # fmt: skip
    flat = np.concatenate([t.ravel() for t in written])
    want = np.abs(flat).sum() + 1e-3 * np.mean(flat**2)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert 1e-3 * np.mean(flat**2) > 1e-5 * want


def test_regression_is_the_mean_absolute_error_of_standardised_numbers(case):
    _, model, params, c = case
    weights = np.zeros((4, 12))
    weights[:, :10] = 1 / 40  # two numbers of each token are padding
    x = np.random.default_rng(2).normal(size=(1, 4, 12))
    data = tuple(jnp.asarray(t, jnp.float32) for t in (x, c[None], weights))
    found = jax.jit(text_to_lora.regression, static_argnums=0)(
        model, params, KEY, jnp.zeros(()), data
    )
    made = np.asarray(site_tokens.tokenise(model.spec, model.apply({"params": params}, c)))
    np.testing.assert_allclose(found, np.abs(made - x[0])[:, :10].mean(), rtol=1e-5)


def test_conditions_that_say_nothing_are_an_error():
    at = generator.world(jl.LoRA(2, freeze_a=True))
    with pytest.raises(ValueError, match="all conditions are equal"):
        text_to_lora.fit(KEY, jnp.ones_like(at.conditions), at.groups, at.bank, CONFIG)
    with pytest.raises(ValueError, match="conditions: got numbers that are not finite"):
        text_to_lora.fit_through(KEY, at.conditions * jnp.nan, at.bank[0], lambda *_: 0.0, ())
