"""How good a generator is on tasks that it never saw, against what a user could do instead.

Of every held-out task, K texts of each class are drawn `DRAWS` times; every method sees those alone
and is asked for the task's test texts. LoRA is trained on the first draw of `LORA` tasks a level:
it costs a thousand times what the others do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.progress import Progress
from experiments.stages import few_shot, layered, rivals, zoo_training
from experiments.stages.codec import Encoded
from experiments.stages.few_shot import Chosen, Set
from experiments.stages.layered import Fitted
from experiments.stages.rivals import Frozen
from experiments.stages.world import Rows, World
from experiments.workdir import read_json, write_json
from jlora.generation.tokens import site_tokens

DRAWS = 3  # of the examples
LORA = 2  # tasks of a level
FEW = ("nearest_mean", "knn", "logreg")  # on the base's embeddings
KEYS = ("generated", *FEW, "lora_k", "forgetful", "shuffled", "logreg_full")

Accuracy = dict[str, dict[str, list[float]]]  # task -> method -> of each draw


class Figures(NamedTuple):
    """What was measured."""

    accuracy: Accuracy  # of held-out tasks
    lora: Chosen | None  # how LoRA was trained on the examples; None: it was not


def drawn(world: World, name: str, draw: int) -> Rows:
    """K different training texts of each class, or all where there are fewer.

    Args:
      world: its settings say K.
      name: of the task.
      draw: its number.
    """
    rows, k = world.rows[name, "train"], world.config.examples
    rng = np.random.default_rng([world.config.data_seed, draw, *name.encode()])
    sides = [np.unique(rows.index[rows.label == c]) for c in range(world.task(name).classes)]
    chosen = [rng.permutation(own)[:k] for own in sides]
    label = np.repeat(np.arange(len(chosen), dtype=np.int32), [len(own) for own in chosen])
    return Rows(np.concatenate(chosen), label)


def measure(
    world: World,
    fitted: Fitted,
    frozen: Frozen,
    folder: Path,
    workdir: Path,
    lora: bool = True,
    measured: int = 0,
) -> Figures:
    """Accuracy on all held-out tasks.

    Args:
      world: of all tasks.
      fitted: the generator.
      frozen: settings of the rivals.
      folder: of the run: what is there of a killed one is read, not measured again.
      workdir: for the curves of the bars.
      lora: whether LoRA is trained on the examples too.
      measured: tasks of each level; 0: all.

    Returns:
      Every figure.
    """
    names = spread(world, measured)
    few = {name: [drawn(world, name, k) for k in range(DRAWS)] for name in names}
    path = folder / "accuracy.json"
    if not path.is_file():
        write_json(path, _closed(world, fitted, frozen, few, workdir))
    out: Accuracy = read_json(path, dict, f"delete {path}")
    if not (names and lora):
        return Figures(out, None)
    path = folder / "lora.json"
    if not path.is_file():
        chosen, accuracy = _lora(world, names, few, workdir)
        write_json(path, {"chosen": chosen._asdict(), "accuracy": accuracy})
    kept = read_json(path, dict, f"delete {path}")
    for name, value in kept["accuracy"].items():
        out[name]["lora_k"] = [value]
    return Figures(out, Chosen(**kept["chosen"]))


def spread(world: World, count: int) -> list[str]:
    """Names of held-out tasks, at most so many of each level, spread over its list.

    Args:
      world: of all tasks.
      count: of each level; 0: all.
    """
    every = [task for task in world.tasks if task.level != "seen"]
    levels = dict.fromkeys(task.level for task in every)
    parts = [[task.name for task in every if task.level == level] for level in levels]
    return [name for own in parts for name in own[:: -(-len(own) // (count or len(own)))]]


def _closed(
    world: World, fitted: Fitted, frozen: Frozen, few: dict[str, list[Rows]], workdir: Path
) -> Accuracy:
    """Of all methods that no step of training is needed for."""
    out: Accuracy = {}
    with Progress(workdir, "measure", len(few), "task") as bar:
        for name, draws in few.items():
            out[name] = _task(world, fitted, frozen, name, draws)
            bar.step(1)
    return out


def _task(
    world: World, fitted: Fitted, frozen: Frozen, name: str, few: Sequence[Rows]
) -> dict[str, list[float]]:
    """{method: accuracy of each draw} of one task."""
    rows = world.rows[name, "test"]
    head = world.head_of(name)[: world.task(name).classes]
    out: dict[str, list[float]] = {}

    def note(key: str, hits: np.ndarray) -> None:
        out.setdefault(key, []).append(float(hits.mean()))

    index = np.concatenate([each.index for each in few])
    features, asked = layered.read(world, index).features, layered.right(world, rows, head)
    stops = np.cumsum([len(each.index) for each in few])
    forgetful = fitted._replace(known=None)
    for k, (each, stop) in enumerate(zip(few, stops, strict=True)):
        own = features[stop - len(each.index) : stop]
        rng = np.random.default_rng([world.config.data_seed, k, *name.encode()])
        ways = {
            "generated": (fitted, each.label),
            "forgetful": (forgetful, each.label),
            "shuffled": (fitted, rng.permutation(each.label)),
        }
        for key, (generator, label) in ways.items():
            note(key, asked(*layered.factors(world, generator, own, label, head)))
        for key, classify in rivals.classifiers(frozen).items():
            note(key, rivals.right(world, classify, each, rows))
    note("logreg_full", rivals.full(world, frozen, name, rows))
    return out


def _lora(
    world: World, names: Sequence[str], few: dict[str, list[Rows]], workdir: Path
) -> tuple[Chosen, dict[str, float]]:
    """How LoRA is trained on the first draw, and {task: accuracy} of some tasks of each level."""
    some = [name for name in spread(world, LORA) if name in names]
    template = zoo_training.template(world, world.config.seed)
    nothing: Any = np.zeros((0,))
    seen = tuple(world.names("seen"))
    spec = site_tokens.from_adapter(template)
    encoded = Encoded(spec, template, None, seen, nothing, nothing, nothing, {}, {})
    size = few_shot.chunk_size(world, len(some))
    total = len(some) + len(few_shot.FACTORS) * min(few_shot.TASKS, len(seen))
    with Progress(workdir, "few", total, "run") as bar:
        chosen = few_shot.choose(world, encoded, size, bar)
        sets = [Set(name, few[name][0]) for name in some]
        factors = [chosen.factor] * len(sets)
        accuracies = few_shot.train(world, sets, factors, size, chosen.stop + 1, bar)[-1]
    out = {}
    for k, name in enumerate(some):
        one = jax.tree.map(lambda x, k=k: x[k : k + 1], accuracies)
        hits = few_shot.hits(world, encoded, name, world.rows[name, "test"], one)
        out[name] = float(hits.mean())
    return chosen, out
