r"""How good merged adapters of a vision transformer are: tasks with different classes.

    python -m experiments.merging.vision --workdir=runs/merging_vision --docs=docs

The base is small and pre-trained here, in a few minutes, by instance recognition (`Spec`, pictures
in `vision_data`). Each task gets a frozen head of prototypes; LoRA adapters of all tasks
and seeds are trained in one vmapped program a rank, and merged and judged by the same code as those
of the text setting (`experiments.merging.text`).

Symbols: f the mean of the last states of a picture, :math:`\mu_k` the mean of f of the base over
the training rows of class k, :math:`\mu` the mean of those, C the covariance of f within classes
(``spec.ridge`` times its mean variance added to its diagonal), s = ``spec.head_scale``.

.. math:: \text{logit}_k(x) = s\, h_k \cdot (f(x) - \mu), \qquad
          h_k = C^{-1} (\mu_k - \mu) / \lVert C^{-1/2} (\mu_k - \mu) \rVert

so the base alone is a classifier by whitened prototypes, as the zero-shot heads of the papers are
above chance. Tasks of fewer classes than the most have heads filled up by rows of logit -1e30.

``--quick`` does all of it on made-up pictures. Finished parts are kept in the workdir. The last
line is JSON.

Original to jlora. Deviates: the papers' vision encoders are CLIP's, pre-trained on the web.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.merging import cells as lib
from experiments.merging import text as quality
from experiments.merging import vision_data as data_lib
from experiments.merging import vision_train as training
from experiments.merging.vision_train import Spec
from experiments.workdir import Stage, load_tree, save_tree
from jlora.models.vit import Vit, VitConfig

TITLE = "# How good merged adapters of a vision transformer are"

PLAN = lib.Plan(
    sizes=(2, 4, 8), ranks=(8, 16),
    test_rows=200, validation_rows=48, learned=(), powers=(-3, -2, -1, 0, 1, 2, 3),
    methods=(
        *("task_arithmetic", "ties", "dare_linear", "dare_ties", "consensus", "slerp", "tsv"),
        *("iso_c", "do_merging", "core_space", "knots"),
    ),
)  # fmt: skip
QUICK = Spec(
    vit=VitConfig(side=32, patch=16, layers=1, width=16, heads=2, ffn=16), base_steps=4,
    base_batch=8, train_rows=24, steps=4, batch=8, segment=2, seeds=1, made_up=2,
)  # fmt: skip
QUICK_PLAN = lib.Plan(
    sizes=(2,), ranks=(2, 3), test_rows=12, validation_rows=8, learned=(),
    methods=("task_arithmetic", "slerp"),
)  # fmt: skip


def key(spec: Spec, plan: lib.Plan, judged: bool = False) -> str:
    """Ten hex digits over all that training depends on; with `judged`, what a cell depends on."""
    kept = [plan.sizes, plan.ranks, plan.test_rows, plan.validation_rows]
    if judged:
        kept += [plan.powers, plan.learn_steps, plan.learn_rows]
    blob = json.dumps([dataclasses.asdict(spec), kept], sort_keys=True)
    return hashlib.sha256(blob.encode()).hexdigest()[:10]


def base_key(spec: Spec) -> str:
    """Ten hex digits over all that pre-training depends on."""
    kept = (spec.vit, spec.pictures, spec.base_steps, spec.base_batch, spec.base_lr, spec.made_up)
    return hashlib.sha256(repr(kept).encode()).hexdigest()[:10]


def train(spec: Spec, plan: lib.Plan, workdir: Path, cache: Path | None = None) -> lib.Bench:
    """Pre-train the base and train all adapters, or read them back."""
    sizes = (spec.train_rows, plan.validation_rows, plan.test_rows)
    stage = Stage(workdir, "vision", key(spec, plan))
    emoji = [] if spec.made_up else data_lib.emoji(cache)
    if spec.made_up:
        pictures, tasks = data_lib.made_up(sizes, spec.made_up)
    else:
        pictures, tasks = None, data_lib.real_tasks(sizes, cache, emoji, spec.tasks)
    sample = jnp.zeros((1, spec.vit.side, spec.vit.side, 3))
    like = jax.eval_shape(Vit(spec.vit).init, jax.random.key(0), sample)["params"]
    first = Stage(workdir, "base", base_key(spec)).open()
    if not (first / "vit").is_dir():
        if pictures is None:
            pictures = data_lib.pre_training(spec.pictures, emoji)
        save_tree(first / "vit", training.pre_train(spec, pictures, workdir))
    base = jax.tree.map(jnp.asarray, load_tree(first / "vit", like))
    folder = stage.open()
    head = training.heads(spec, base, tasks)
    of = [t.splits["train"] for t in tasks]
    data = (jnp.stack([s.images for s in of]), jnp.stack([s.label for s in of]), head)
    number, (low, high) = len(tasks), plan.ranks
    groups = {  # name -> rank, tasks of each run, seeds
        "low": (low, [[t] for t in range(number)], range(spec.seeds)),
        "high": (high, [[t] for t in range(1, number, 2)], range(spec.seeds)),
        "multi": (low, [list(range(number))], range(1)),
    }
    adapters, multitask = {}, None
    for name, (rank, members, seeds) in groups.items():
        pools = np.asarray([p for s in seeds for p in members], np.int32)
        marks = [s for s in seeds for _ in members]
        steps = spec.steps * (4 if name == "multi" else 1)
        start = training.fresh(spec, rank, base, data, pools, marks)
        if not (folder / name).is_dir():
            done = training.adapt(spec, start, base, data, pools, marks, steps, workdir, name)
            save_tree(folder / name, done)
        trained = jax.tree.map(jnp.asarray, load_tree(folder / name, start.trainable))
        for i, (pool, seed) in enumerate(zip(pools, marks, strict=True)):
            one = start.replace(trainable=jax.tree.map(lambda x, i=i: x[i], trained))
            if name == "multi":
                multitask = one
            else:
                adapters[tasks[pool[0]].name, seed, rank] = one
    assert multitask is not None
    rows = {s: {t.name: _rows(t.splits[s], head, n) for n, t in enumerate(tasks)}
            for s in ("test", "validation")}  # fmt: skip
    apply = training.classifier(spec.vit, spec.head_scale)
    return lib.Bench(tuple(t.name for t in tasks), apply, base, adapters, multitask, **rows)


def _rows(split: data_lib.Split, head: training.Heads, number: int) -> lib.Rows:
    size = len(split.label)
    own = jax.tree.map(lambda x: jnp.broadcast_to(x[number], (size, *x.shape[1:])), head)
    return lib.Rows((jnp.asarray(split.images), *own), jnp.asarray(split.label), size)


def measure(spec: Spec, plan: lib.Plan, workdir: Path, cache: Path | None = None) -> dict[str, Any]:
    """Everything that is in the JSON file."""
    bench = train(spec, plan, workdir, cache)
    config = dataclasses.asdict(spec)
    classes = {t: int(r.label.max()) + 1 for t, r in bench.test.items()}
    results = quality.judged(bench, plan, spec.seeds, workdir, key(spec, plan, judged=True))
    return {"config": config, "classes": classes, **results}


def about(results: Mapping[str, Any]) -> str:
    """The sentences on base, tasks, heads and adapters."""
    c, v = results["config"], results["config"]["vit"]
    tasks = ", ".join(f"{t} ({results['classes'][t]})" for t in results["tasks"])
    return (
        f"Base: a ViT of {v['side']} x {v['side']} pixels, patches of {v['patch']}, {v['layers']}"
        f" layers, width {v['width']}. **It is small and was pre-trained here**, in"
        f" {c['base_steps']} steps of {c['base_batch']} pictures, to tell emoji and characters"
        " apart that no task uses; figures are to be compared with one another, not with those of"
        " large pre-trained encoders. Two more tasks, the art style of an emoji and its turn by"
        " quarters, were tried and left out: adapters of this base did not learn them."
        f" {len(results['tasks'])} tasks (number of classes): {tasks};"
        f" {c['train_rows']} training pictures each, all balanced over the classes. Frozen head:"
        " the base's mean feature of each class, less the mean of those, whitened, at unit length."
        f" LoRA on"
        f" `{c['sites']}` of all layers, {results['seeds']} training seeds, {c['steps']} steps of"
        f" {c['batch']} each."
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Entry point; returns the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workdir", default="runs/merging_vision", help="everything it writes")
    parser.add_argument("--docs", default="", help="also write table, plot and JSON below here")
    parser.add_argument("--cache", default="", help="asset cache (JLORA_CACHE or ~/.cache/jlora)")
    parser.add_argument("--quick", action="store_true", help="tiny base, made-up pictures")
    args = parser.parse_args(argv)
    spec, plan = (QUICK, QUICK_PLAN) if args.quick else (Spec(), PLAN)
    workdir = Path(args.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if not args.quick:
        quality.compiled(workdir)
    results = measure(spec, plan, workdir, Path(args.cache) if args.cache else None)
    given = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "experiments.merging.vision", *given])
    docs = Path(args.docs) if args.docs else workdir / "docs"
    marks = "\n".join(quality.report_lib.MARKS)
    empty = f"{TITLE}\n\n{marks}\n"
    summary = quality.write(results, docs, command, "merging_vision", about(results), empty)
    means = {n: {m: round(c["tuned"]["mean"], 4) for m, c in methods.items()}
             for n, methods in summary["normalised"].items()}  # fmt: skip
    print(json.dumps({"benchmark": "merging_vision", "normalised_tuned": means}))
    return summary


if __name__ == "__main__":
    main()
