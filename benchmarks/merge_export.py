r"""Merging an adapter of 64 sites into its base, and writing it for others to read.

``python -m benchmarks.merge_export``: 64 dense layers of 768 x 768, LoRA of rank 8 on each.
``ratio_vs_peft``: PEFT's ``merge_and_unload`` / ``jl.merge`` compiled once with its parameters
donated: both write into the weights they are given, and leave a model without adapters.
``ratio_vs_peft_new``: the same against ``jl.merge`` that leaves its parameters and makes new ones.
``ratio_vs_peft_eager``: the same against ``jl.merge`` outside of ``jit``.
``save_ratio_vs_peft``: PEFT's ``save_pretrained`` / ``jl.io.save_peft``, the same files.
"""

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft import PeftModel

import jlora as jl
from benchmarks import encoder, timing

NAMES = {r"l(\d+)/kernel": r"l\1"}


def measure(settings: timing.Settings) -> dict[str, Any]:
    sites, width = (3, 8) if settings.quick else (64, 768)
    draw = np.random.default_rng(0)
    params = {
        f"l{k}": {"kernel": jnp.asarray(draw.normal(size=(width, width)), jnp.float32)}
        for k in range(sites)
    }

    def model(params, x):
        for layer in params.values():
            x = jnp.tanh(x @ layer["kernel"])
        return x

    method = {r"l\d+/kernel": jl.LoRA(encoder.RANK, encoder.ALPHA)}
    adapter = jl.init(jax.random.key(0), model, params, jnp.ones((1, width)), methods=method)
    adapter = adapter.replace(trainable=jax.tree.map(lambda t: t + 0.01, adapter.trainable))
    merge = jax.jit(jl.merge).lower(params, adapter).compile()
    in_place = jax.jit(jl.merge, donate_argnums=0).lower(params, adapter).compile()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        jl.io.save_peft(folder / "adapter", adapter, jl.io.NameMap(NAMES))
        torch.set_num_threads(settings.threads)
        peft = PeftModel.from_pretrained(_torch(params), folder / "adapter")
        _alike(merge(params, adapter), copy.deepcopy(peft).merge_and_unload())
        runs = {
            "in_place": timing.Fresh(
                lambda: jax.block_until_ready(jax.tree.map(jnp.copy, params)),
                lambda p: jax.block_until_ready(in_place(p, adapter)),
            ),
            "merge": lambda: jax.block_until_ready(merge(params, adapter)),
            "eager": lambda: jax.block_until_ready(jl.merge(params, adapter)),
            "peft": timing.Fresh(lambda: copy.deepcopy(peft), lambda m: m.merge_and_unload()),
            "save": lambda: jl.io.save_peft(folder / "ours", adapter, jl.io.NameMap(NAMES)),
            "peft_save": lambda: peft.save_pretrained(folder / "theirs"),
        }
        seconds = timing.interleave(runs, settings.count(15), settings, "merge_export")
    ms = timing.best(seconds)
    return {
        "ratio_vs_peft": ms["peft"] / ms["in_place"],
        "ratio_vs_peft_new": ms["peft"] / ms["merge"],
        "ratio_vs_peft_eager": ms["peft"] / ms["eager"],
        "save_ratio_vs_peft": ms["peft_save"] / ms["save"],
        "sites": sites,
        "ms": timing.spread(seconds),
    }


def _torch(params: Any) -> torch.nn.Module:
    """The same layers as a torch module, on the same weights."""
    layers = {}
    for name, layer in params.items():
        weight = torch.tensor(np.asarray(layer["kernel"]).T).contiguous()
        layers[name] = torch.nn.Linear(*weight.shape, bias=False)
        layers[name].weight = torch.nn.Parameter(weight, requires_grad=False)
    return torch.nn.ModuleDict(layers)


def _alike(ours: Any, theirs: torch.nn.Module) -> None:
    """Raises RuntimeError where merged weights differ by more than 1e-4."""
    for name, layer in ours.items():
        weight = theirs[name].weight.numpy()  # pyright: ignore[reportIndexIssue]
        difference = np.abs(np.asarray(layer["kernel"]).T - weight).max()
        if not difference < 1e-4:
            raise RuntimeError(f"{name}: merged weights differ by {difference:.2e}")


if __name__ == "__main__":
    timing.main("merge_export", measure)
