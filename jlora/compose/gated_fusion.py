"""AutoLoRA, fusion: each output feature of each site decides how much of each adapter it takes.

===========  ==================================================================
y            output of the base, x W, [..., d_out]
l_n          output of adapter n, x u_n v_n (frozen)
w, b         trained gates of one site, each [d_out]; w_out is 1 at the start
s_n          strength of adapter n, from the context; 1 where it has none
===========  ==================================================================

.. math:: g_n = \\sigma\\bigl(w_b \\odot \\bar y + w_l \\odot \\bar l_n
          + w_x \\odot \\bar y \\odot \\bar l_n + b\\bigr), \\qquad
          y' = y + \\sum_n s_n \\, w_{out} \\odot g_n \\odot l_n

with bars for layer norm. The gates see the activation, so time and context enter through it; the
adapters share one set of gates, so their order and number do not matter, and with large b and
w_out = 1 the result is the plain sum of the adapters.

Paper: AutoLoRA 2025, arXiv:2508.02107.
Source: official code (DiffSynth-Studio), for the maths.
Deviates: the gates start small (0.02 N(0, 1); there N(0, 1)); strengths, which may change from step
to step of a denoising loop, do not enter the gates.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.contracts.composition import Composition, Denoiser
from jlora.core.adapter import Adapter
from jlora.core.init import key_of
from jlora.core.lift import lift
from jlora.core.method import Method
from jlora.core.site import Arrays
from jlora.merging.engine.inputs import gather
from jlora.types import Dynamic, Tree


@dataclasses.dataclass(frozen=True)
class GatedFusion(Method):
    """Frozen `u` [N, d_in, R], `v` [N, R, d_out]; trained `base`, `own`, `both`, `bias`, `out`.

    Strengths [N] may come in `ctx["strength"]`.
    """

    adapters: int

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out].

        Raises:
          ValueError: ctx["strength"] is not [N].
        """
        y, (n, d_in, r) = x @ w, p["u"].shape
        strength = jnp.asarray(ctx.get("strength", jnp.ones(n, y.dtype)))
        if strength.shape != (n,):
            raise ValueError(f"ctx['strength']: got shape {strength.shape}, expected ({n},)")
        h = x @ jnp.moveaxis(p["u"], 0, 1).reshape(d_in, n * r).astype(y.dtype)
        parts = jnp.einsum(
            "...nr,nro->...no", h.reshape(*h.shape[:-1], n, r), p["v"].astype(h.dtype)
        )
        return y + fuse(p, y, parts, strength)


def fuse(
    p: Arrays,
    y: Float[Array, "... d_out"],
    parts: Float[Array, "... N d_out"],
    strength: Float[Array, "N"],
) -> Float[Array, "... d_out"]:
    """What the adapters add to the output of the base.

    Args:
      p: the gates of the site.
      y: output of the base.
      parts: outputs of the adapters.
      strength: [N], how much of each counts after its gate.

    Returns:
      [..., d_out].
    """
    base, own = _norm(y)[..., None, :], _norm(parts)
    w = {k: _row(p[k], parts.ndim).astype(parts.dtype) for k in ("base", "own", "both", "bias")}
    gate = jax.nn.sigmoid(w["base"] * base + w["own"] * own + w["both"] * base * own + w["bias"])
    parts = parts * _row(strength, y.ndim)[..., None].astype(parts.dtype)
    return _row(p["out"], y.ndim).astype(y.dtype) * jnp.sum(gate * parts, axis=-2)


def denoise(
    model: Denoiser,
    params: Tree,
    gates: Adapter,
    strength: Float[Array, "N"],
    z: Float[Array, "..."],
    t: Float[Array, ""],
) -> Float[Array, "..."]:
    """One prediction of a denoiser in which gates fuse the adapters.

    Args:
      model: (params, z, t) -> prediction.
      params: weights of the base.
      gates: of `gated`.
      strength: of each adapter, [N].
      z: the noisy sample.
      t: its time.

    Returns:
      The prediction, as z.
    """
    return lift(model)(params, gates, z, t, ctx={"strength": strength})


def gated(
    key: PRNGKeyArray,
    adapters: Sequence[Adapter] | Adapter,
    *,
    bias: float = 0.0,
    missing: str = "error",
) -> Adapter:
    """Trainable gates around frozen adapters.

    Args:
      key: of the gates' first values.
      adapters: of any methods with factors and of any ranks; one Adapter is a bank of `jl.stack`.
      bias: b at the start; 0 lets about half of an adapter through, a large one all of it.
      missing: "error", or "zero": one without a site counts there as a zero delta.

    Returns:
      An adapter of `GatedFusion` at all sites.

    Raises:
      ValueError: adapters that `gather` refuses.
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


SYSTEM = Composition(
    name="AutoLoRA: gated fusion",
    paper="2025, 2508.02107",
    symbol="gated",
    evidence="gates by numpy; open gates are the plain sum; learns to leave adapters out",
    rows=(6,),
    tests=("", "tests/retrieval/weight_encoder_test.py"),
    missing="gates over the steps of a diffusion base",
    breaks={"single": "gates at the start let about half of an adapter through"},
    prepare=lambda adapters: gated(jax.random.key(0), adapters),
    denoise=denoise,
)
