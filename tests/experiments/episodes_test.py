"""The episodic generator's stage: episodes, training, one ordinary adapter, rivals and controls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.pipeline import Context
from experiments.stages import (
    conditions,
    discriminants,
    episode_training,
    episodes,
    few_shot,
    last_layer,
    rivals,
    world,
)
from experiments.stages.report import episodes_note


@pytest.fixture(scope="module")
def there(tiny_world):
    """The smallest world, with its settings of this stage."""
    config = dataclasses.replace(
        tiny_world.config, episode_steps=3, episode_tasks=2, episode_rank=2, episode_lr=1e-2
    )
    return tiny_world._replace(config=config)


def others(encoded, there):
    """The product of the stage before it; its penalty alone is read."""
    held = rivals.held_out(there, encoded)
    frozen, lora = rivals.Frozen(1, 1.0, 1.0), few_shot.Chosen(1.0, 0, 0.5)
    prior = discriminants.Chosen(1.0, 1.0, 0.5)
    return rivals.Rivals({n: {} for n in held}, frozen, lora, prior, np.zeros((1, 1)))


@pytest.fixture(scope="module")
def context(there, tiny_encoded, tmp_path_factory):
    found = Context(there.config, tmp_path_factory.mktemp("run"))
    found = found.add("data", there).add("codec", tiny_encoded)
    return found.add("rivals", others(tiny_encoded, there))


@pytest.fixture(scope="module")
def found(context):
    return episodes.STAGE.run(context)


def test_every_held_out_task_has_every_method_and_the_note_says_how(there, tiny_encoded, found):
    held = rivals.held_out(there, tiny_encoded)
    assert set(found.accuracy) == set(held) != set()
    assert all(set(row) == set(episodes.KEYS) for row in found.accuracy.values())
    assert set(found.controls) == set(episodes.CONTROLS)
    assert 0 <= found.steps <= 3
    for name in held:
        few, test = conditions.examples(there, name), there.rows[name, "test"]
        of = episodes.adapted(there, found.fitted)
        x, q = (last_layer.embeddings(of.world, part.index) for part in (few, test))
        np.testing.assert_allclose(np.linalg.norm(q, axis=1), 1, atol=1e-5)
        means = np.stack([x[few.label == c].mean(0) for c in (0, 1)]).astype("f8")
        near = np.square(q[:, None] - means[None]).sum(-1).argmin(1)
        assert found.accuracy[name]["episodic_mean"] == (near == test.label).mean()
    (note,) = episodes_note(found)
    assert f"{found.steps} steps" in note and "shuffled" in note


def trained(there, folder, bar):
    *_, last = episode_training.rounds(there, there.names("seen"), 3, folder, bar)
    return last


def test_training_moves_all_it_should_and_resumes_bitwise(there, tmp_path, bar):
    first = episode_training.initial(there)
    last = trained(there, tmp_path / "a", bar)
    again = trained(there, tmp_path / "a", bar)  # from its checkpoint
    other = trained(there, tmp_path / "b", bar)
    for x, y, z in zip(*map(jax.tree.leaves, (last, again, other)), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)
    for path, leaves in last.learned.shared.items():
        assert float(jnp.abs(leaves["b"]).max()) > 0, path
        assert float(jnp.abs(first.shared[path]["b"]).max()) == 0
    for name in ("log_shrinkage", "log_ridge", "log_gain"):
        assert getattr(last.learned, name) != getattr(first, name)
    loss = [values for _, values in bar.points]
    assert all(np.isfinite(v) for row in loss for v in row.values())


def test_what_is_generated_is_one_ordinary_adapter_of_the_base(there, tmp_path, bar):
    """Its merged model, its lifted model and the parts the stage scores agree; PEFT holds it."""
    from experiments.stages import sample

    last = trained(there, tmp_path / "a", bar)
    of, name = episodes.adapted(there, last), there.names("unseen_pair")[0]
    few, test = conditions.examples(there, name), there.rows[name, "test"]
    head = there.head_of(name)
    made = episodes.adapter(of, there, head, few)
    rows = test.index[: there.config.eval_rows]
    wide = jnp.broadcast_to(jnp.asarray(head), (len(rows), *head.shape))
    given = there.hidden[rows], there.mask[rows], wide
    apply = world.classifier(there.model, there.config.head_scale)
    merged = apply(jl.merge(there.upper, made), *given)
    np.testing.assert_allclose(jl.lift(apply)(there.upper, made, *given), merged, atol=2e-4)
    hits = episodes.right(of, head, few, test)
    np.testing.assert_array_equal(
        hits[: len(rows)], np.asarray(merged.argmax(-1)) == test.label[: len(rows)]
    )
    theta = episode_training.template(there).replace(trainable=last.learned.shared)
    alone = apply(jl.merge(there.upper, theta), *given)
    assert np.abs(np.asarray(merged - alone)).max() > 1e-2  # the examples count
    assert np.abs(np.asarray(alone - apply(there.upper, *given))).max() > 1e-4  # theta counts
    sample.export_peft(there, made, tmp_path / "peft", "a task")
    names = jl.io.bert(layer_offset=there.below)
    again = jl.io.load_peft(tmp_path / "peft", names, there.upper, layout="in_out")
    got = jl.delta(there.upper, again)
    for path, delta in jl.delta(there.upper, made).items():
        np.testing.assert_allclose(got[path], delta, atol=1e-5)


def test_more_classes_get_more_ranks_and_the_same_shared_adapter(there):
    shared = episode_training.template(there)
    shared = shared.replace(trainable=jax.tree.map(jnp.ones_like, shared.trainable))
    wide = episode_training.resized(shared, episode_training.template(there, 5))
    leaf, old = (x.trainable[episode_training.PATH]["a"] for x in (wide, shared))
    assert leaf.shape[-1] == there.config.episode_rank + 5 == old.shape[-1] + 3
    assert float(leaf[..., : old.shape[-1]].min()) == 1 and float(leaf[..., -3:].max()) == 0


def test_an_episode_has_no_text_twice_and_labels_that_are_its_texts(there):
    names = there.names("seen")
    data = episode_training.Data(
        conditions.table(there, names), jnp.zeros(len(names)), there.upper,
        jnp.arange(len(there.hidden))[:, None], jnp.arange(len(there.hidden))[:, None],
        episode_training.template(there), episode_training.empty(there).texts,
    )  # fmt: skip
    draw = jax.jit(lambda key, task: episode_training.draw(data, key, task))
    sizes = set()
    for k in range(12):
        got = draw(jax.random.key(k), jnp.int32(k % len(names)))
        rows = there.rows[names[k % len(names)], "train"]
        label = dict(zip(rows.index.tolist(), rows.label.tolist(), strict=True))
        support, query = (
            np.asarray(part[0])[:, 0].tolist() for part in (got.examples, got.queries)
        )
        assert [label[i] for i in support] == np.asarray(got.labels).tolist()
        assert [label[i] for i in query] == np.asarray(got.answers).tolist()
        enough = min(np.bincount(rows.label)) >= max(episode_training.EXAMPLES) + 12
        assert not enough or not set(support) & set(query)
        sizes.add(int(got.used.sum()) // 2)
    assert sizes <= set(episode_training.EXAMPLES) and len(sizes) > 1


def test_corpora_are_left_out_whole(there):
    names = there.names("seen")
    kept, out = episode_training.parted(there, names)
    assert kept and not set(kept) & set(out)
    left = {there.task(n).corpus for n in out} - {there.task(n).corpus for n in kept}
    assert bool(left) == bool(out)
