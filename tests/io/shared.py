"""What several tests of files need: the relative error, moved adapters, golden models in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

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


def kernels(state, names, flax):
    """Torch's arrays of modules as {name: {kernel, bias}}.

    Kernels as Flax has them, [*window, in, out], or, but for the head's, as torch.
    """

    def kernel(name):
        t = state[f"{name}.weight"]
        return t.T if name == "head" else np.moveaxis(t, (0, 1), (-1, -2)) if flax else t

    return {
        name: {"kernel": jnp.asarray(kernel(name)), "bias": jnp.asarray(state[f"{name}.bias"])}
        for name in names
    }


def conv(p, x, flax, **options):
    """A convolution of x [b, channels, *window], of one to three axes, with a bias."""
    n = x.ndim - 2
    window = "DHW"[3 - n :]
    spec = ("NC" + window, (window + "IO") if flax else ("OI" + window), "NC" + window)
    options = {"window_strides": (1,) * n, "padding": ((0, 0),) * n, **options}
    y = lax.conv_general_dilated(x, p["kernel"], dimension_numbers=spec, **options)
    return y + p["bias"].reshape(1, -1, *(1,) * n)
