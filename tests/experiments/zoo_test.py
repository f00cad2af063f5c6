"""The zoo: sharded over 8 devices as on one, NaN named, the plan of runs, tasks by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import Config
from experiments.progress import Progress
from experiments.stages import sample, world, zoo
from experiments.workdir import StageError

CONFIG = Config(
    base="tiny", tasks="toy", layers=1, max_length=8, train_texts=20, eval_rows=10, examples=2,
    zoo_steps=4, zoo_segment=4, zoo_batch=4, zoo_chunk=8, zoo_snapshots=2, references=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return world.build(CONFIG, tmp_path_factory.mktemp("world"), None)


def train(made, folder, runs):
    with Progress(folder, "zoo", 1, "step") as bar:
        return zoo.train(made, runs, CONFIG.zoo_steps, folder / "work", bar)["snapshots"]


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
    original = zoo.shard

    def spy(tree, count):
        out = original(tree, count)
        shardings.append(len(jax.tree.leaves(out)[0].sharding.device_set))
        return out

    monkeypatch.setattr(zoo, "shard", spy)
    spread = train(made, tmp_path / "a", runs)
    assert shardings == [8]
    monkeypatch.setattr(zoo, "shard", lambda tree, count: tree)
    alone = train(made, tmp_path / "b", runs)
    for x, y in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
        assert np.abs(x[0] - x[1]).max() > 1e-3  # different runs do differ


def test_a_nan_in_a_zoo_adapter_is_named(made, tmp_path, monkeypatch):
    def poisoned(path, like):
        tree = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        if path.name == "chunk_001":
            next(iter(tree["snapshots"].values()))["b"][2, 0, 0, 0, 0] = np.nan
        return tree

    monkeypatch.setattr(zoo, "load_tree", poisoned)
    monkeypatch.setattr(zoo.Stage, "verify", lambda self: {})
    name = zoo.plan(made)[8 + 2].name
    with pytest.raises(StageError, match=f"run '{name}' has NaN or infinity"):
        zoo.read(made, tmp_path)


def test_an_unknown_task_is_named(made):
    with pytest.raises(StageError, match="no task named 'nobody'"):
        made.task("nobody")
    draws = sample.Draws(np.zeros((1, 2, 3)), [("a", "generated")])
    with pytest.raises(StageError, match="no 'generated' adapter was sampled for task 'nobody'"):
        draws.of("nobody", "generated")


def test_heads_are_orthonormal_and_the_same_for_all_tasks(made):
    heads = made.heads
    np.testing.assert_allclose(heads[0] @ heads[0].T, np.eye(2), atol=1e-6)
    assert (heads == heads[:1]).all()
    texts = world.make_heads(Config(head="label_text"), made.tasks[:2], made.text, made.model.width)
    assert np.abs(texts[0] - texts[1]).max() > 1e-3
    assert jnp.isfinite(jnp.asarray(texts)).all()
