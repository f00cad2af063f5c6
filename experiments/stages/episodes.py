"""Stage `episodes`: a shared adapter and the discriminant of a task's examples on top of it.

The generator is `jlora.generation.generators.episodic`: an adapter of the upper layers that all
tasks share, with shrinkage, ridge and gain, trained in episodes over the seen tasks: a few labelled
texts of a task are solved in closed form, other texts of it are the loss. How many steps are taken
is chosen on the seen tasks of corpora that are left out of training; then all seen tasks train for
so many. With no steps it is the closed form on the base's own features.

On held-out tasks it is compared with what a user would do with the same shared adapter (nearest
class mean and logistic regression on its embeddings), and with its controls: labels of the examples
shuffled, and a shared adapter of random factors of the same norms.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.pipeline import Context, Done, Piece, Stage
from experiments.progress import Progress
from experiments.stages import conditions, episode_training, last_layer, rivals
from experiments.stages.codec import Encoded
from experiments.stages.episode_training import PATH, Fitted
from experiments.stages.rivals import Rivals
from experiments.stages.world import Rows, World
from experiments.workdir import REDO, load_tree, read_json, save_tree, write_json
from jlora.generation.baselines import logistic, nearest_mean
from jlora.generation.generators import episodic

KEYS = ("episodic", "episodic_mean", "episodic_logreg")
CONTROLS = ("shuffled", "random")


class Results(NamedTuple):
    """The product of the stage."""

    accuracy: dict[str, dict[str, float]]  # held-out task -> method -> test accuracy
    controls: dict[str, float]  # mean over the held-out tasks
    steps: int  # taken
    validation: list[float]  # accuracy on the corpora left out, by round; empty: none left out
    fitted: Fitted  # the generator


class Adapted(NamedTuple):
    """A world whose base has the shared adapter."""

    world: World
    fitted: Fitted


def adapted(world: World, fitted: Fitted) -> Adapted:
    """The base with the shared adapter merged: what all tasks have in common is computed once."""
    theta = episode_training.template(world).replace(trainable=fitted.learned.shared)
    return Adapted(world._replace(upper=jl.merge(world.upper, theta)), fitted)


_solve = jax.jit(episodic.solution)


def factors(
    fitted: Fitted, features: np.ndarray, labels: np.ndarray, head: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """(a [m, C], b [C, d]) of examples, scale included.

    Args:
      fitted: the generator. features: [n, m] under its shared adapter. labels: [n].
      head: class vectors [C, d] of the task.
    """
    given = fitted.learned, fitted.texts, jnp.asarray(features), jnp.asarray(labels)
    return _solve(*given, jnp.ones(len(labels)), jnp.asarray(head))


def solved(of: Adapted, head: np.ndarray, few: Rows) -> tuple[jax.Array, jax.Array]:
    """(a [m, C], b [C, d]) of labelled texts, scale included."""
    return factors(of.fitted, last_layer.features(of.world, few.index), few.label, head)


def adapter(of: Adapted, base: World, head: np.ndarray, few: Rows) -> jl.Adapter:
    """The generated adapter of labelled texts: an ordinary one of the base.

    Args:
      base: the world without the shared adapter. head: class vectors [C, d] of the task.
    """
    classes, template = len(head), episode_training.template(base, len(head))
    own = episode_training.template(base).replace(trainable=of.fitted.learned.shared)
    if classes != base.classes:
        own = episode_training.resized(own, template)
    return episodic.appended(template, own.trainable, PATH, *solved(of, head, few))


def right(of: Adapted, head: np.ndarray, few: Rows, rows: Rows) -> np.ndarray:
    """bool [n]: which labelled texts the generated adapter of `few` gets right."""
    a, b = solved(of, head, few)
    parts = last_layer.batches(of.world, rows.index)
    answers = [last_layer.answers(of.world, at, a, b, head)[:real] for at, real in parts]
    return np.concatenate(answers) == rows.label


def with_embeddings(of: Adapted, few: Rows, rows: Rows, penalty: float) -> dict[str, np.ndarray]:
    """{method: bool [n]} of classifiers of the shared adapter's embeddings."""
    x, q = (last_layer.embeddings(of.world, part.index) for part in (few, rows))
    scores = {
        "episodic_mean": nearest_mean.scores(x, few.label, q),
        "episodic_logreg": logistic.scores(x, few.label, q, penalty),
    }
    return {name: own.argmax(1) == rows.label for name, own in scores.items()}


def pieces(context: Context, prepared: None) -> list[Piece]:
    """Training and evaluation, in one."""
    world, encoded, others = (context.products[name] for name in STAGE.inputs)
    size = 2 * world.config.episode_steps + 1
    return [Piece("episodes.json", size, functools.partial(_run, world, encoded, others))]


def _run(world: World, encoded: Encoded, others: Rivals, folder: Path, bar: Progress) -> None:
    fitted, steps, validation = chosen(world, encoded.names, folder, bar)
    of, accuracy = adapted(world, fitted), {}
    controls: dict[str, list[float]] = {name: [] for name in CONTROLS}
    noise = adapted(world, randomised(world, fitted, encoded.names))
    for name in rivals.held_out(world, encoded):
        few, rows = conditions.examples(world, name), world.rows[name, "test"]
        head = world.head_of(name)[: world.task(name).classes]
        hits = {"episodic": right(of, head, few, rows)}
        hits |= with_embeddings(of, few, rows, others.frozen.penalty)
        accuracy[name] = {key: float(results.mean()) for key, results in hits.items()}
        rng = np.random.default_rng([world.config.data_seed, *name.encode()])
        moved = Rows(few.index, rng.permutation(few.label))
        controls["shuffled"].append(float(right(of, head, moved, rows).mean()))
        controls["random"].append(float(right(noise, head, few, rows).mean()))
    if not (folder / "fitted").exists():
        save_tree(folder / "fitted", fitted)
    figures = {name: float(np.mean(values)) for name, values in controls.items() if values}
    results = {"accuracy": accuracy, "controls": figures, "steps": steps, "validation": validation}
    write_json(folder / "episodes.json", results)
    bar.step(1)


def chosen(
    world: World, names: Sequence[str], folder: Path, bar: Progress
) -> tuple[Fitted, int, list[float]]:
    """(the generator, its steps, accuracy on the corpora left out after each round)."""
    steps = world.config.episode_steps
    kept, out = episode_training.parted(world, names)
    if not (out and steps):
        states = list(episode_training.rounds(world, names, steps, folder / "work_all", bar))
        bar.step(steps)  # those of the choice, which is not made
        return states[-1], steps, []
    validation: list[float] = []
    for state in episode_training.rounds(world, kept, steps, folder / "work_kept", bar):
        of = adapted(world, state)
        validation.append(float(np.mean([validated(of, name) for name in out])))
    part = min(int(np.argmax(validation)) * episode_training.ROUND, steps)
    states = list(episode_training.rounds(world, names, part, folder / "work_all", bar))
    bar.step(steps - part)  # those that are not taken
    return states[-1], part, validation


def validated(of: Adapted, name: str) -> float:
    """Accuracy on a task's validation texts by the generated adapter of its examples."""
    few, rows = conditions.examples(of.world, name), of.world.rows[name, "validation"]
    head = of.world.head_of(name)[: of.world.task(name).classes]
    return float(right(of, head, few, rows).mean())


def randomised(world: World, fitted: Fitted, names: Sequence[str]) -> Fitted:
    """The control: every factor of the shared adapter replaced by noise of its norm."""
    leaves, shape = jax.tree.flatten(fitted.learned.shared)
    rng = np.random.default_rng([world.config.seed, 5])
    new = []
    for leaf in leaves:
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        new.append(jnp.asarray(noise) * (jnp.linalg.norm(leaf) / np.linalg.norm(noise)))
    learned = dataclasses.replace(fitted.learned, shared=jax.tree.unflatten(shape, new))
    return episode_training.refreshed(world, names, Fitted(learned, fitted.texts))


def read(context: Context, prepared: None, done: Done) -> Results:
    """All figures, and the generator."""
    results: dict[str, Any] = read_json(done.path / "episodes.json", dict, REDO)
    like = episode_training.empty(context.products["data"])
    fitted = jax.tree.map(jnp.asarray, load_tree(done.path / "fitted", like))
    return Results(**results, fitted=fitted)


def describe(results: Results) -> str:
    """The stage in one line."""
    if not results.accuracy:
        return f"{results.steps} steps; no held-out task"
    shown = ", ".join(
        f"{key} {100 * np.mean([row[key] for row in results.accuracy.values()]):.1f} %"
        for key in KEYS
    )
    return f"{results.steps} steps; on {len(results.accuracy)} held-out tasks: {shown}"


STAGE = Stage(
    name="episodes",
    inputs=("data", "codec", "rivals"),
    unit="step",
    pieces=pieces,
    read=read,
    describe=describe,
)
