"""More steps from several starts, and full fine-tuning: values, equal rows, the report."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from experiments.pipeline import Context
from experiments.report import example, html, schema
from experiments.report import more_steps as section
from experiments.stages import accuracy, full_training, more_steps, zoo_training
from experiments.stages.sample import Samples
from experiments.stages.world import classifier


@pytest.fixture(scope="module")
def world(tiny_world):
    config = dataclasses.replace(tiny_world.config, more_steps="4, 2", full_steps=2)
    return tiny_world._replace(config=config)


@pytest.fixture(scope="module")
def samples(world, tiny_encoded):
    """Random adapters in place of generated ones: two per task."""
    rng, rows = np.random.default_rng(3), [(t.name, "generated") for t in world.tasks] * 2
    shape = (len(rows), *tiny_encoded.x.shape[1:])
    tokens = 0.3 * rng.normal(size=shape) * tiny_encoded.spec.mask
    return Samples(tokens.astype(np.float32), rows)


@pytest.fixture(scope="module")
def held(world):
    return [t.name for t in world.tasks if t.level != "seen"]


@pytest.fixture(scope="module")
def found(world, tiny_encoded, samples, tmp_path_factory):
    context = Context(world.config, tmp_path_factory.mktemp("run"))
    context = context.add("data", world).add("codec", tiny_encoded).add("sample", samples)
    return more_steps.STAGE.run(context)


def draws(world, name, tag, steps):
    """[steps, batch, 2] (text, label): what the recipe says, one number after another."""
    config = world.config
    table = zoo_training.pools(world, [zoo_training.Run(f"{name}/{tag}", (name,), config.seed)])
    out = []
    for k in range(steps):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), table.ids[0]), k)
        pick = jax.random.randint(key, (config.zoo_batch,), 0, table.sizes[0])
        out.append(np.asarray(table.table[0][pick]))
    return out


def fitted(world, name, rows, loss_of, params, rate, total):
    """A loop over drawn rows with optax alone."""
    low = rate / 10
    schedule = optax.warmup_cosine_decay_schedule(low, rate, max(1, total // 20), total, low)
    solver = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    head = jnp.asarray(world.head_of(name))
    state = solver.init(params)

    @jax.jit
    def gradient(p, label, *given):
        def loss(p):
            logits = loss_of(p, *given, jnp.broadcast_to(head, (len(label), *head.shape)))
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(label)), label])

        return jax.grad(loss)(p)

    update = jax.jit(solver.update)
    for part in rows:
        grads = gradient(params, part[:, 1], world.hidden[part[:, 0]], world.mask[part[:, 0]])
        with jax.numpy_dtype_promotion("standard"):
            updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_steps_are_sorted_and_may_be_none(world):
    assert more_steps.looks(world.config) == (0, 2, 4)
    assert more_steps.looks(dataclasses.replace(world.config, more_steps="")) == ()


def test_every_held_out_task_has_every_start_at_every_step(found, held):
    assert found.steps == (0, 2, 4)
    assert set(found.accuracy) == set(found.full.accuracy) == set(held)
    for row in found.accuracy.values():
        assert set(row) == set(more_steps.STARTS)
        assert all(len(values) == 3 and max(values) <= 1 for values in row.values())
    assert "from zero" in more_steps.describe(found)


def test_without_steps_starts_are_what_they_are_called(world, tiny_encoded, samples, found, held):
    """Evaluated on their own: the first sample, the mean over tasks of task means, the base."""
    means = [tiny_encoded.x[tiny_encoded.task == k].mean(0) for k in range(4)]
    for name in held:
        tokens = [samples.of(name, "generated")[0], np.mean(means, 0), 0 * means[0]]
        hits = accuracy.correct(world, tiny_encoded, name, np.stack(tokens).astype("f4"))
        got = [found.accuracy[name][start][0] for start in more_steps.STARTS]
        np.testing.assert_allclose(got, hits.mean(1))


@pytest.fixture(scope="module")
def trained(world, tiny_encoded, samples, held):
    start = more_steps.starts(world, tiny_encoded, samples, held[0])
    return start, more_steps.train(world, held[0], start, (0, 2, 4))


def test_each_start_is_trained_as_by_a_loop_on_the_same_rows(world, trained, held):
    start, found = trained
    template = zoo_training.template(world, world.config.seed)
    apply = classifier(world.model, world.config.head_scale)
    rows = draws(world, held[0], "more", 4)

    def merged(trainable, *given):
        return apply(jl.merge(world.upper, template.replace(trainable=trainable)), *given)

    for k in (0, 2):  # the generated one, and zero
        own = jax.tree.map(lambda x, k=k: x[k], start)
        want = fitted(world, held[0], rows, merged, own, world.config.zoo_lr, 4)
        got = jax.tree.map(lambda x, k=k: x[k], found[-1])
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), got, own)
        assert max(jax.tree.leaves(moved)) > 1e-3
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_mutation_other_rows_per_start_are_seen(world, trained, held, monkeypatch):
    """Two equal starts end equal; with rows of their own they do not."""
    start, _ = trained
    twice = jax.tree.map(lambda x: jnp.stack([x[0], x[0], x[0]]), start)

    def apart(trainable):
        ends = more_steps.train(world, held[0], trainable, (0, 2, 4))[-1]
        return max(float(jnp.abs(x[0] - x[1]).max()) for x in jax.tree.leaves(ends))

    assert apart(twice) == 0
    real = zoo_training.pools
    own = lambda world, runs: real(world, runs)._replace(ids=jnp.arange(len(runs)))  # noqa: E731
    monkeypatch.setattr(zoo_training, "pools", own)
    assert apart(twice) > 1e-4


def test_full_fine_tuning_is_a_loop_over_all_parameters(world, found, held):
    assert found.full.rate in full_training.RATES
    apply = classifier(world.model, world.config.head_scale)
    got = full_training.train(world, held[0], 1e-3)
    rows = draws(world, held[0], "full", 2)
    want = fitted(world, held[0], rows, apply, world.upper, 1e-3, 2)
    for path, a in jax.tree_util.tree_leaves_with_path(got):
        if "key" in str(path) and "bias" in str(path):
            continue  # softmax does not see it: its gradient is rounding, which Adam scales up
        b = functools.reduce(lambda tree, key: tree[key.key], path, want)
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=str(path))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), got, world.upper)
    assert min(jax.tree.leaves(moved)) > 1e-5
    still = full_training.train(world, held[0], 0.0)
    for a, b in zip(jax.tree.leaves(still), jax.tree.leaves(world.upper), strict=True):
        np.testing.assert_array_equal(a, b)


def accuracies(full=True):
    rows = {"a": {"generated": [0.7, 0.9], "mean_adapter": [0.5, 0.79], "zero": [0.5, 0.6]}}
    rows["b"] = {"generated": [0.9, 0.9], "mean_adapter": [0.5, 0.99], "zero": [0.5, 0.8]}
    more = {"a": 0.95, "b": 0.97} if full else {}
    return section.section((0, 5), {"unseen_pair": rows}, {"a": 0.88, "b": 0.92}, more)


def test_a_start_reaches_training_within_a_point():
    level = accuracies()["levels"]["unseen_pair"]
    assert level["reach"] == {"generated": 5, "mean_adapter": 5, "zero": None}
    assert level["trained"]["mean"] == pytest.approx(0.9)
    assert level["starts"]["zero"][1]["mean"] == pytest.approx(0.7)
    said = section.sentence(accuracies(), "unseen_pair")
    assert "(90.0 %) after 5 steps from the generated adapter" in said
    assert said.endswith("more than 5 steps from zero")
    assert accuracies(False)["levels"]["unseen_pair"]["full"] is None


def test_the_report_shows_it_where_it_was_measured():
    report, arrays = example.example(4)
    report = schema.plain({**report, "more_steps": accuracies()})
    page = html.render(report, arrays)
    assert "reaches training after" in page and "not within 5" in page
    assert "full fine-tuning of the adapted layers" in page
    report["more_steps"]["levels"]["unseen_pair"]["starts"]["zero"].pop()
    with pytest.raises(schema.ReportError, match=r"starts\.zero: 1 cells, expected 2"):
        schema.validate(report)
