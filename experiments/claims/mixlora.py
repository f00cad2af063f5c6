r"""MixLoRA: experts mixed behind the feed-forward layer's nonlinearity, on tasks that are mixed.

==========  ==============================================================================
U, V        the kernels of a feed-forward layer, ``gelu(x U + u) V + v``, marked by `jl.block`
e           experts of it; the attention kernels have one LoRA, as in the paper
==========  ==============================================================================

Rows, training, tuning on validation rows and the control (the router shuffled) are those of
`routed_text`; here the feed-forward kernels are adapted too, in the baseline as well. MixLoRA has
8 experts of rank 2 there, 2 of them per token, and rank 8 at attention: 89,088 trained numbers per
layer, against 89,856 of LoRA of rank 13 at all six kernels. One expert of rank 16 for all tokens
shows what mixing adds.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.claims import routed_text as lib
from experiments.claims.protocol import Claim, Figures
from experiments.claims.routed_mix import Mix
from experiments.claims.routed_mix import mix as mix_of
from experiments.claims.text_merges import ASSETS, SIZE
from experiments.merging import text
from experiments.stages import world as world_lib
from jlora.methods import MixLoRA
from jlora.models import encoder, layers

FFN = tuple(f"layers/ffn/{s}/kernel" for s in ("up", "down"))
RATES = (8e-3 / 3, 8e-3, 8e-3 * 3)


class Setting(NamedTuple):
    """What is adapted, and how."""

    name: str  # in the record
    attention: Any  # method of the four attention kernels
    ffn: Any  # method of the two kernels of the feed-forward layer
    balance: float = 0.0  # weight of the balance loss; 0.01 in the paper


def rank(r: int) -> jl.LoRA:
    """LoRA at scale 1."""
    return jl.LoRA(rank=r, alpha=float(r))


EXPERTS = MixLoRA(rank(2), experts=8, top_k=2, router="ffn/up", block="ffn")
OURS = Setting("MixLoRA, 2 of 8 experts of rank 2", rank(8), EXPERTS, 0.01)
DENSE = Setting("LoRA of rank 13", rank(13), rank(13))
UNMIXED = Setting("one expert of rank 16", rank(8), rank(16))


def forward(params: Any, hidden: jax.Array, mask: jax.Array, model: Any) -> jax.Array:
    """`encoder.run` with the feed-forward layer marked as the block "ffn"."""
    bias = layers.mask_bias(mask)

    def norm(x: jax.Array, w: Any) -> jax.Array:
        return layers.layer_norm(x, w["scale"], w["bias"], model.norm_eps)

    def dense(x: jax.Array, kernel: jax.Array, w: Any) -> jax.Array:
        return x @ kernel + w["bias"].reshape(*[1] * (x.ndim - 1), -1)

    def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        held, ffn = w["attention"], w["ffn"]
        q, k, v = (dense(x, held[s]["kernel"], held[s]) for s in ("query", "key", "value"))
        y = layers.attention(q, k, v, bias, model.heads)
        x = norm(x + dense(y, held["out"]["kernel"], held["out"]), held["norm"])

        def body(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
            return dense(layers.gelu(dense(x, up, ffn["up"])), down, ffn["down"])

        y = jl.block("ffn", body)(x, ffn["up"]["kernel"], ffn["down"]["kernel"])
        return norm(x + y, ffn["norm"]), None

    return jax.lax.scan(layer, hidden, params["layers"])[0]


@functools.cache
def classifier(model: Any, scale: float) -> Callable[..., jax.Array]:
    """`stages.world.classifier` over `forward`, for tasks of two classes."""

    def classify(params: Any, hidden: jax.Array, mask: jax.Array, head: jax.Array) -> jax.Array:
        out = encoder.mean_pool(forward(params, hidden, mask, model), mask)
        return jnp.float32(scale) * jnp.einsum("bd,bcd->bc", out, head)

    return classify


@functools.cache
def mix(workdir: Path) -> Mix:
    """The mixture of the routed claims, with the marked model."""
    world = world_lib.build(text.REAL, workdir, None)
    return mix_of(workdir)._replace(apply=classifier(world.model, world.config.head_scale))


def fresh(data: Mix, setting: Setting, seed: int) -> jl.Adapter:
    """The adapter of a setting before training."""
    example = data.hidden[:1], data.mask[:1], data.heads[:1]
    methods = dict.fromkeys(lib.SITES, setting.attention) | dict.fromkeys(FFN, setting.ffn)
    return jl.init(jax.random.key(seed), data.apply, data.base, *example, methods=methods)


@functools.cache
def recipe(setting: Setting) -> lib.Recipe:
    """How `routed_text` trains and judges it."""
    return lib.Recipe(setting.name, setting.attention, balance=setting.balance)


@functools.cache
def tune(setting: Setting, workdir: Path) -> float:
    """The learning rate that is best on validation rows, with a seed of its own."""
    data, score = mix(workdir), {}
    for rate in RATES:
        start = fresh(data, setting, lib.TUNING)
        adapter, _ = lib.train(data, recipe(setting), start, rate, lib.TUNING)
        score[rate] = lib.judge(data, recipe(setting), adapter, data.validation).mean()
    return max(score, key=score.__getitem__)


@functools.cache
def run(setting: Setting, seed: int, workdir: Path) -> lib.Result:
    """A setting at its own best rate, trained and judged on test rows."""
    data, rate = mix(workdir), tune(setting, workdir)
    adapter, _ = lib.train(data, recipe(setting), fresh(data, setting, seed), rate, seed)
    accuracy, control = (
        tuple(lib.judge(data, recipe(setting), a, data.test).tolist())
        for a in (adapter, lib.shuffled(adapter))
    )
    size = sum(t.size for t in jax.tree.leaves(adapter.trainable))
    return lib.Result(accuracy, control, size, rate, rate in (RATES[0], RATES[-1]))


def figures(seed: int, workdir: Path) -> Figures:
    """Accuracy per task of MixLoRA, of LoRA of as many numbers, and of the shuffled router."""
    results = {s: run(s, seed, workdir) for s in (OURS, DENSE, UNMIXED)}
    more = {}
    for setting, result in results.items():
        more |= {f"{setting.name}: accuracy": float(np.mean(result.accuracy)),
                 f"{setting.name}: trained numbers": result.size,
                 f"{setting.name}: rate": result.rate,
                 f"{setting.name}: rate at an end of the grid": float(result.edge)}  # fmt: skip
    ours = results[OURS]
    return Figures(
        mix(workdir).names, ours.accuracy, results[DENSE].accuracy, ours.control, more=more
    )


CLAIM = Claim(
    name="mixlora",
    systems=("MixLoRA",),
    statement=f"test accuracy on {SIZE} tasks without a task's name: {OURS.name} > {DENSE.name}, "
    "at equal parameter count",
    reference="Li 2024, 2404.15159: better than LoRA in multi-task learning",
    baseline=DENSE.name,
    control="the trained adapter with its router shuffled",
    unit="accuracy",
    assets=ASSETS,
    run=figures,
)
