"""A tiny random Llama with PEFT directories of mixed ranks, for engine and server."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import presets
from jlora.models import decoder
from jlora.serving import forward
from jlora.serving.shelf import Shelf

CONFIG = decoder.DecoderConfig(
    "llama", vocab=40, layers=2, width=16, heads=4, kv_heads=2, head_width=4, ffn=24,
    max_positions=64, tied=True, init_std=0.3,
)  # fmt: skip
TARGETS = "layers/attention/(query|value|out)/kernel"
RANKS = {"small": 4, "large": 16, "middle": 8, "other": 4}


def random_adapter(params, rank, seed, targets=TARGETS):
    run = functools.partial(decoder.forward, config=CONFIG)
    ids = jnp.zeros((1, 2), jnp.int32)
    a = jl.init(jax.random.key(seed), run, params, ids, methods={targets: jl.LoRA(rank)})
    rng = np.random.default_rng(seed)
    move = lambda t: t + jnp.asarray(0.4 * rng.normal(size=t.shape), t.dtype)  # noqa: E731
    return a.replace(trainable=jax.tree.map(move, a.trainable))


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """(parameters, adapters by name, shelf of their PEFT directories)."""
    params = decoder.init(jax.random.key(0), CONFIG)
    root = tmp_path_factory.mktemp("adapters")
    adapters = {n: random_adapter(params, r, k) for k, (n, r) in enumerate(RANKS.items())}
    for name, adapter in adapters.items():
        jl.io.save_peft(root / name, adapter, presets.llama())
    sites = forward.adaptable(CONFIG, params, TARGETS)
    return params, adapters, Shelf(root, sites, presets.llama(), most=16)


@pytest.fixture(scope="session")
def oracle(llama):
    """Greedy answers of merged weights: the whole text once more for every token."""
    params, adapters, _ = llama
    run = jax.jit(functools.partial(decoder.forward, config=CONFIG))
    merged = {n: jl.merge(params, a) for n, a in adapters.items()} | {None: params}

    def answer(name, prompt, steps):
        row, every = list(prompt), []
        for _ in range(steps):
            padded = np.pad(np.asarray(row, np.int32), (0, 64 - len(row)))[None]
            logits = run(merged[name], jnp.asarray(padded)).logits[0, len(row) - 1]
            every.append(np.asarray(logits))
            row.append(int(jnp.argmax(logits)))
        return row[len(prompt) :], np.stack(every)

    return answer


@pytest.fixture
def foreign(llama, tmp_path):
    """A copy of the shelf with directories that must be refused, by name."""
    import shutil

    params, _, shelf = llama
    root = tmp_path / "root"
    shutil.copytree(shelf.root, root)
    outside = tmp_path / "outside"
    shutil.copytree(shelf.root / "small", outside)
    (root / "link").symlink_to(outside)
    (root / "inner").mkdir()
    shutil.copy(outside / "adapter_config.json", root / "inner")
    (root / "inner" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    shutil.copytree(outside, root / "damaged")
    (root / "damaged" / "adapter_model.safetensors").write_bytes(b"\x80\x02pickle")
    shutil.copytree(outside, root / "pickled")
    (root / "pickled" / "adapter_model.safetensors").rename(root / "pickled" / "adapter_model.bin")
    wide = random_adapter(params, 20, 9)
    jl.io.save_peft(root / "wide", wide, presets.llama())
    elsewhere = random_adapter(params, 2, 9, "layers/ffn/up/kernel")
    jl.io.save_peft(root / "elsewhere", elsewhere, presets.llama())
    shutil.copytree(outside, root / "config")
    config = json.loads((outside / "adapter_config.json").read_text())
    (root / "config" / "adapter_config.json").write_text(json.dumps({**config, "r": "x"}))
    return Shelf(root, shelf.sites, shelf.names, most=16)
