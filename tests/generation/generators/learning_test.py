"""Generators learn a bank: each task gets its own adapter, and shuffled conditions undo it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora.contracts import tiny
from jlora.contracts.generator import World
from jlora.core.adapter import stack
from jlora.generation.generators import descent, drag_and_drop, icm_lora, text_to_lora

KEY = jax.random.key(0)
TASKS = 4
SIZES = {  # large enough to fit four tasks
    "icm_lora": (icm_lora, icm_lora.ICMLoRAConfig(
        channels=(8, 16, 8), latent=4, steps=250, batch=8, rate=5e-3)),
    "text_to_lora": (text_to_lora, text_to_lora.Text2LoRAConfig(
        embedding=8, width=32, steps=250, batch=8, rate=5e-3)),
    "drag_and_drop": (drag_and_drop, drag_and_drop.DragAndDropConfig(
        prompts=(2, 1), rows=3, blocks=2, steps=250, batch=8, rate=1e-2)),
}  # fmt: skip


@pytest.fixture(scope="module")
def at():
    """Two adapters of each of four tasks that differ by a tenth of what lies between tasks."""
    p, rng = tiny.params(), np.random.default_rng(0)
    fresh = tiny.fresh(jl.LoRA(2, alpha=3.0, freeze_a=True), p)
    bank = [tiny.moved(tiny.moved(fresh, 20 + k // 2), 40 + k, size=0.03) for k in range(8)]
    tasks = jnp.asarray(rng.normal(size=(TASKS, 4)), jnp.float32)
    groups = jnp.repeat(jnp.arange(TASKS, dtype=jnp.int32), 2)
    return World(stack(bank), tasks[groups], groups, tasks)


def distances(module, state, at):
    """Distances of the adapters that are written for all tasks to the soups, relative: [4, 4]."""
    soups = jax.tree.map(lambda t: (t[::2] + t[1::2]) / 2, at.bank.trainable)
    made = jax.vmap(lambda c: module.generate(KEY, state, c).trainable)(at.queries)
    flat = [np.concatenate([np.asarray(t).reshape(TASKS, -1) for t in jax.tree.leaves(x)], 1)
            for x in (made, soups)]  # fmt: skip
    each = np.linalg.norm(flat[0][:, None] - flat[1][None], axis=-1)
    return each / np.linalg.norm(flat[1], axis=1)[None]


@pytest.mark.parametrize("name", SIZES)
def test_each_task_gets_its_own_adapter_and_shuffled_conditions_do_not_give_it(name, at):
    module, config = SIZES[name]
    state = module.fit(KEY, at.conditions, at.groups, at.bank, config)
    found = distances(module, state, at)
    np.testing.assert_array_equal(found.argmin(1), np.arange(TASKS))
    assert np.diag(found).max() < 0.35, np.diag(found)
    # Control: the same conditions, each given to an adapter of another task.
    state = module.fit(KEY, jnp.roll(at.conditions, 2, axis=0), at.groups, at.bank, config)
    lost = distances(module, state, at)
    assert (lost.argmin(1) != np.arange(TASKS)).all() and np.diag(lost).min() > 0.6


# --- Text-to-LoRA through the loss of the lifted model ------------------------------------------

PARAMS, TUNED = tiny.params(), jl.lift(tiny.model)


def objective(adapter, task, key, data):
    x, y = data
    return jnp.mean(jnp.square(TUNED(PARAMS, adapter, x, jnp.zeros(())) - y[task]))


def test_through_the_loss_a_description_gives_the_adapter_of_its_task(at):
    x = tiny.inputs(12)
    others = [tiny.params(30 + k) for k in range(TASKS)]
    models = [{n: w + 0.4 * o[n] for n, w in PARAMS.items()} for o in others]
    y = jnp.stack([tiny.model(m, x, jnp.zeros(())) for m in models])
    template = tiny.fresh(jl.LoRA(2, alpha=2.0), PARAMS)
    _, config = SIZES["text_to_lora"]
    state, losses = text_to_lora.fit_through(KEY, at.queries, template, objective, (x, y), config)
    assert np.mean(losses[-20:]) < 0.5 * losses[0]
    made = [text_to_lora.generate(KEY, state, c) for c in at.queries]
    error = np.asarray([[objective(a, t, KEY, (x, y)) for t in range(TASKS)] for a in made])
    np.testing.assert_array_equal(error.argmin(0), np.arange(TASKS))
    assert np.diag(error).mean() < 0.5 * (error.sum() - np.trace(error)) / 12


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_step():
    def loss(settings, params, key, done, data):
        return params * jnp.log(2.5 / 4 - done) * data

    def solver(settings):
        return optax.sgd(0.0)

    one = jnp.ones(())
    params, losses = descent.minimise(loss, solver, 0, one, KEY, one, 2)
    np.testing.assert_allclose(losses, np.log([0.625, 0.125]), rtol=1e-5)
    assert float(params) == 1.0
    with pytest.raises(FloatingPointError, match="not finite at step 3 of 4"):
        descent.minimise(loss, solver, 0, one, KEY, one, 4)
