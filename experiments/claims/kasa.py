"""KaSA: without the noise of the weight, and in the form of an SVD, better than LoRA."""

import jax.numpy as jnp

from experiments.claims import text_methods as lib
from jlora.methods import KaSA
from jlora.penalties import kasa


def penalty(adapter, params):
    """The paper's, with its weights."""
    del params
    return kasa(adapter)


def without_top(adapter, params):
    """The adapter that leaves out the largest directions of the weights, not the smallest."""
    frozen = dict(adapter.frozen)
    for site, method in adapter.sites:
        w = params
        for part in site.path.split("/"):
            w = w[part]
        u, s, vt = jnp.linalg.svd(w, full_matrices=False)
        top = {"a0": u[..., : method.rank] * s[..., None, : method.rank],
               "b0": vt[..., : method.rank, :]}  # fmt: skip
        frozen[site.path] = {**frozen[site.path], **top}
    return adapter.replace(frozen=frozen)


METHOD, RATE = KaSA(rank=8, alpha=8.0), 8e-3
CLAIM = lib.claim(
    name="kasa",
    systems=("KaSA",),
    recipe=lib.on_attention("KaSA of rank 8", METHOD, RATE, penalty=penalty),
    baseline=lib.lora(8),
    reference="Wang 2024, 2412.06071: better than LoRA",
    others=(lib.on_attention(
        "KaSA without the 8 largest directions of the weight", METHOD, RATE, penalty=penalty,
        change=without_top,
    ),),
    parameters="at equal parameter count",
)  # fmt: skip
