"""Runs end at the common loss, each task with its own weights; probes see what was forgotten."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.claims import text_forgetting as lib
from tests.experiments.claims.federated_rounds_test import D, linear

NAMES, ROWS = ("query", "key", "value", "out"), 10


@pytest.fixture
def found(monkeypatch):
    """Two tasks on a linear model, texts of two kinds that the base tells apart."""
    rng = np.random.default_rng(0)
    f32 = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    base = {"layers": {"attention": {s: {"kernel": 0.1 * f32(1, D, D)} for s in NAMES}}}
    label = jnp.tile(jnp.asarray([0, 1], jnp.int32), (2, ROWS // 2))
    index = label + jnp.asarray([[0], [2]], jnp.int32)  # text 2 t + y
    rows = (index, label)
    made = lib.lib.Tasks(linear, base, ("a", "b"), index, label, f32(2, 2, D), f32(4, 2, D),
                         jnp.ones((4, 2), bool), rows, rows)  # fmt: skip
    monkeypatch.setattr(lib.lib, "tasks", lambda workdir: made)
    monkeypatch.setattr(lib, "KERNELS", lib.lib.SITES)
    monkeypatch.setattr(lib.lib, "ROWS", ROWS)
    monkeypatch.setattr(lib, "BLOCK", 2)
    for cached in (lib.fresh, lib.probes):
        cached.cache_clear()
    yield made
    for cached in (lib.fresh, lib.probes):
        cached.cache_clear()


def losses(found, params):
    """Mean loss of every task with its own parameters, by numpy."""
    out = []
    for t, own in enumerate(params):
        w = np.sum([np.asarray(own["layers"]["attention"][s]["kernel"][0], "f8") for s in NAMES], 0)
        x = np.asarray(found.hidden, "f8").sum(1)[np.asarray(found.index[t])]
        z = x @ w @ np.asarray(found.heads[t], "f8").T
        top = np.log(np.exp(z).sum(1))
        out.append(np.mean(top - z[np.arange(ROWS), np.asarray(found.label[t])]))
    return np.asarray(out)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_task_keeps_the_weights_of_the_first_time(found, monkeypatch, rank):
    recipe, where = lib.Recipe(rank, ()), Path("nowhere")
    made = lib.train(recipe, 3e-2, 0, where)
    np.testing.assert_allclose(made.loss, losses(found, made.params), rtol=1e-4)
    assert (made.loss <= lib.LOSS).all() and len(made.adapters) == (2 if rank else 0)
    if rank:
        own = jl.merge(found.base, made.adapters[1])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), own, made.params[1])
    monkeypatch.setattr(lib, "BLOCKS", int(made.steps.max()) // 2 - 1)
    shorter = lib.train(recipe, 3e-2, 0, where)
    assert (shorter.loss > lib.LOSS).any(), "one block fewer does not do"
    early = made.steps < made.steps.max()
    np.testing.assert_array_equal(shorter.loss[early], made.loss[early])


def test_probes_see_what_a_model_lost(found):
    where = Path("nowhere")
    np.testing.assert_array_equal(lib.kept((found.base,) * 2, where), [1.0, 1.0])
    turned = jax.tree.map(jnp.negative, found.base)  # every feature with the other sign
    accuracy = lib.kept((turned, found.base), where)
    assert accuracy[0] <= 0.5 and accuracy[1] == 1.0
