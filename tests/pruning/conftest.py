"""What tests of pruning share: a tiny encoder with units, masks and LoRA on every kernel."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.models import encoder
from jlora.pruning.linked_axes import linked

CONFIG = encoder.EncoderConfig(vocab=5, layers=2, width=8, heads=4, ffn=6, max_positions=4)
SMALL = dataclasses.replace(CONFIG, heads=2, head_width=2, ffn=3)
ATTENTION, FFN = "layers/attention", "layers/ffn"
OUTPUTS = [f"{ATTENTION}/{n}/{k}" for n in ("query", "key", "value") for k in ("kernel", "bias")]


def full_model(p, h, m):
    return encoder.run(p, h, m, CONFIG)


def small_model(p, h, m):
    return encoder.run(p, h, m, SMALL)


@pytest.fixture(scope="session")
def tiny():
    rng = np.random.default_rng(0)
    ids, mask = jnp.ones((2, 3), jnp.int32), jnp.ones((2, 3), bool).at[1, 2].set(False)
    params = encoder.Encoder(CONFIG).init(jax.random.key(0), ids, mask)["params"]
    draw = lambda t: jnp.asarray(rng.normal(size=t.shape) / 2, t.dtype)  # noqa: E731
    params = {"layers": jax.tree.map(draw, params["layers"])}
    hidden = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32)
    heads = linked("heads", params, 4, OUTPUTS, [f"{ATTENTION}/out/kernel"])
    up = [f"{FFN}/up/kernel", f"{FFN}/up/bias"]
    columns = linked("columns", params, 6, up, [f"{FFN}/down/kernel"])
    adapter = jl.init(jax.random.key(1), full_model, params, hidden, mask,
                      methods={"kernel": jl.LoRA(rank=2, alpha=3.0)})  # fmt: skip
    return SimpleNamespace(
        params=params, hidden=hidden, mask=mask, groups=(heads, columns),
        adapter=adapter.replace(trainable=jax.tree.map(draw, adapter.trainable)),
        kept={
            "heads": jnp.asarray([[1, 0, 1, 0], [0, 0, 1, 1]], bool),
            "columns": jnp.asarray([[1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 0, 1]], bool),
        },
    )  # fmt: skip
