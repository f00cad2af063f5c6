"""A made-up report for working on the page: no figure in it was measured.

python -m experiments.report.example --out DIR [--tasks 70]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.report import arrays, build, html, schema


def accuracies(rng: np.random.Generator, trained: float, methods: dict[str, tuple[float, int]]):
    """{method: values} around base + share * (trained - base)."""
    base = rng.normal(0.5, 0.02)
    out = {}
    for key, (share, count) in methods.items():
        level = base + share * (trained - base)
        out[key] = np.clip(level + rng.normal(0, 0.008, count), 0, 1).tolist()
    return out


def example(tasks: int = 70, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """(report, arrays) with ``tasks`` seen tasks and three held-out levels."""
    rng = np.random.default_rng(seed)
    labels = [f"20news: topic {i // 9} against topic {i % 9}" for i in range(tasks)]
    seen_methods = {
        "base": (0.0, 1),
        "trained": (0.98, 3),
        "soup": (1.0, 1),
        "mean_adapter": (0.05, 1),
        "pdiff_task_norm": (0.99, 10),
        "pdiff_global": (0.12, 10),
        "generated": (0.985, 10),
    }
    unseen_methods = {
        "base": (0.0, 1),
        "trained": (1.0, 3),
        "generated": (0.93, 10),
        "mean_adapter": (0.02, 1),
        "nearest": (0.72, 1),
        "softmax": (0.75, 1),
        "multitask": (0.04, 1),
        "ridge": (0.9, 1),
        "span": (0.87, 1),
        "nearest_mean": (0.88, 1),
        "knn": (0.8, 1),
        "logreg": (0.89, 1),
        "lora_k": (0.75, 1),
        "discriminant": (0.9, 1),
        "episodic": (0.96, 1),
        "episodic_mean": (0.9, 1),
        "episodic_logreg": (0.91, 1),
        "layered": (0.97, 1),
        "logreg_full": (1.05, 1),
    }
    seen = {name: accuracies(rng, rng.uniform(0.8, 0.97), seen_methods) for name in labels}
    unseen = {
        level: {
            f"{level}: pair {i}": accuracies(rng, rng.uniform(0.75, 0.97), unseen_methods)
            for i in range(count)
        }
        for level, count in (("unseen_pair", 24), ("unseen_label", 12), ("unseen_corpus", 6))
    }
    confusion = np.eye(tasks) * 0.99 + np.roll(np.eye(tasks), 3, axis=1) * 0.01
    steps = {
        "euler": {n: rng.normal(0.89 - 0.3 / n, 0.02, 8) for n in (2, 5, 10, 20, 50)},
        "heun": {n: rng.normal(0.89 - 0.1 / n, 0.02, 8) for n in (2, 5, 10, 20, 50)},
        "ddim": {n: rng.normal(0.89 - 0.5 / n, 0.02, 8) for n in (5, 10, 20, 50)},
        "ddpm": {n: rng.normal(0.89 - 8 / n, 0.02, 8) for n in (50, 200, 1000)},
    }
    x = np.arange(0, 1500, 10)
    curves = {
        name: (x, scale * np.exp(-x / 400) + floor + 0.02 * scale * rng.random(len(x)))
        for name, scale, floor in (
            ("denoiser/train", 1.0, 0.2),
            ("denoiser/validation", 1.0, 0.26),
            ("codec/reconstruction", 0.3, 0.001),
            ("Cond P-Diff/autoencoder", 0.5, 0.05),
            ("Cond P-Diff/diffusion", 1.0, 0.1),
        )
    }
    report = build.build(
        config={
            "command": "python -m experiments.report.example --out DIR",
            "base": "none",
            "tasks": f"{tasks} made up",
            "head": "anonymous",
            "rank": 4,
            "sampler": "euler",
            "lr": 1e-3,
        },
        environment={"jax": "0.0.0", "cores": 2},
        seen=seen,
        confusion_labels=labels,
        confusion_matrix=confusion,
        confusion_diagonal=float(np.trace(confusion) / tasks),
        condition_controls={
            "shuffled": rng.normal(0.52, 0.03, tasks),
            "null": rng.normal(0.51, 0.02, tasks),
            "paraphrased": rng.normal(0.87, 0.03, tasks),
        },
        novelty_ratio=0.62,
        diversity_ratio=0.41,
        unseen=unseen,
        steps=steps,
        curves=curves,
        times={"zoo": 812.0, "denoiser": 145.2},
        audit={"soup_distance": 0.31, "affine_residual": 0.44, "effective_rank_generated": 38.2},
        notes=["Every figure on this page is made up: it shows the layout, not a result."],
        seed=seed,
    )
    return report, plot_data(rng, tasks, labels)


def plot_data(rng: np.random.Generator, tasks: int, labels: Sequence[str]) -> dict[str, Any]:
    """Arrays of random adapters: six real, one held-out and five generated per task."""
    centres = 3 * rng.normal(size=(tasks, 60))
    counts = ((arrays.TRAINED, 6, 1.0), (arrays.HELD_OUT, 1, 1.0), (arrays.GENERATED, 5, 0.5))
    points, task, kind = [], [], []
    for code, count, noise in counts:
        for t in range(tasks):
            points.append(centres[t] + noise * rng.normal(size=(count, 60)))
            task += [t] * count
            kind += [code] * count
    x = np.concatenate(points)
    ramp = np.linspace(0, 1, 20)[None, :, None]
    ends = centres[: min(5, tasks), None]
    paths = ramp * ends + (1 - ramp) * 4 * rng.normal(size=(len(ends), 1, 60))
    return {
        "gram": (x @ x.T).astype("f4"),
        "task": np.asarray(task),
        "kind": np.asarray(kind),
        "names": np.asarray(labels),
        "trajectory_cross": (paths @ x.T).astype("f4"),
        "trajectory_task": np.arange(len(ends)),
        "nn_generated": rng.normal(0.3, 0.04, 10 * tasks),
        "nn_held_out": rng.normal(0.48, 0.05, tasks),
        "iou_max": rng.uniform(0.2, 0.9, 6 * tasks),
        "iou_accuracy": rng.normal(0.88, 0.03, 6 * tasks),
        "iou_kind": np.repeat([arrays.GENERATED, arrays.HELD_OUT], [5 * tasks, tasks]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Writes report.json, arrays.npz and report.html of the example into --out."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report.example")
    parser.add_argument("--out", required=True, help="folder to write into")
    parser.add_argument("--tasks", type=int, default=70, help="seen tasks (default 70)")
    options = parser.parse_args(argv)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    report, plots = example(options.tasks)
    schema.write(folder / "report.json", report)
    arrays.save(folder / "arrays.npz", **plots)
    html.write(folder / "report.html", schema.read(folder / "report.json"),
               arrays.load(folder / "arrays.npz"))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
