"""AutoLoRA, fusion: each output feature of each site decides how much of each adapter it takes.

===========  ==================================================================
y            output of the base, x W, [..., d_out]
l_n          output of adapter n, x u_n v_n (frozen)
w, b         trained gates of one site, each [d_out]; w_out is 1 at the start
===========  ==================================================================

.. math:: g_n = \\sigma\\bigl(w_b \\odot \\bar y + w_l \\odot \\bar l_n
          + w_x \\odot \\bar y \\odot \\bar l_n + b\\bigr), \\qquad
          y' = y + \\sum_n w_{out} \\odot g_n \\odot l_n

with bars for layer norm. The gates see the activation, so time and context enter through it; the
adapters share one set of gates, so their order and number do not matter, and with large b and
w_out = 1 the result is the plain sum of the adapters.

Paper: AutoLoRA 2025, arXiv:2508.02107.
Source: official code (DiffSynth-Studio), for the maths.
Deviates: the gates start small (0.02 N(0, 1); there N(0, 1)).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jlora.core.adapter import Adapter
from jlora.core.init import key_of
from jlora.core.method import Method
from jlora.core.site import Arrays
from jlora.merging.engine.inputs import gather
from jlora.system import System


@dataclasses.dataclass(frozen=True)
class GatedFusion(Method):
    """Frozen `u` [N, d_in, R], `v` [N, R, d_out]; trained `base`, `own`, `both`, `bias`, `out`."""

    adapters: int

    def apply(self, x: Any, w: Any, p: Arrays, ctx: Mapping[str, Any]) -> Any:
        """x [..., d_in] -> [..., d_out]."""
        y, (n, d_in, r) = x @ w, p["u"].shape
        h = x @ jnp.moveaxis(p["u"], 0, 1).reshape(d_in, n * r).astype(y.dtype)
        parts = jnp.einsum(
            "...nr,nro->...no", h.reshape(*h.shape[:-1], n, r), p["v"].astype(h.dtype)
        )
        return y + fuse(p, y, parts)


def fuse(p: Arrays, y: Array, parts: Array) -> Array:
    """What is added to y [..., d_out] of the outputs of the adapters [..., N, d_out]."""
    base, own = _norm(y)[..., None, :], _norm(parts)
    w = {k: _row(p[k], parts.ndim).astype(parts.dtype) for k in ("base", "own", "both", "bias")}
    gate = jax.nn.sigmoid(w["base"] * base + w["own"] * own + w["both"] * base * own + w["bias"])
    return _row(p["out"], y.ndim).astype(y.dtype) * jnp.sum(gate * parts, axis=-2)


def gated(
    key: Array, adapters: Sequence[Adapter] | Adapter, *, bias: float = 0.0, missing: str = "error"
) -> Adapter:
    """Trainable gates around frozen `adapters` (any methods with factors, any ranks).

    Raises ValueError as `gather` does.
    """
    bank, weights, sites = gather(adapters, missing=missing)
    trainable, frozen = {}, {}
    for site in sites:
        u, v = bank[site.path]  # type: ignore[misc]
        axis, shape = len(site.stack), (*site.stack, site.d_out)
        frozen[site.path] = {"u": jnp.moveaxis(u, 0, axis), "v": jnp.moveaxis(v, 0, axis)}
        draws = jax.random.split(key_of(key, site.path), 3)
        gates = {
            name: 0.02 * jax.random.normal(k, shape, u.dtype)
            for name, k in zip(("base", "own", "both"), draws, strict=True)
        }
        ends = {"bias": jnp.full(shape, bias, u.dtype), "out": jnp.ones(shape, u.dtype)}
        trainable[site.path] = {**gates, **ends}
    method = GatedFusion(weights.shape[0])
    return Adapter(trainable, frozen, tuple((site, method) for site in sites))


def _norm(x: Array) -> Array:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _row(x: Array, ndim: int) -> Array:
    return x.reshape(*[1] * (ndim - 1), -1)


SYSTEM = System(
    name="AutoLoRA: gated fusion",
    paper="2025, 2508.02107",
    symbol="gated",
    evidence="gates by numpy; open gates are the plain sum; learns to leave adapters out",
    rows=(6,),
    tests=("", "tests/retrieval/weight_encoder_test.py"),
    missing="gates over the steps of a diffusion base",
)
