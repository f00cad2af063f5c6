"""Drag-and-Drop's block by loops, the sizes of its axes, and its loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.contracts import generator
from jlora.generation.generators import drag_and_drop as lib
from jlora.generation.generators import heads
from jlora.generation.generators.drag_and_drop import Block, Decoder, DragAndDropConfig

KEY = jax.random.key(0)
CONFIG = DragAndDropConfig(prompts=(2, 1), rows=3, blocks=2, steps=1, batch=2)


def conv(p, x, axis):
    """Zero-padded 3 x 3 correlation over all axes but one, whose entries are channels."""
    kernel, bias = (np.asarray(p["Conv_0"][k], "f8") for k in ("kernel", "bias"))
    x = np.moveaxis(x, axis, -1)
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    out = np.zeros((*x.shape[:2], len(bias)))
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] = np.einsum("abc,abco->o", padded[i : i + 3, j : j + 3], kernel) + bias
    return np.moveaxis(out, -1, axis)


def test_a_block_is_that_of_the_equation():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4))
    block = Block((5, 2, 3))
    p = heads.draw(KEY, block, jnp.asarray(x, jnp.float32))
    p = jax.tree.map(lambda t: t + jnp.asarray(0.1 * rng.normal(size=t.shape), t.dtype), p)
    found = jax.jit(block.apply)({"params": p}, jnp.asarray(x, jnp.float32))

    def want(last):
        first = conv(p["h"], conv(p["w"], x, 2), 1)
        second = conv(p["w2"], conv(p["h2"], x, 1), 2)
        assert first.shape == second.shape == (2, 2, 3)
        return conv(p["n"], (first + last * second + np.asarray(p["bias"], "f8")) / 3, 0)

    assert found.shape == (5, 2, 3)
    np.testing.assert_allclose(found, want(1.0), atol=1e-5)
    assert np.abs(want(0.0) - np.asarray(found)).max() > 1e-2  # mutation: one order of axes alone


def test_sizes_go_in_geometric_steps_from_prompts_to_tokens():
    assert lib.shapes((16, 1, 64), (4, 8, 4), 2) == ((8, 3, 16), (4, 8, 4))
    assert lib.shapes((16, 1, 64), (4, 8, 4), 1) == ((4, 8, 4),)


def test_the_loss_leaves_padding_out_and_the_noise_is_as_large_as_said():
    model = Decoder(CONFIG, (2, 4))
    rng = np.random.default_rng(1)
    x, c = rng.normal(size=(1, 2, 4)), jnp.asarray(rng.normal(size=(1, 6)), jnp.float32)
    params = heads.draw(KEY, model, c[0])
    weights = np.asarray([[1, 1, 1, 0], [1, 0, 0, 0]]) / 4
    data = jnp.asarray(x, jnp.float32), c, jnp.asarray(weights, jnp.float32)
    apply, loss = jax.jit(model.apply), jax.jit(lib.loss, static_argnums=0)
    quiet = dataclasses.replace(model, config=dataclasses.replace(CONFIG, noise=0.0))
    made = np.asarray(apply({"params": params}, c[0]), "f8")
    want = ((made - x[0]) ** 2)[weights > 0].mean()
    found = float(loss(quiet, params, KEY, jnp.zeros(()), data))
    assert made.shape == (2, 4) and found == pytest.approx(want, rel=1e-5)
    loud = dataclasses.replace(model, config=dataclasses.replace(CONFIG, noise=1.0))
    assert abs(float(loss(loud, params, KEY, jnp.zeros(()), data)) - found) > 1e-3


def test_what_does_not_fit_is_an_error():
    at = generator.world(jl.LoRA(2, freeze_a=True))
    odd = dataclasses.replace(CONFIG, prompts=(3, 1))
    with pytest.raises(ValueError, match="got width 4, expected a multiple of P L = 3"):
        lib.fit(KEY, at.conditions, at.groups, at.bank, odd)
    with pytest.raises(ValueError, match="expected prompts, rows, blocks and batch of at least 1"):
        dataclasses.replace(CONFIG, blocks=0)
