"""Stage `rivals`: what a user could do instead with the same K texts per class.

Of every held-out task, with exactly the labelled texts in its condition: nearest class mean, k
nearest neighbours and logistic regression on frozen embeddings, LoRA trained on them, and their
discriminant as an adapter; and with all training texts, logistic regression. Whatever can be chosen
(neighbours, penalties, rates, steps, shrinkage) is chosen on the seen tasks: fitted on their own K
texts, compared on their validation texts. No test text and no held-out task has a part in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from threadpoolctl import ThreadpoolController

from experiments.pipeline import Context, Done, Piece, Stage
from experiments.progress import Progress
from experiments.stages import conditions, discriminants, few_shot
from experiments.stages.codec import Encoded
from experiments.stages.world import Rows, World
from experiments.workdir import REDO, read_json, save_array, write_json
from jlora.generation.baselines import knn, logistic, nearest_mean

NEIGHBOURS = (1, 3, 5, 9, 15)
PENALTIES = (100.0, 10.0, 1.0, 0.1, 0.01, 0.001)  # on a tie the larger one is chosen
FROZEN = ("nearest_mean", "knn", "logreg")  # of the K examples' frozen embeddings
KEYS = (*FROZEN, "lora_k", "discriminant", "logreg_full")

Classify = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # examples, labels, queries


class Frozen(NamedTuple):
    """What the seen tasks chose for classifiers of frozen embeddings."""

    neighbours: int  # k of knn, cut to the number of examples where there are fewer
    penalty: float  # of logistic regression on the K examples
    penalty_full: float  # on all training texts


class Rivals(NamedTuple):
    """The product of the stage."""

    accuracy: dict[str, dict[str, float]]  # held-out task -> method -> test accuracy
    frozen: Frozen
    lora: few_shot.Chosen
    discriminant: discriminants.Chosen
    features: np.ndarray  # [N, m] behind the discriminants' covariance


def classifiers(chosen: Frozen) -> dict[str, Classify]:
    """{method: scores of examples, labels, queries} of those that see the K examples."""

    def neighbours(x: np.ndarray, y: np.ndarray, q: np.ndarray) -> np.ndarray:
        return knn.scores(x, y, q, min(chosen.neighbours, len(x)))

    return {
        "nearest_mean": nearest_mean.scores,
        "knn": neighbours,
        "logreg": functools.partial(logistic.scores, penalty=chosen.penalty),
    }


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def right(world: World, classify: Classify, examples: Rows, rows: Rows) -> np.ndarray:
    """bool [n]: which labelled texts a classifier of the examples gets right."""
    x = world.embedding
    with _blas().limit(limits=1):  # threads that wait for each other cost L-BFGS 30 times the time
        predicted = classify(x[examples.index], examples.label, x[rows.index])
    return predicted.argmax(1) == rows.label


def choose(world: World, names: Sequence[str]) -> Frozen:
    """Neighbours and penalties of the best mean accuracy on validation texts of seen tasks."""
    score = {
        "knn": np.zeros(len(NEIGHBOURS)), "few": np.zeros(len(PENALTIES)),
        "full": np.zeros(len(PENALTIES)),
    }  # fmt: skip
    for name in names:
        few, every = conditions.examples(world, name), world.rows[name, "train"]
        rows = world.rows[name, "validation"]
        for k, count in enumerate(NEIGHBOURS):
            candidate = classifiers(Frozen(count, 1.0, 1.0))["knn"]
            score["knn"][k] += right(world, candidate, few, rows).mean()
        for k, penalty in enumerate(PENALTIES):
            candidate = functools.partial(logistic.scores, penalty=penalty)
            score["few"][k] += right(world, candidate, few, rows).mean()
            score["full"][k] += right(world, candidate, every, rows).mean()
    best = {key: int(value.argmax()) for key, value in score.items()}
    return Frozen(NEIGHBOURS[best["knn"]], PENALTIES[best["few"]], PENALTIES[best["full"]])


def full(world: World, chosen: Frozen, name: str, rows: Rows) -> np.ndarray:
    """bool [n]: the same of logistic regression on all training texts."""
    regression = functools.partial(logistic.scores, penalty=chosen.penalty_full)
    return right(world, regression, world.rows[name, "train"], rows)


def held_out(world: World, encoded: Encoded) -> list[str]:
    """Names of the tasks that the zoo did not train for the generator."""
    return [task.name for task in world.tasks if task.name not in encoded.names]


def pieces(context: Context, prepared: None) -> list[Piece]:
    """Classifiers, LoRA, discriminants."""
    world, encoded = (context.products[name] for name in STAGE.inputs)
    held = held_out(world, encoded)
    runs = len(held) + len(few_shot.FACTORS) * few_shot.TASKS
    return [
        Piece("frozen.json", 1, functools.partial(_frozen, world, encoded, held)),
        Piece("lora.json", runs, functools.partial(_lora, world, encoded, held)),
        Piece("discriminant.json", 1, functools.partial(_discriminant, world, encoded, held)),
    ]


def _frozen(world: World, encoded: Encoded, held: list[str], folder: Path, bar: Progress) -> None:
    chosen, accuracy = choose(world, encoded.names), {}
    for name in held:
        few, rows = conditions.examples(world, name), world.rows[name, "test"]
        hits_of = {key: right(world, c, few, rows) for key, c in classifiers(chosen).items()}
        hits_of["logreg_full"] = full(world, chosen, name, rows)
        accuracy[name] = {key: float(hits.mean()) for key, hits in hits_of.items()}
    write_json(folder / "frozen.json", {"chosen": chosen._asdict(), "accuracy": accuracy})
    bar.step(1)


def _lora(world: World, encoded: Encoded, held: list[str], folder: Path, bar: Progress) -> None:
    size, accuracy = few_shot.chunk_size(world, len(held)), {}
    chosen = few_shot.choose(world, encoded, size, bar)
    sets = [few_shot.Set(name, conditions.examples(world, name)) for name in held]
    if sets:
        factors, stops = [chosen.factor] * len(sets), chosen.stop + 1
        snapshot = few_shot.train(world, sets, factors, size, stops, bar)[-1]
        for k, name in enumerate(held):
            one = _row(snapshot, k)
            hits = few_shot.hits(world, encoded, name, world.rows[name, "test"], one)
            accuracy[name] = {"lora_k": float(hits.mean())}
    write_json(folder / "lora.json", {"chosen": chosen._asdict(), "accuracy": accuracy})


def _row(tree: Any, k: int) -> Any:
    """Row k of every leaf, as a bank of one."""
    return jax.tree.map(lambda x: x[k : k + 1], tree)


def _discriminant(
    world: World, encoded: Encoded, held: list[str], folder: Path, bar: Progress
) -> None:
    features, accuracy = discriminants.seen_features(world, encoded.names), {}
    chosen = discriminants.choose(world, encoded.names, features)
    if held:
        fitted = discriminants.fit(world, features, chosen)
        given = discriminants.means(world, [conditions.examples(world, name) for name in held])
        for name, condition in zip(held, given, strict=True):
            own = discriminants.adapter(world, fitted, name, condition)
            hits = discriminants.right(world, name, own, world.rows[name, "test"])
            accuracy[name] = {"discriminant": float(hits.mean())}
    save_array(folder / "features.npz", features=features)
    write_json(folder / "discriminant.json", {"chosen": chosen._asdict(), "accuracy": accuracy})
    bar.step(1)


def read(context: Context, prepared: None, done: Done) -> Rivals:
    """All figures, and what was chosen."""
    files = {name: read_json(done.path / f"{name}.json", dict, REDO) for name in
             ("frozen", "lora", "discriminant")}  # fmt: skip
    accuracy: dict[str, dict[str, float]] = {}
    for stored in files.values():
        for task, row in stored["accuracy"].items():
            accuracy.setdefault(task, {}).update(row)
    with np.load(done.path / "features.npz") as file:
        features = file["features"]
    return Rivals(
        accuracy,
        Frozen(**files["frozen"]["chosen"]),
        few_shot.Chosen(**files["lora"]["chosen"]),
        discriminants.Chosen(**files["discriminant"]["chosen"]),
        features,
    )


def describe(rivals: Rivals) -> str:
    """The rivals in one line."""
    if not rivals.accuracy:
        return "no held-out task; what rivals need is chosen on the seen ones"
    shown = ", ".join(
        f"{key} {100 * np.mean([row[key] for row in rivals.accuracy.values()]):.1f} %"
        for key in KEYS
    )
    return f"on {len(rivals.accuracy)} held-out tasks: {shown}"


STAGE = Stage(
    name="rivals",
    inputs=("data", "codec"),
    unit="fit",
    pieces=pieces,
    read=read,
    describe=describe,
)
