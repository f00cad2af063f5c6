"""Stage `evaluate`: the flow loss of held-out pictures under every adapter of a style.

The primary figure: pictures, times and noise are the same for all adapters, so their differences
have little variance, and no sampler and no guidance is in it. The names of the pictures were held
out from base D, the pictures themselves from every adapter.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.pipeline import Context, Done, Piece, Stage
from experiments.progress import Progress
from experiments.styles import basis, generators
from experiments.styles.generate import Written
from experiments.styles.pictures import Drawn, World
from experiments.styles.zoo import Zoo
from experiments.styles.zoo_training import held_out_loss
from experiments.workdir import read_json, write_json

BASE, OWN, PROJECTED, SOUP, FEW = "base", "original", "projected", "soup", "few"


class Scores(NamedTuple):
    """Losses of all measured styles."""

    styles: tuple[str, ...]
    level: dict[str, str]  # of each style
    loss: dict[str, dict[str, float]]  # method -> style -> mean over samples
    few_steps: int  # of LoRA trained on the condition's pictures, chosen on seen styles


def own(zoo: Zoo, written: Written, name: str, style: str) -> jl.Adapter:
    """An adapter that is not generated: of a style's own training.

    Args:
      zoo: the trained adapters.
      written: says what the common basis is.
      name: OWN (the end of the first run), PROJECTED (the same in the common basis) or SOUP (the
        mean delta of the style's runs and snapshots, in that basis).
      style: whose.
    """
    if name == OWN:
        return zoo.last(style)
    common = written.forms["flow"]
    if name == PROJECTED:
        return basis.project(common, zoo.last(style))
    rows = zoo.of(style)
    trained = jax.tree.map(lambda x: jnp.asarray(x[rows].reshape(-1, *x.shape[2:])), zoo.trainable)
    count = jax.tree.leaves(trained)[0].shape[0]
    bank = zoo.template.replace(trainable=trained, frozen=generators.banked(zoo.template, count))
    inside = jax.vmap(lambda one: basis.project(common, one).trainable)(bank)
    return common.replace(trainable=jax.tree.map(lambda x: x.mean(0), inside))


def adapters(context: Context, style: str) -> dict[str, list[jl.Adapter | None]]:
    """Every adapter that is measured on a style, by method; None is the base alone."""
    world, zoo = context.products["data"], context.products["zoo"]
    written: Written = context.products["generate"]
    level = {s.name: s.level for s in world.styles}[style]
    kinds = (OWN, PROJECTED, SOUP) if level == "seen" else (OWN, PROJECTED)
    out: dict[str, list[jl.Adapter | None]] = {BASE: [None]}
    out |= {name: [own(zoo, written, name, style)] for name in kinds}
    for name in (*generators.METHODS, "shuffled"):
        out[name] = [written.adapter(name, style, j) for j in range(written.samples(name))]
    for number, steps in enumerate(world.settings.few):
        out[f"{FEW} {steps}"] = [written.adapter(FEW, style, number)]
    return out


def tuned(world: World, adapter: jl.Adapter | None) -> Any:
    """The base's parameters with an adapter merged."""
    return world.base.params if adapter is None else jl.merge(world.base.params, adapter)


def pieces(context: Context, prepared: None) -> list[Piece]:
    """A file per style."""
    written: Written = context.products["generate"]
    return [
        Piece(f"style_{k:03d}.json", 1, functools.partial(_measure, context, k))
        for k in range(len(written.styles))
    ]


def _measure(context: Context, k: int, folder: Path, bar: Progress) -> None:
    world: World = context.products["data"]
    style, s = context.products["generate"].styles[k], world.settings
    drawn = Drawn(*(x[: s.loss_pictures] for x in world.test[style]))
    measured = {
        name: [float(held_out_loss(world, tuned(world, one), drawn, s.loss_times).mean())
               for one in some]
        for name, some in adapters(context, style).items()
    }  # fmt: skip
    write_json(folder / f"style_{k:03d}.json", {"style": style, "loss": measured})
    bar.step(1)


def read(context: Context, prepared: None, done: Done) -> Scores:
    """The losses, and the number of steps of the few-shot rival that is best on seen styles."""
    world, written = context.products["data"], context.products["generate"]
    level = {s.name: s.level for s in world.styles}
    loss: dict[str, dict[str, float]] = {}
    for k, style in enumerate(written.styles):
        file = read_json(done.path / f"style_{k:03d}.json", dict, f"delete {done.path}")
        for name, values in file["loss"].items():
            loss.setdefault(name, {})[style] = float(np.mean(values))
    seen = tuple(style for style in written.styles if level[style] == "seen")
    best = chosen_steps(loss, seen, world.settings.few)
    loss[FEW] = loss[f"{FEW} {best}"]
    return Scores(written.styles, {x: level[x] for x in written.styles}, loss, best)


def chosen_steps(
    loss: dict[str, dict[str, float]], seen: tuple[str, ...], tried: tuple[int, ...]
) -> int:
    """The number of steps of least mean loss on some styles.

    Args:
      loss: method -> style -> loss.
      seen: the styles to choose on.
      tried: the numbers.
    """
    mean = {n: float(np.mean([loss[f"{FEW} {n}"][x] for x in seen])) for n in tried}
    return min(mean, key=lambda n: mean[n])


def describe(scores: Scores) -> str:
    """The losses in one line."""
    out = [x for x in scores.styles if scores.level[x] != "seen"]
    shown = (BASE, OWN, "ridge", "flow", "pdiff")
    means = {name: float(np.mean([scores.loss[name][x] for x in out])) for name in shown}
    return "held-out loss " + ", ".join(f"{name} {value:.4f}" for name, value in means.items())


STAGE = Stage(
    name="evaluate",
    inputs=("data", "zoo", "generate"),
    unit="style",
    pieces=pieces,
    read=read,
    describe=describe,
)
