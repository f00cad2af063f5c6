"""Rivals of the generator: the same K texts, choices on seen tasks, the report's rows."""

import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.pipeline import Context
from experiments.stages import (
    conditions,
    discriminants,
    few_shot,
    last_layer,
    rivals,
    world,
    zoo_training,
)
from experiments.stages.world import Rows


@pytest.fixture(scope="module")
def found(tiny_world, tiny_encoded, tmp_path_factory):
    """The stage, on random adapters of seen tasks."""
    context = Context(tiny_world.config, tmp_path_factory.mktemp("run"))
    context = context.add("data", tiny_world).add("codec", tiny_encoded)
    return rivals.STAGE.run(context)


def test_examples_are_the_texts_of_the_condition(tiny_world):
    for task in tiny_world.tasks:
        rows = conditions.examples(tiny_world, task.name)
        assert len(set(rows.index.tolist())) == len(rows.index)
        pick = world.draw(tiny_world.config, task.name, tiny_world.config.examples)
        train = tiny_world.rows[task.name, "train"]
        for side in (0, 1):
            own = train.index[train.label == side]
            assert set(own[pick % len(own)]) == set(rows.index[rows.label == side])


def test_every_held_out_task_has_every_rival(tiny_world, tiny_encoded, found):
    held = [t.name for t in tiny_world.tasks if t.level != "seen"]
    assert set(found.accuracy) == set(held) == set(rivals.held_out(tiny_world, tiny_encoded))
    for name in held:
        assert set(found.accuracy[name]) == set(rivals.KEYS)
        rows = conditions.examples(tiny_world, name)
        test = tiny_world.rows[name, "test"]
        x = tiny_world.embedding.astype("f8")
        means = np.stack([x[rows.index[rows.label == c]].mean(0) for c in (0, 1)])
        near = np.square(x[test.index][:, None] - means[None]).sum(-1).argmin(1)
        assert found.accuracy[name]["nearest_mean"] == (near == test.label).mean()


def test_choices_are_those_of_the_best_mean_on_validation_texts(tiny_world, tiny_encoded, found):
    """A loop over the grid; no test text is read."""
    names = tiny_encoded.names
    blind = tiny_world._replace(
        rows={k: v for k, v in tiny_world.rows.items() if k[1] != "test" and k[0] in names}
    )
    assert rivals.choose(blind, names) == found.frozen
    scores = []
    for count in rivals.NEIGHBOURS:
        method = rivals.classifiers(rivals.Frozen(count, 1.0, 1.0))["knn"]
        each = [
            rivals.right(blind, method, conditions.examples(blind, n), blind.rows[n, "validation"])
            for n in names
        ]
        scores.append(np.mean([x.mean() for x in each]))
    assert found.frozen.neighbours == rivals.NEIGHBOURS[int(np.argmax(scores))]
    assert len(set(scores)) > 1


def test_the_last_layer_is_the_base_and_a_discriminant_there_is_an_adapter(tiny_world, found):
    """Logits of the parts are those of the merged and the lifted model; PEFT holds it."""
    name = tiny_world.names("unseen_pair")[0]
    few, test = conditions.examples(tiny_world, name), tiny_world.rows[name, "test"]
    fitted = discriminants.fit(tiny_world, found.features, found.discriminant)
    condition = discriminants.means(tiny_world, [few])[0]
    adapter = discriminants.adapter(tiny_world, fitted, name, condition)
    (at, real), *_ = last_layer.batches(tiny_world, test.index)
    rows, head = test.index[:real], tiny_world.head_of(name)
    given = (
        tiny_world.hidden[rows], tiny_world.mask[rows],
        jnp.broadcast_to(jnp.asarray(head), (real, *head.shape)),
    )  # fmt: skip
    apply = world.classifier(tiny_world.model, tiny_world.config.head_scale)
    merged = apply(jl.merge(tiny_world.upper, adapter), *given)
    lifted = jl.lift(apply)(tiny_world.upper, adapter, *given)
    np.testing.assert_allclose(lifted, merged, atol=2e-4)
    a, b = discriminants.factors(adapter)
    scale = tiny_world.config.head_scale
    parts = last_layer._logits(
        tiny_world.model, scale, tiny_world.upper, at, a, b, jnp.asarray(head)
    )[:real]
    np.testing.assert_allclose(parts, merged, atol=2e-4)
    plain = apply(tiny_world.upper, *given)
    assert np.abs(np.asarray(plain - merged)).max() > 1e-2
    hits = discriminants.right(tiny_world, name, adapter, test)
    np.testing.assert_array_equal(hits[:real], np.asarray(merged.argmax(-1)) == test.label[:real])
    assert hits.mean() == found.accuracy[name]["discriminant"]


def test_a_discriminant_is_kept_as_peft(tiny_world, found, tmp_path):
    from experiments.stages import sample

    fitted = discriminants.fit(tiny_world, found.features, found.discriminant)
    name = tiny_world.names("unseen_label")[0]
    few = conditions.examples(tiny_world, name)
    adapter = discriminants.adapter(
        tiny_world, fitted, name, discriminants.means(tiny_world, [few])[0]
    )
    sample.export_peft(tiny_world, adapter, tmp_path, "a task")
    names = jl.io.bert(layer_offset=tiny_world.below)
    again = jl.io.load_peft(tmp_path, names, tiny_world.upper, layout="in_out")
    want, got = jl.delta(tiny_world.upper, adapter), jl.delta(tiny_world.upper, again)
    for path, delta in want.items():
        np.testing.assert_allclose(got[path], delta, atol=1e-6)
        assert np.abs(np.asarray(delta)).max() > 1e-3


def test_lora_on_the_examples_is_the_zoos_training_on_those_rows_alone(
    tiny_world, found, bar, monkeypatch
):
    """Rates scale the steps, runs see their own set, padding changes nothing."""
    name, other = tiny_world.names("seen")[:2]
    few = conditions.examples(tiny_world, name)
    sets = [few_shot.Set(name, few), few_shot.Set(name, few), few_shot.Set(other, few)]
    size = few_shot.chunk_size(tiny_world, 3)
    trained = few_shot.train(tiny_world, sets, [1.0, 0.0, 1.0], size, 2, bar)
    fresh = zoo_training.template(tiny_world, tiny_world.config.seed).trainable
    for look in trained:
        for path, leaves in look.items():
            assert leaves["b"].shape[0] == 3
            np.testing.assert_array_equal(leaves["b"][1], fresh[path]["b"])  # rate 0
    moved = [float(sum(jnp.abs(x["b"][0]).sum() for x in look.values())) for look in trained]
    assert 0 < moved[0] != moved[1]
    drawn = []
    original = zoo_training.pools
    monkeypatch.setattr(
        zoo_training, "pools", lambda *args: drawn.append(original(*args)) or drawn[-1]
    )
    four = few_shot.train(tiny_world, sets[:1] * 4, [1.0] * 4, size, 1, bar)[0]
    for path, leaves in four.items():
        for k in range(4):  # the second chunk is mostly padding
            np.testing.assert_allclose(leaves["b"][k], trained[0][path]["b"][0], atol=1e-6)
    table, sizes, _ = drawn[0]
    assert sizes.tolist() == [len(few.index)] * size
    assert set(np.asarray(table[0, : len(few.index), 0])) == set(few.index.tolist())


def test_a_task_without_texts_of_a_class_is_named(tiny_world):
    name = tiny_world.names("seen")[0]
    rows = tiny_world.rows[name, "train"]
    zero = Rows(rows.index[rows.label == 0], rows.label[rows.label == 0])
    there = tiny_world._replace(rows={**tiny_world.rows, (name, "train"): zero})
    with pytest.raises(world.StageError, match=f"task '{name}' has no training text of class 1"):
        conditions.examples(there, name)


def test_discriminants_are_chosen_on_the_grid(found):
    assert found.discriminant.shrinkage in discriminants.SHRINKAGES
    assert found.discriminant.gain in discriminants.GAINS
    assert found.lora.factor in few_shot.FACTORS and 0 <= found.lora.stop < few_shot.STOPS
    assert 0 <= found.discriminant.accuracy <= 1
