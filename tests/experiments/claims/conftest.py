"""What tests of claims share: eight tasks of a linear model that do not meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.claims import text_merges
from experiments.merging import cells

TASKS = tuple(f"t{i}" for i in range(8))


@pytest.fixture
def toy(monkeypatch):
    """Two seeds of eight tasks on a linear model; adapter i moves logit i % 2 for input i."""
    params = {"w": jnp.zeros((8, 2))}
    fresh = jl.init(jax.random.key(0), lambda p, x: x @ p["w"], params, jnp.ones((2, 8)),
                    methods={"w": jl.LoRA(rank=1, alpha=1.0)})  # fmt: skip
    adapters, test, few = {}, {}, {}
    for i, task in enumerate(TASKS):
        for seed in range(3):
            a = jnp.zeros((8, 1)).at[i].set(1.0 + seed)
            b = jnp.zeros((1, 2)).at[0, i % 2].set(1.0)
            adapters[task, seed, 4] = fresh.replace(trainable={"w": {"a": a, "b": b}})
        x = np.tile(np.eye(8)[i], (6, 1))
        label = jnp.full(6, i % 2, jnp.int32)
        test[task] = few[task] = cells.Rows(
            (jnp.asarray(x, jnp.float32),), label.at[0].set(1 - i % 2), 5
        )
    bench = cells.Bench(TASKS, linear, params, adapters, fresh, test, few)
    monkeypatch.setattr(text_merges, "bench", lambda workdir: bench)
    for cached in (text_merges.cell, text_merges._random, text_merges._joined):
        monkeypatch.setattr(text_merges, cached.__wrapped__.__name__, cached.__wrapped__)


def linear(params, x):
    return x @ params["w"]
