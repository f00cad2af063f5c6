"""The zoo: sharded over 8 devices as on one, NaN named, the plan of runs, tasks by name."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from experiments.config import Config
from experiments.pipeline import Done
from experiments.progress import Progress
from experiments.stages import sample, world, zoo, zoo_training
from experiments.workdir import StageError

CONFIG = Config(
    base="tiny", tasks="toy", layers=1, max_length=8, train_texts=20, eval_rows=10, examples=2,
    zoo_steps=4, zoo_segment=4, zoo_batch=4, zoo_chunk=8, zoo_snapshots=2, references=2,
    latent=3,
)  # fmt: skip


@pytest.fixture
def made(tiny_world):
    assert tiny_world.config == CONFIG
    return tiny_world


def train(made, folder, runs):
    with Progress(folder, "zoo", 1, "step") as bar:
        return zoo_training.train(made, runs, CONFIG.zoo_steps, folder / "work", bar)["snapshots"]


def test_runs_are_seeds_of_tasks_and_one_reference(made):
    runs = zoo.plan(made)
    assert len({r.name for r in runs}) == len(runs)
    seen = made.names("seen")
    count = [sum(r.tasks == (name,) for r in runs) for name in seen]
    assert sorted(count) == [2, 2, 3, 3]  # zoo_seeds, and a reference for two of the four
    for level in ("unseen_pair", "unseen_label", "unseen_corpus"):
        for name in made.names(level):
            assert [r.seed for r in runs if r.tasks == (name,)] == [CONFIG.zoo_seeds]


def test_sharded_runs_equal_unsharded_ones(made, tmp_path, monkeypatch):
    assert jax.device_count() == 8
    runs = zoo.plan(made)[:8]
    shardings = []
    original = zoo_training.shard

    def spy(tree, count):
        out = original(tree, count)
        shardings.append(len(jax.tree.leaves(out)[0].sharding.device_set))
        return out

    monkeypatch.setattr(zoo_training, "shard", spy)
    spread = train(made, tmp_path / "a", runs)
    assert shardings == [8]
    monkeypatch.setattr(zoo_training, "shard", lambda tree, count: tree)
    alone = train(made, tmp_path / "b", runs)
    for x, y in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
        assert np.abs(x[0] - x[1]).max() > 1e-3  # different runs do differ


def test_training_is_adam_on_the_merged_weights_over_the_drawn_rows(made, tmp_path):
    """The oracle merges, draws in a Python loop and knows nothing of lifting, vmap or scan."""
    config, runs = CONFIG, zoo.plan(made)[:2]
    with Progress(tmp_path, "zoo", 1, "step") as bar:
        found = zoo_training.train(made, runs, config.zoo_steps, tmp_path / "work", bar)
    rows = zoo_training.pools(made, runs)
    adapter = zoo_training.template(made, config.seed)
    apply = world.classifier(made.model, config.head_scale)
    rate = optax.warmup_cosine_decay_schedule(1e-3, 1e-2, 1, config.zoo_steps, 1e-3)
    solver = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    @jax.jit
    def step(trainable, moments, drawn):
        def loss(trainable):
            merged = jl.merge(made.upper, adapter.replace(trainable=trainable))
            heads = jnp.asarray(made.heads)[drawn[:, 2]]
            logits = apply(merged, made.hidden[drawn[:, 0]], made.mask[drawn[:, 0]], heads)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[:, 1:2], 1).mean()

        with jax.numpy_dtype_promotion("standard"):
            updates, moments = solver.update(jax.grad(loss)(trainable), moments, trainable)
        return optax.apply_updates(trainable, updates), moments

    for k in range(len(runs)):
        trainable, moments = adapter.trainable, solver.init(adapter.trainable)
        for number in range(config.zoo_steps):
            key = jax.random.fold_in(jax.random.key(config.seed), rows.ids[k])
            key = jax.random.fold_in(key, number)
            pick = jax.random.randint(key, (config.zoo_batch,), 0, rows.sizes[k])
            trainable, moments = step(trainable, moments, rows.table[k][pick])
        for got, want in zip(
            jax.tree.leaves(found["snapshots"]), jax.tree.leaves(trainable), strict=True
        ):
            np.testing.assert_allclose(got[k, -1], want, atol=2e-5)
            assert np.abs(got[k, 0] - got[k, -1]).max() > 1e-4  # snapshots of different steps


def test_the_recipe_holds_each_setting_of_training_and_no_other():
    """A setting that is not in the recipe cannot reach the compiled steps, nor recompile them."""
    one = zoo_training.recipe(CONFIG, CONFIG.zoo_steps)
    read = {"zoo_lr", "zoo_batch", "zoo_snapshots", "head_scale", "seed"}
    for field in dataclasses.fields(Config):
        value = getattr(CONFIG, field.name)
        if isinstance(value, int | float):
            other = dataclasses.replace(CONFIG, **{field.name: value + 1})
            assert (zoo_training.recipe(other, CONFIG.zoo_steps) != one) == (field.name in read)
    arguments = inspect.signature(zoo_training.segment).parameters
    names = ["model", "plan", "length", "base", "rows", "state", "start", "factors"]
    assert list(arguments) == names


def test_a_nan_in_a_zoo_adapter_is_named(made, tmp_path, monkeypatch):
    def poisoned(path, like):
        tree = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        if path.name == "chunk_001":
            next(iter(tree["snapshots"].values()))["b"][2, 0, 0, 0, 0] = np.nan
        return tree

    monkeypatch.setattr(zoo, "load_tree", poisoned)
    name = zoo.plan(made)[8 + 2].name
    with pytest.raises(StageError, match=f"run '{name}' has NaN or infinity"):
        zoo.load(made, Done(tmp_path, {}))


def test_a_short_run_has_fewer_snapshots_than_the_multitask_one(made, tmp_path, monkeypatch):
    """Two steps have two snapshots where three were asked for, eight steps have three."""
    config = dataclasses.replace(made.config, zoo_steps=2, zoo_snapshots=3)
    copies = {}

    def shaped(path, like):
        copies[path.name] = jax.tree.leaves(like["snapshots"])[0].shape[1]
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)

    monkeypatch.setattr(zoo, "load_tree", shaped)
    found = zoo.load(made._replace(config=config), Done(tmp_path, {}))
    assert copies == {"chunk_000": 2, "chunk_001": 2, "multitask": 3}
    assert jax.tree.leaves(found.trainable)[0].shape[1] == 2


def test_an_unknown_task_is_named(made):
    with pytest.raises(StageError, match="no task named 'nobody'"):
        made.task("nobody")
    draws = sample.Samples(np.zeros((1, 2, 3)), [("a", "generated")])
    with pytest.raises(StageError, match="no 'generated' adapter was sampled for task 'nobody'"):
        draws.of("nobody", "generated")


def test_heads_are_orthonormal_and_the_same_for_all_tasks(made):
    heads = made.heads
    np.testing.assert_allclose(heads[0] @ heads[0].T, np.eye(2), atol=1e-6)
    assert (heads == heads[:1]).all()
    texts = world.make_heads(Config(head="label_text"), made.tasks[:2], made.text, made.model.width)
    assert np.abs(texts[0] - texts[1]).max() > 1e-3
    assert jnp.isfinite(jnp.asarray(texts)).all()
