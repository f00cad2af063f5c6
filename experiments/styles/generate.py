"""Stage `generate`: adapters for every measured style, by every generator and its rivals.

A style is asked for by `shots` of its training pictures; of held-out styles nothing else is read
here. Rivals that need no generator: LoRA trained on the same pictures with the recipe of the zoo,
kept after several numbers of steps. The control `shuffled` is the flow, given the pictures of
another style. `strips` and `walk` are what the report draws.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.pipeline import Context, Done, Piece, Stage
from experiments.progress import Progress
from experiments.styles import conditions, generators, pdiff, zoo_training
from experiments.styles.generators import Examples
from experiments.styles.pictures import Drawn, World
from experiments.styles.zoo import Zoo
from experiments.styles.zoo_training import Recipe, Run
from experiments.workdir import load_tree, save_tree

STRIP = 5  # adapters of an interpolation, its ends included
WALKS = 5  # denoising trajectories


class Prepared(NamedTuple):
    """What is computed in every process."""

    features: conditions.Features
    given: Examples


class Written(NamedTuple):
    """The adapters."""

    styles: tuple[str, ...]  # measured ones, seen ones first
    trainable: dict[str, Any]  # method -> leaves [styles, samples, ...]
    forms: dict[str, jl.Adapter]  # method -> an adapter of its form, for frozen parts and sites
    strips: dict[str, Any]  # condition | weight | latent -> leaves [STRIP, ...]
    walk: np.ndarray  # [WALKS, steps + 1, S L] latents of Cond P-Diff on the way from noise
    latents: np.ndarray  # [m, S L] latents of the seen adapters
    prepared: Prepared

    def adapter(self, method: str, style: str, sample: int = 0) -> jl.Adapter:
        """One adapter."""
        k = self.styles.index(style)
        chosen = jax.tree.map(lambda x: x[k, sample], self.trainable[method])
        return self.forms[method].replace(trainable=chosen)

    def samples(self, method: str) -> int:
        """Adapters per style."""
        return jax.tree.leaves(self.trainable[method])[0].shape[1]

    def strip(self, kind: str, number: int) -> jl.Adapter:
        """An adapter of an interpolation."""
        chosen = jax.tree.map(lambda x: x[number], self.strips[kind])
        return self.forms["few" if kind == "latent" else "flow"].replace(trainable=chosen)


def measured(world: World) -> tuple[str, ...]:
    """Some seen styles, evenly spaced, and all that are held out."""
    seen = [style.name for style in world.at("seen")]
    count = min(world.settings.seen_measured, len(seen))
    places = np.linspace(0, len(seen) - 1, count).round().astype(int)
    return (*(seen[k] for k in places), *(s.name for s in world.styles if s.level != "seen"))


def prepare(context: Context) -> Prepared:
    """Features of all pictures, and what generators are fitted on."""
    world, zoo = context.products["data"], context.products["zoo"]
    features = conditions.all_features(world)
    return Prepared(features, generators.examples(world, zoo, features))


def asked(world: World, prepared: Prepared) -> jax.Array:
    """The condition of each measured style, centred, [styles, 2 F]."""
    raw = [conditions.condition(world, prepared.features, name) for name in measured(world)]
    return jnp.asarray(np.stack(raw)) - prepared.given.centre[None]


def pieces(context: Context, prepared: Prepared) -> list[Piece]:
    """A piece per generator, one for LoRA trained on the condition's pictures, one for figures."""
    names = [*generators.INTERPOLATING, "flow", "pdiff"]
    out = [Piece(n, 1, functools.partial(_generated, context, prepared, n)) for n in names]
    world: World = context.products["data"]
    size = min(world.settings.zoo_chunk, len(measured(world)))
    few = -(-len(measured(world)) // size) * size * max(world.settings.few)
    return [*out, Piece("few", few, functools.partial(_few, context))]


def _key(world: World, number: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(world.settings.seed), 200 + number)


def _stacked(adapters: list[jl.Adapter]) -> Any:
    return jax.tree.map(lambda *xs: np.stack(xs), *[one.trainable for one in adapters])


def _generated(
    context: Context, prepared: Prepared, name: str, folder: Path, bar: Progress
) -> None:
    world, zoo = context.products["data"], context.products["zoo"]
    settings, key = world.settings, _key(world, generators.METHODS.index(name))
    state = generators.fitted(name, key, prepared.given, settings)
    write = generators.writer(name, state, zoo, settings)
    given = asked(world, prepared)
    count = settings.samples_each if name in generators.DRAWN else 1

    def written(wanted: jax.Array) -> Any:
        rows = [
            _stacked([write(jax.random.fold_in(key, 100 * k + j), c) for j in range(count)])
            for k, c in enumerate(wanted)
        ]
        return jax.tree.map(lambda *xs: np.stack(xs), *rows)

    if name == "flow":
        save_tree(folder / "shuffled", written(jnp.roll(given, 1, axis=0)))
        save_tree(folder / "strips", _strips(world, zoo, prepared, given, write, key))
    if name == "pdiff":
        save_tree(folder / "figures", _figures(context, prepared, state, given, key))
    save_tree(folder / name, written(given))
    bar.step(1)


def ends(world: World) -> tuple[int, int]:
    """The two measured styles, both seen, between which is interpolated: first and last."""
    return 0, min(world.settings.seen_measured, len(world.at("seen"))) - 1


def _strips(
    world: World, zoo: Zoo, prepared: Prepared, given: jax.Array, write: generators.Generate,
    key: jax.Array,
) -> Any:  # fmt: skip
    """Adapters between two seen styles: by condition through the flow, and by their deltas."""
    first, last = ends(world)
    shares = [np.float32(k / (STRIP - 1)) for k in range(STRIP)]
    between = [write(key, (1 - u) * given[first] + u * given[last]) for u in shares]
    common = prepared.given.bank[0]
    names = measured(world)
    own = [generators.basis.project(common, zoo.last(names[k])).trainable for k in (first, last)]
    weights = [jax.tree.map(lambda a, b, u=u: (1 - u) * a + u * b, *own) for u in shares]
    return {
        "condition": _stacked(between),
        "weight": jax.tree.map(lambda *xs: np.stack(xs), *weights),
    }


def _figures(
    context: Context, prepared: Prepared, state: pdiff.Pdiff, given: jax.Array, key: jax.Array
) -> Any:
    """Cond P-Diff's latents: between two styles, of the zoo, and on the way from noise."""
    world, zoo = context.products["data"], context.products["zoo"]
    first, last = ends(world)
    names = measured(world)
    z = [pdiff.encode(state, pdiff.flat(zoo.last(names[k]))) for k in (first, last)]
    shares = [np.float32(k / (STRIP - 1)) for k in range(STRIP)]
    thetas = [pdiff.decode(state, (1 - u) * z[0] + u * z[1]) for u in shares]
    strip = _stacked([pdiff.unflat(zoo.template, theta) for theta in thetas])
    run = pdiff.sampler(generators.pdiff_config(world.settings))
    walks = [run(jax.random.fold_in(key, k), state, given[first])[1] for k in range(WALKS)]
    zoo_latents = jax.lax.map(lambda theta: pdiff.encode(state, theta), prepared.given.theta)
    return {
        "strip": strip,
        "walk": np.stack([np.asarray(w).reshape(len(w), -1) for w in walks]),
        "latents": np.asarray(zoo_latents).reshape(len(zoo_latents), -1),
    }


def few_recipe(world: World) -> Recipe:
    """The zoo's recipe, for as many steps as are tried."""
    s = world.settings
    return Recipe(max(s.few), s.few, s.zoo_lr, s.zoo_batch, s.drop, s.seed)


def _few(context: Context, folder: Path, bar: Progress) -> None:
    """LoRA trained on the pictures of each condition, in chunks of one compilation."""
    world: World = context.products["data"]
    names, plan = measured(world), few_recipe(world)
    size = min(world.settings.zoo_chunk, len(names))
    kept = []
    for start in range(0, len(names), size):
        chunk = [*names[start : start + size]]
        full = [*chunk, *[chunk[-1]] * (size - len(chunk))]
        runs = [Run(f"{name}/few", name, 0) for name in full]
        drawn = [shot(world, name) for name in full]
        work, done = folder / f"work_few_{start:03d}", folder / f"few_{start:03d}"
        if not done.exists():
            snapshots = zoo_training.train(world, plan, runs, drawn, work, bar)["snapshots"]
            save_tree(done, snapshots)
            shutil.rmtree(work)
        else:
            bar.step(size * plan.steps)
        snapshots = load_tree(done, zoo_training.empty(world, plan, size)["snapshots"])
        there = len(chunk)
        kept.append(jax.tree.map(lambda x, n=there: x[:n], snapshots))
    save_tree(folder / "few", jax.tree.map(lambda *xs: np.concatenate(xs), *kept))
    for old in folder.glob("few_*"):
        shutil.rmtree(old)


def shot(world: World, style: str) -> Drawn:
    """The pictures that a style is asked by, with their names."""
    rows = conditions.rows(world, style, conditions.QUERY)
    return Drawn(*(x[rows] for x in world.train[style]))


def read(context: Context, prepared: Prepared, done: Done) -> Written:
    """All adapters."""
    world, zoo = context.products["data"], context.products["zoo"]
    names, settings = measured(world), world.settings
    common = prepared.given.bank[0]

    def shapes(form: jl.Adapter, *axes: int) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*axes, *x.shape), jnp.float32), form.trainable
        )

    forms = {n: zoo.template if n in ("pdiff", "few") else common
             for n in (*generators.METHODS, "shuffled", "few")}  # fmt: skip
    counts: dict[str, int] = {"few": len(settings.few)}
    counts |= dict.fromkeys((*generators.DRAWN, "shuffled"), settings.samples_each)
    trainable = {
        name: load_tree(done.path / name, shapes(form, len(names), counts.get(name, 1)))
        for name, form in forms.items()
    }
    strip = shapes(common, STRIP)
    strips = load_tree(done.path / "strips", {"condition": strip, "weight": strip})
    walk, latents = done.info["walk"], done.info["latents"]
    like = {
        "strip": shapes(zoo.template, STRIP),
        "walk": jax.ShapeDtypeStruct(tuple(walk), jnp.float32),
        "latents": jax.ShapeDtypeStruct(tuple(latents), jnp.float32),
    }
    figures = load_tree(done.path / "figures", like)
    return Written(
        names, trainable, forms, {**strips, "latent": figures["strip"]}, figures["walk"],
        figures["latents"], prepared,
    )  # fmt: skip


def finish(context: Context, prepared: Prepared, folder: Path) -> dict[str, Any]:
    """Shapes that follow from the fitted autoencoder."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        about: Any = reader.metadata((folder / "figures").absolute())
    tree = getattr(about, "item_metadata", about)
    return {name: list(tree[name].shape) for name in ("walk", "latents")}


def describe(written: Written) -> str:
    """The adapters in one line."""
    shares = [np.asarray(x) for x in written.prepared.given.kept.values()]
    low = min(float(x.min()) for x in shares)
    return (
        f"adapters for {len(written.styles)} styles by {len(written.trainable)} ways; the common"
        f" basis keeps at least {low:.1%} of the energy of a site"
    )


STAGE = Stage(
    name="generate",
    inputs=("data", "zoo"),
    unit="step",
    prepare=prepare,
    pieces=pieces,
    finish=finish,
    read=read,
    describe=describe,
)
