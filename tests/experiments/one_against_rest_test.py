"""Tasks of several classes: heads, conditions, and an adapter per class against the rest."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.config import Config
from experiments.stages import (
    conditions,
    discriminants,
    last_layer,
    one_against_rest,
    rivals,
    user_tasks,
    world,
)
from experiments.stages.world import Rows

KINDS = Path(__file__).parent / "fixtures" / "user_kinds"
PAIRS, THREE = "answers_or_not", "workshop_notes"


@pytest.fixture(scope="module")
def mine(tiny_world):
    """A task of two classes of pairs and one of three classes."""
    config = Config(**vars(tiny_world.config) | {"task_dir": str(KINDS)})
    return user_tasks.extend(tiny_world, config, None)


def test_the_head_of_a_class_is_the_same_in_every_task(mine, tiny_world):
    assert mine.heads.shape[:2] == (2, 3)
    pair, three = mine.head_of(PAIRS), mine.head_of(THREE)
    np.testing.assert_array_equal(pair[:2], tiny_world.heads[0])  # those of the zoo
    np.testing.assert_array_equal(pair[:2], three[:2])
    assert not pair[2].any()
    np.testing.assert_allclose(three @ three.T, np.eye(3), atol=1e-6)
    twenty = world._orthonormal(0, 20, 32)
    np.testing.assert_allclose(twenty @ twenty.T, np.eye(20), atol=1e-5)
    np.testing.assert_array_equal(twenty[:3], world._orthonormal(0, 3, 32))
    with pytest.raises(world.StageError, match="20 classes, expected at most the base's width 16"):
        world._orthonormal(0, 20, 16)


def test_a_class_that_a_task_does_not_have_is_never_named(mine):
    rows = mine.rows[PAIRS, "test"]
    n = len(rows.label)
    apply = world.classifier(mine.model, mine.config.head_scale)
    given = mine.upper, mine.hidden[rows.index], mine.mask[rows.index]
    head = jnp.broadcast_to(jnp.asarray(mine.head_of(PAIRS)), (n, 3, mine.heads.shape[2]))
    logits = apply(*given, head)
    two = apply(*given, head[:, :2])
    np.testing.assert_allclose(logits[:, :2], two, rtol=1e-6)
    assert np.isneginf(np.asarray(logits[:, 2])).all()
    plain = np.concatenate([two, np.zeros((n, 1))], 1)  # mutation: zero is above some logits
    assert (plain.argmax(1) == 2).any()

    def loss(head):
        return -jax.nn.log_softmax(apply(*given, head))[:, 0].mean()

    assert np.isfinite(np.asarray(jax.grad(loss)(head))).all()


def test_conditions_are_filled_up_with_zeros_that_scaling_keeps(mine):
    raw = conditions.canonical(mine, [PAIRS, THREE])
    assert raw.shape[:2] == (2, 6)
    assert not raw[0, 4:].any() and raw[1].any(-1).all()
    stats = conditions.scaling(raw)
    np.testing.assert_allclose(stats.mean[:4], raw[:, :4].mean(0), atol=1e-6)
    np.testing.assert_allclose(stats.mean[4:], raw[1, 4:], atol=1e-6)  # of the task that has it
    out = np.asarray(conditions.scaled(stats, jnp.asarray(raw)))
    assert not out[0, 4:].any() and out[0, :4].any(-1).all()
    real = np.concatenate([out[0, :4].ravel(), out[1].ravel()])
    np.testing.assert_allclose(np.square(real).mean(), 1, rtol=1e-5)


def test_random_rows_and_conditions_are_of_classes_that_the_task_has(mine):
    table = conditions.table(mine, [PAIRS, THREE])
    assert table.counts.tolist() == [[8, 8, 0], [4, 4, 4]]
    keys = jax.random.split(jax.random.key(3), 20)
    draw = jax.vmap(lambda k, t: conditions.random_rows(table, k, t, 6), in_axes=(0, None))
    for number, (name, classes) in enumerate(((PAIRS, 2), (THREE, 3))):
        rows, labels = (np.asarray(x) for x in draw(keys, jnp.int32(number)))
        assert set(labels.ravel().tolist()) == set(range(classes))
        own = mine.rows[name, "train"]
        of = dict(zip(own.index.tolist(), own.label.tolist(), strict=True))
        assert [of[r] for r in rows.ravel().tolist()] == labels.ravel().tolist()
        one = conditions.random(table, jnp.asarray(mine.embedding), keys[0], jnp.int32(number), 3)
        assert np.asarray(one).any(-1).tolist() == [True] * 2 * classes + [False] * (
            6 - 2 * classes
        )


def test_the_rest_is_the_mean_of_the_others(mine):
    task = mine.task(THREE)
    got = one_against_rest.conditions(mine, task)
    raw = world.condition(mine, task, None).reshape(3, 2, -1)
    for c in range(3):
        others = np.stack([raw[k] for k in range(3) if k != c])
        np.testing.assert_array_equal(got[c, :2], raw[c])
        np.testing.assert_allclose(got[c, 2:], others.mean(0), atol=1e-6)
    assert np.array_equal(
        one_against_rest.heads(mine, task), np.stack([mine.head_of(THREE)[:2]] * 3)
    )
    config = Config(**vars(mine.config) | {"head": "label_text"})
    texts = world.make_heads(config, mine.tasks, mine.text, mine.model.width)
    named = mine._replace(config=config, heads=texts)
    heads = one_against_rest.heads(named, task)
    np.testing.assert_array_equal(heads[1, 0], mine.text[task.class_descriptions[1]])
    np.testing.assert_allclose(heads[1, 1], texts[1][[0, 2]].mean(0), atol=1e-6)


def test_the_class_of_the_largest_margin_is_named(mine, tiny_encoded):
    """Logits of lifted adapters, one text at a time; a class's adapter moved to another's place."""
    tokens = tiny_encoded.x[:6].reshape(2, 3, *tiny_encoded.x.shape[1:]) * 10
    got = one_against_rest.correct(mine, tiny_encoded, THREE, tokens)
    rows = mine.rows[THREE, "test"]
    tuned = jax.jit(jl.lift(world.classifier(mine.model, mine.config.head_scale)))
    head = jnp.broadcast_to(mine.head_of(THREE)[:2], (len(rows.label), 2, mine.heads.shape[2]))
    margins = np.zeros((2, len(rows.label), 3))
    for m in range(2):
        for c in range(3):
            trainable = user_tasks.accuracy.unpack(tiny_encoded, jnp.asarray(tokens[m, c])[None])
            one = tiny_encoded.template.replace(trainable=jax.tree.map(lambda x: x[0], trainable))
            logits = tuned(mine.upper, one, mine.hidden[rows.index], mine.mask[rows.index], head)
            margins[m, :, c] = logits[:, 0] - logits[:, 1]
    np.testing.assert_array_equal(got, margins.argmax(-1) == rows.label)
    moved = one_against_rest.correct(mine, tiny_encoded, THREE, tokens[:, ::-1])
    assert (moved != got).any()
    bad = tokens.copy()
    bad[1, 2] = np.nan
    with pytest.raises(world.StageError, match=f"task '{THREE}': an adapter has NaN"):
        one_against_rest.correct(mine, tiny_encoded, THREE, bad)


def test_a_discriminant_of_three_classes_is_an_adapter_of_rank_three(mine, tiny_world):
    features = last_layer.features(tiny_world, np.arange(60))
    fitted = discriminants.fit(tiny_world, features, discriminants.Chosen(10.0, 3.0, 0.0))
    for name, classes in ((PAIRS, 2), (THREE, 3)):
        few, test = conditions.examples(mine, name), mine.rows[name, "test"]
        condition = discriminants.means(mine, [few])[0]
        adapter = discriminants.adapter(mine, fitted, name, condition)
        a, _ = discriminants.factors(adapter)
        assert a.shape[1] == classes
        head = jnp.asarray(mine.head_of(name)[:classes])
        apply = world.classifier(mine.model, mine.config.head_scale)
        given = mine.hidden[test.index], mine.mask[test.index]
        logits = apply(
            jl.merge(mine.upper, adapter),
            *given,
            jnp.broadcast_to(head, (len(test.label), *head.shape)),
        )
        hits = discriminants.right(mine, name, adapter, test)
        np.testing.assert_array_equal(hits, np.asarray(logits.argmax(-1)) == test.label)


def test_classifiers_of_the_examples_name_all_three_classes(mine):
    few, test = conditions.examples(mine, THREE), mine.rows[THREE, "test"]
    assert sorted(set(few.label.tolist())) == [0, 1, 2]
    for classify in rivals.classifiers(rivals.Frozen(1, 1.0, 1.0)).values():
        own = rivals.right(mine, classify, few, few)  # nothing was held back
        assert own.all()
        x = mine.embedding
        assert classify(x[few.index], few.label, x[test.index]).shape == (12, 3)


def test_of_a_pair_both_texts_are_read(mine):
    """The first has more words than `max_length`; cut as a single text it hides the second."""
    from experiments.stages import base_model

    base, long = base_model.load(mine.config, None), " ".join(f"w{k}" for k in range(30))
    texts = [f"{long} [SEP] yes it does", f"{long} [SEP] not at all", "a single text"]
    ids, mask = base_model.tokens(base, texts, 8)
    assert mask.sum(1).tolist() == [8, 8, 3]
    assert (ids[0] != ids[1]).any()
    words = "w0 w1 w2 w3 [SEP] yes it does"
    np.testing.assert_array_equal(ids[0], base.tokenizer.encode_batch([words], 8)[0][0])
    single, _ = base.tokenizer.encode_batch(texts, 8)  # mutation
    np.testing.assert_array_equal(single[0], single[1])
    assert base_model.longer(base, texts, 8) == 2


def test_an_adapter_of_three_classes_is_trained(mine, tmp_path):
    config = Config(**vars(mine.config) | {"zoo_steps": 60, "zoo_segment": 60, "zoo_lr": 0.05})
    there = mine._replace(config=config)
    trained = user_tasks.train(there, tmp_path)
    rows = mine.rows[THREE, "train"]
    apply = jl.lift(world.classifier(mine.model, config.head_scale))
    one = user_tasks.zoo_training.template(there, config.seed)
    one = one.replace(trainable=jax.tree.map(lambda x: x[1], trained))
    head = jnp.broadcast_to(mine.head_of(THREE), (len(rows.label), *mine.heads.shape[1:]))
    given = mine.hidden[rows.index], mine.mask[rows.index], head
    logits = np.asarray(apply(mine.upper, one, *given))
    before = world.classifier(mine.model, config.head_scale)(mine.upper, *given)
    assert (logits.argmax(-1) == rows.label).mean() > 0.8
    assert (np.asarray(before).argmax(-1) == rows.label).mean() < 0.6


def test_rows_hold_labels_of_all_classes(mine):
    assert all(isinstance(rows, Rows) for rows in mine.rows.values())
    assert np.bincount(mine.rows[THREE, "test"].label).tolist() == [4, 4, 4]


def test_examples_of_a_users_task_are_different_texts_and_all_where_there_are_few(mine):
    """Four draws among four texts were three texts."""
    for count in (1, 3, 4, 8, 20):
        there = mine._replace(config=Config(**vars(mine.config) | {"examples": count}))
        for name in (PAIRS, THREE):
            own, every = conditions.examples(there, name), mine.rows[name, "train"]
            for side, size in enumerate(np.bincount(every.label)):
                found = own.index[own.label == side]
                assert len(set(found.tolist())) == len(found) == min(count, size)
                assert set(found.tolist()) <= set(every.index[every.label == side].tolist())
            raw = conditions.canonical(there, [name])[0, 1]
            mean = mine.embedding[own.index[own.label == 0]].mean(0)
            np.testing.assert_allclose(raw, mean, atol=1e-6)


def test_mutation_draws_that_repeat_are_seen(mine, monkeypatch):
    same = lambda config, salt, k, n=0: np.zeros(k, int)  # noqa: E731
    monkeypatch.setattr(conditions.np, "argsort", lambda x, kind: np.zeros(len(x), int))
    monkeypatch.setattr(conditions, "draw", same)
    with pytest.raises(AssertionError):
        test_examples_of_a_users_task_are_different_texts_and_all_where_there_are_few(mine)
