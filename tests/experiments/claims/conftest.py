"""What tests of claims share: eight tasks of a linear model that do not meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.claims import decoder_domains, text_merges
from experiments.merging import cells
from jlora.models import decoder

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


@pytest.fixture
def domains(monkeypatch):
    """Three kinds of text for a tiny decoder: each has eight tokens and a step from one to the next

    of its own, so that an adapter of one kind knows nothing of the others.
    """
    config = decoder.DecoderConfig(
        "llama", vocab=24, layers=2, width=16, heads=2, kv_heads=1, head_width=8, ffn=16,
        max_positions=32, tied=True, init_std=0.3,
    )  # fmt: skip
    streams = [(8 * k + (2 * k + 1) * np.arange(400) % 8).astype(np.int32) for k in range(3)]
    changes = {"SEGMENT": 6, "SEGMENTS": 2, "RANK": 4, "STEPS": 40, "RATE": 2e-2}
    for name, value in (changes | {"NAMES": ("one", "two", "three")}).items():
        monkeypatch.setattr(decoder_domains, name, value)
    rows = [decoder_domains.composed(streams, n, np.random.default_rng(n)) for n in (8, 12)]
    params = decoder.init(jax.random.key(0), config)
    found = decoder_domains.World(config, params, tuple(streams), *rows)
    monkeypatch.setattr(decoder_domains, "world", lambda: found)
    decoder_domains.own.cache_clear()
    return found
