"""Stage `codec`: the zoo's adapters become canonical, normalised tokens and then latents.

Three codecs are fitted on the seen tasks' zoo runs (never on reference seeds or held-out tasks):
the generator's (`--codec`, one scale per site type), the paper's convolutional autoencoder on
weights normalised over the whole zoo (`pdiff_global`), and the same with the paper's per-task
statistics (`pdiff_task`), whose de-normalisation knows the task.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.config import Config
from experiments.pipeline import Context, Done, Piece, Stage
from experiments.progress import Progress
from experiments.stages.world import World
from experiments.stages.zoo import Zoo
from experiments.workdir import StageError, load_tree, save_tree, write_json
from jlora.generation.codecs import codec
from jlora.generation.tokens import canonical, normalise
from jlora.generation.tokens import site_tokens as tokens

PyTree = Any
VARIANTS = ("generator", "pdiff_global", "pdiff_task")
MODES = {"generator": "site_rms", "pdiff_global": "coordinate", "pdiff_task": "task"}


class Fitted(NamedTuple):
    """One codec with its normaliser."""

    norm: normalise.Normaliser  # fitted on the training rows
    state: Any  # codec state


class Encoded(NamedTuple):
    """The zoo as the generators see it: n rows = seen tasks x seeds x snapshots."""

    spec: tokens.TokenSpec  # layout of an adapter's tokens
    template: jl.Adapter  # frozen parts and sites
    reference: PyTree | None  # canonical reference factors (procrustes only)
    names: tuple[str, ...]  # the seen tasks, K of them
    x: np.ndarray  # [n, T, D] canonical tokens of the training rows
    task: np.ndarray  # [n] int32, position in `names`
    run: np.ndarray  # [n] int32, position in the zoo's runs
    fitted: dict[str, Fitted]  # by variant
    kinds: dict[str, str]  # variant -> codec name


def scales(template: jl.Adapter) -> dict[str, Any]:
    """path -> LoRA scale [*stack]."""
    return {path: leaves["scale"] for path, leaves in template.frozen.items()}


def to_tokens(encoded: Encoded, config: Config, trainable: PyTree) -> jax.Array:
    """[n, T, D] canonical tokens of a bank of trainables with leading axis n."""
    return _tokens(encoded.spec, config.canonical, encoded.template, encoded.reference, trainable)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _tokens(
    spec: tokens.TokenSpec, kind: str, template: jl.Adapter, reference: PyTree | None, bank: PyTree
) -> jax.Array:
    def one(tree: PyTree) -> jax.Array:
        return tokens.tokenise(
            spec, canonical.canonicalise(kind, tree, scales(template), reference)
        )

    return jax.vmap(one)(bank)


def to_trainable(encoded: Encoded, x: jax.Array) -> PyTree:
    """Trainable factors of one adapter from its canonical tokens [T, D]; vmap for banks."""
    return decode_tokens(encoded.spec, encoded.template, x)


def decode_tokens(spec: tokens.TokenSpec, template: jl.Adapter, x: jax.Array) -> PyTree:
    """The same from the layout and the frozen parts alone."""
    return canonical.unfold(tokens.detokenise(spec, x), scales(template))


def decode(kind: str, fitted: Fitted, z: jax.Array, task: jax.Array | None = None) -> jax.Array:
    """Canonical tokens [T, D] from latents z [S, L]; `task` only for the per-task normaliser."""
    return normalise.invert(fitted.norm, codec.by_name(kind).decode(fitted.state, z), task)


def latents(encoded: Encoded, variant: str) -> jax.Array:
    """[n, S, L] latents of the training rows."""
    fitted, kind = encoded.fitted[variant], encoded.kinds[variant]
    encode = codec.by_name(kind).encode
    data = _normalised(encoded, fitted.norm, variant)
    return jax.jit(jax.vmap(encode, in_axes=(None, 0)))(fitted.state, data)


def codec_config(config: Config, variant: str, rows: int) -> tuple[str, Any]:
    """(codec name, its hyper-parameters) of a variant."""
    name = config.codec if variant == "generator" else "conv_ae"
    kind = codec.by_name(name).config
    if name == "pca":
        return name, kind(components=min(config.latent, rows - 1), whiten=False)
    if name == "token_ae":
        return name, kind(latent=config.latent, steps=config.codec_steps)
    wide = config.pdiff_ae_width
    steps = config.codec_steps if variant == "generator" else config.pdiff_ae_steps
    return name, kind(dec_channels=(4, wide, wide, 8), steps=steps, batch=16, chunk=min(100, steps))


def training_rows(world: World, zoo: Zoo) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """(seen task names, run positions [m], task position of each [m]) of the zoo runs."""
    names = tuple(t.name for t in world.tasks if t.level in ("seen", "user"))
    seeds = range(world.config.zoo_seeds)
    runs = [zoo.of(name, seeds) for name in names]
    task = np.repeat(np.arange(len(names)), [len(r) for r in runs])
    return names, np.concatenate(runs), task.astype(np.int32)


def prepare(world: World, zoo: Zoo) -> Encoded:
    """Everything but the fitted codecs."""
    config = world.config
    names, runs, task = training_rows(world, zoo)
    rows = jax.tree.map(lambda x: x[runs].reshape(-1, *x.shape[2:]), zoo.trainable)
    copies = jax.tree.leaves(rows)[0].shape[0] // len(runs)
    reference = None
    if config.canonical == "procrustes":
        first = jax.tree.map(lambda x: jnp.asarray(x[runs[0], -1]), zoo.trainable)
        reference = canonical.canonicalise("balanced_svd", first, scales(zoo.template))
    spec = tokens.from_adapter(zoo.template)
    x = np.asarray(_tokens(spec, config.canonical, zoo.template, reference, rows))
    return Encoded(
        spec, zoo.template, reference, names, x,
        np.repeat(task, copies), np.repeat(runs, copies).astype(np.int32), {}, {},
    )  # fmt: skip


def _normalised(encoded: Encoded, norm: normalise.Normaliser, variant: str) -> jax.Array:
    use = variant == "pdiff_task"
    one = jax.vmap(lambda x, k: normalise.apply(norm, x, k if use else None))
    return one(jnp.asarray(encoded.x), jnp.asarray(encoded.task))


def _normaliser(encoded: Encoded, variant: str) -> normalise.Normaliser:
    return normalise.fit(
        MODES[variant],
        jnp.asarray(encoded.x),
        mask=encoded.spec.mask,
        types=encoded.spec.types if variant == "generator" else None,
        tasks=encoded.task if variant == "pdiff_task" else None,
    )


def pieces(context: Context, prepared: Encoded) -> list[Piece]:
    """The three codecs."""
    out = []
    for variant in VARIANTS:
        _, settings = codec_config(context.config, variant, len(prepared.x))
        make = functools.partial(_fit, context.config, prepared, variant)
        out.append(Piece(variant, getattr(settings, "steps", 1), make))
    return out


def _fit(config: Config, encoded: Encoded, variant: str, folder: Path, bar: Progress) -> None:
    name, settings = codec_config(config, variant, len(encoded.x))
    curve: list[float] = []

    def report(train_state, metrics):
        loss = metrics["loss"]
        bar.step(len(loss), loss=float(loss[-1]))
        bar.curve(int(train_state.step), {f"{variant}/loss": float(loss.mean())})
        curve.extend(float(v) for v in loss)

    key = jax.random.fold_in(jax.random.key(config.seed), 101)
    data = _normalised(encoded, _normaliser(encoded, variant), variant)
    state, _ = codec.by_name(name).fit(key, data, settings, callback=report)
    if name == "pca":
        bar.step(1)
    # Before the checkpoint, whose presence says that the piece is finished.
    write_json(folder / f"curves_{variant}.json", {variant: curve} if curve else {})
    save_tree(folder / variant, state)


def read(context: Context, prepared: Encoded, done: Done) -> Encoded:
    """The zoo as tokens, with the three fitted codecs."""
    fitted, kinds = {}, {}
    for variant in VARIANTS:
        name, settings = codec_config(context.config, variant, len(prepared.x))
        like = codec.template(name, settings, *prepared.x.shape[1:])
        state = jax.tree.map(jnp.asarray, load_tree(done.path / variant, like))
        fitted[variant] = Fitted(_normaliser(prepared, variant), state)
        kinds[variant] = name
    return prepared._replace(fitted=fitted, kinds=kinds)


def bank(encoded: Encoded, trainable: PyTree) -> jl.Adapter:
    """A bank from trainables with a leading axis; frozen parts are shared, so they are repeated."""
    n = jax.tree.leaves(trainable)[0].shape[0]
    if n == 0:
        raise StageError("an empty bank of adapters")
    frozen = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (n, *jnp.shape(x))), encoded.template.frozen
    )
    return encoded.template.replace(trainable=trainable, frozen=frozen)


def describe(encoded: Encoded) -> str:
    """The encoded zoo in one line."""
    kind = encoded.kinds["generator"]
    length, width = jax.eval_shape(lambda: latents(encoded, "generator")).shape[1:]
    return (
        f"{len(encoded.x)} adapters as {encoded.spec.length} tokens of {encoded.spec.dim} numbers;"
        f" {kind} keeps {length} x {width}"
    )


STAGE = Stage(
    name="codec",
    inputs=("data", "zoo"),
    unit="step",
    prepare=lambda context: prepare(context.products["data"], context.products["zoo"]),
    pieces=pieces,
    finish=lambda context, prepared, folder: {"rows": len(prepared.x)},
    read=read,
    describe=describe,
)
