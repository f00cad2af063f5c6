"""What several tests of files need: the relative error, moved adapters, golden models in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import safetensors_file


def error(got, want):
    """The largest absolute difference over the largest absolute value of `want`."""
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def trained(fn, params, args, methods, seed=0):
    """A fresh adapter with noise on every trainable array."""
    fresh = jl.init(jax.random.key(seed), fn, params, *args, methods=methods)
    rng = np.random.default_rng(seed)
    moved = jax.tree.map(
        lambda t: t + jnp.asarray(0.2 * rng.normal(size=t.shape), t.dtype), fresh.trainable
    )
    return fresh.replace(trainable=moved)


def torch_model(model):
    """The golden model, 'bert' or 'llama', as transformers has it."""
    transformers = pytest.importorskip("transformers")
    cls = transformers.BertModel if model.kind == "bert" else transformers.LlamaForCausalLM
    return cls.from_pretrained(model.path / "base").eval()


def torch_output(module, model):
    """Hidden states (BERT) or logits (Llama) of `module` on the golden inputs."""
    torch = pytest.importorskip("torch")
    state, _ = safetensors_file.read(model.path / "base.safetensors")
    inputs = {k: torch.from_numpy(state[k]) for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return module.eval()(**inputs)[0].numpy()
