"""AutoLoRA, fusion: each output feature of each site decides how much of each adapter it takes.

===========  ==================================================================
y            output of the base, x W, [..., d_out]
l_n          output of adapter n, x u_n v_n (frozen)
t            time of the denoising step, in [0, 1]
w, b         trained gates of one site, each [d_out]; w_out is 1 at the start
W_k          what cosine k of the time adds to w_b, w_l, w_x and b; 0 at the start
s_n          strength of adapter n, from the context; 1 where it has none
===========  ==================================================================

.. math:: (w_b, w_l, w_x, b)(t) = (w_b, w_l, w_x, b) + \\sum_{k=1}^{K} \\cos(\\pi k t) \\, W_k

.. math:: g_n = \\sigma\\bigl(w_b(t) \\odot \\bar y + w_l(t) \\odot \\bar l_n
          + w_x(t) \\odot \\bar y \\odot \\bar l_n + b(t)\\bigr), \\qquad
          y' = y + \\sum_n s_n \\, w_{out} \\odot g_n \\odot l_n

with bars for layer norm. Every site of every layer has gates of its own; the adapters share them,
so their order and number do not matter, and with large b and w_out = 1 the result is the plain sum
of the adapters.

Paper: AutoLoRA 2025, arXiv:2508.02107.
Source: official code (DiffSynth-Studio), for the maths without t; abstract, for gates that differ
between the steps.
Deviates: the gates start small (0.02 N(0, 1); there N(0, 1)). There the step enters through the
activation alone; that it moves the coefficients (K > 0) is how this file reads the abstract.
Strengths, which may change from step to step of a denoising loop, do not enter the gates.
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

TIMED = ("base", "own", "both", "bias")  # coefficients that the time may move


@dataclasses.dataclass(frozen=True)
class GatedFusion(Method):
    """Frozen `u` [N, d_in, R], `v` [N, R, d_out]; trained `base`, `own`, `both`, `bias`, `out`.

    Strengths [N] may come in `ctx["strength"]`. With cosines there is `time` [K, 4, d_out] too, in
    the order of `TIMED`, and the time of the step, a scalar, must come in `ctx["time"]`.
    """

    adapters: int
    cosines: int = 0  # K

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x [..., d_in] -> [..., d_out].

        Raises:
          ValueError: ctx["strength"] is not [N]; ctx["time"] is missing or no scalar where the
            gates have cosines.
        """
        y, (n, d_in, r) = x @ w, p["u"].shape
        strength = jnp.asarray(ctx.get("strength", jnp.ones(n, y.dtype)))
        if strength.shape != (n,):
            raise ValueError(f"ctx['strength']: got shape {strength.shape}, expected ({n},)")
        time = ctx.get("time") if self.cosines else None
        if self.cosines and (time is None or jnp.shape(time)):
            got = "nothing" if time is None else f"shape {jnp.shape(time)}"
            raise ValueError(f"ctx['time']: got {got}, expected a scalar: the time of the step")
        h = x @ jnp.moveaxis(p["u"], 0, 1).reshape(d_in, n * r).astype(y.dtype)
        parts = jnp.einsum(
            "...nr,nro->...no", h.reshape(*h.shape[:-1], n, r), p["v"].astype(h.dtype)
        )
        return y + fuse(p, y, parts, strength, time)


def fuse(
    p: Arrays,
    y: Float[Array, "... d_out"],
    parts: Float[Array, "... N d_out"],
    strength: Float[Array, "N"],
    time: Float[Array, ""] | None = None,
) -> Float[Array, "... d_out"]:
    """What the adapters add to the output of the base.

    Args:
      p: the gates of the site.
      y: output of the base.
      parts: outputs of the adapters.
      strength: [N], how much of each counts after its gate.
      time: t of the step; None where the gates have no cosines.

    Returns:
      [..., d_out].
    """
    base, own = _norm(y)[..., None, :], _norm(parts)
    rows = jnp.stack([p[name] for name in TIMED])
    if time is not None:
        k = jnp.arange(1, len(p["time"]) + 1, dtype=rows.dtype)
        waves = jnp.cos(jnp.pi * k * jnp.asarray(time, rows.dtype))
        rows = rows + jnp.einsum("k,kco->co", waves, p["time"])
    w = {
        name: _row(row, parts.ndim).astype(parts.dtype)
        for name, row in zip(TIMED, rows, strict=True)
    }
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
    return lift(model)(params, gates, z, t, ctx={"strength": strength, "time": t})


def gated(
    key: PRNGKeyArray,
    adapters: Sequence[Adapter] | Adapter,
    *,
    bias: float = 0.0,
    cosines: int = 0,
    missing: str = "error",
) -> Adapter:
    """Trainable gates around frozen adapters.

    Args:
      key: of the gates' first values.
      adapters: of any methods with factors and of any ranks; one Adapter is a bank of `jl.stack`.
      bias: b at the start; 0 lets about half of an adapter through, a large one all of it.
      cosines: K, how finely the gates may differ between the steps of a denoising loop; 0: not at
        all, which is the only choice for models without a time.
      missing: "error", or "zero": one without a site counts there as a zero delta.

    Returns:
      An adapter of `GatedFusion` at all sites.

    Raises:
      ValueError: adapters that `gather` refuses; a negative number of cosines.
    """
    if cosines < 0:
        raise ValueError(f"cosines: got {cosines}, expected at least 0")
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
        if cosines:
            ends["time"] = jnp.zeros((*site.stack, cosines, len(TIMED), site.d_out), u.dtype)
        trainable[site.path] = {**gates, **ends}
    method = GatedFusion(weights.shape[0], cosines)
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
    evidence="gates by numpy, at times too; open gates are the plain sum; learns to leave adapters "
    "out, and which one to take in which step",
    rows=(6,),
    tests=("tests/retrieval/weight_encoder_test.py",),
    claim="autolora_gate",
    breaks={"single": "gates at the start let about half of an adapter through"},
    prepare=lambda adapters: gated(jax.random.key(0), adapters, cosines=2),
    denoise=denoise,
)
