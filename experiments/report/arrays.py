"""arrays.npz: what the plots need beyond report.json, and the projections made from it.

Groups, each optional but complete when present (N adapters, T tasks, J trajectories of K points):

* adapters: ``gram`` [N, N] inner products of deltas, ``task`` int [N] index into ``names`` (T
  strings), ``kind`` int [N]: TRAINED, GENERATED or HELD_OUT (a real adapter of a seed that the
  generator never saw).
* trajectory: ``trajectory_cross`` [J, K, N] inner products of the decoded points of a denoising run
  (noise first) with the N adapters, ``trajectory_task`` int [J].
* nearest: ``nn_generated`` [m] and ``nn_held_out`` [s], relative distances to the nearest training
  adapter.
* overlap: ``iou_max`` [m], ``iou_accuracy`` [m], ``iou_kind`` [m]: largest overlap of mistakes with
  a training adapter against accuracy.

PCA is fitted on the trained adapters; with their centred Gram matrix :math:`HGH = Q \\Lambda Q^T`
the coordinates of any x are :math:`\\Lambda^{-1/2} Q^T H (c_x - G1/n)`, c_x its inner products with
them.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from experiments.report.schema import ReportError

TRAINED, GENERATED, HELD_OUT = 0, 1, 2
GROUPS = {
    "adapters": ("gram", "task", "kind", "names"),
    "trajectory": ("trajectory_cross", "trajectory_task"),
    "nearest": ("nn_generated", "nn_held_out"),
    "overlap": ("iou_max", "iou_accuracy", "iou_kind"),
}


class Projection(NamedTuple):
    """Two-dimensional PCA of adapters."""

    points: np.ndarray  # [N, 2]
    paths: np.ndarray | None  # [J, K, 2] denoising trajectories
    explained: tuple[float, float]  # share of the trained adapters' variance


def check(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays as numpy, shapes and finiteness verified.

    Raises:
      ReportError: an unknown name, half a group, a wrong shape, a value that is not finite.
    """
    out = {name: np.asarray(value) for name, value in arrays.items()}
    known = [name for names in GROUPS.values() for name in names]
    for name, value in out.items():
        if name not in known:
            raise ReportError(f"arrays.{name}: unknown, expected some of {', '.join(known)}")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ReportError(f"arrays.{name}: has values that are not finite")
    for group, names in GROUPS.items():
        missing = [name for name in names if name not in out]
        if missing and len(missing) < len(names):
            raise ReportError(f"arrays: group {group} lacks {', '.join(missing)}")
    if "gram" in out:
        n, tasks = len(out["gram"]), len(out["names"])
        _shapes(out, {"gram": (n, n), "task": (n,), "kind": (n,), "names": (tasks,)})
        if n and not (0 <= out["task"].min() and out["task"].max() < tasks):
            raise ReportError(f"arrays.task: outside 0..{tasks - 1}")
        if (out["kind"] == TRAINED).sum() < 3:
            raise ReportError("arrays.kind: fewer than 3 trained adapters")
    if "trajectory_cross" in out:
        if "gram" not in out:
            raise ReportError("arrays: group trajectory needs group adapters")
        runs, points = out["trajectory_cross"].shape[:2]
        _shapes(out, {"trajectory_cross": (runs, points, n), "trajectory_task": (runs,)})
    if "iou_max" in out:
        m = len(out["iou_max"])
        _shapes(out, {name: (m,) for name in GROUPS["overlap"]})
    return out


def _shapes(arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise ReportError(f"arrays.{name}: shape {arrays[name].shape}, expected {shape}")


def save(path: Path | str, **arrays: Any) -> None:
    """Checks and writes arrays.npz through a temp file and a rename; equal input, equal bytes."""
    path = Path(path)
    checked = check(arrays)
    temp = path.with_name(path.name + ".tmp")
    with temp.open("wb") as file:
        ordered: dict[str, Any] = {name: checked[name] for name in sorted(checked)}
        np.savez_compressed(file, **ordered)
    os.replace(temp, path)


def load(path: Path | str) -> dict[str, np.ndarray]:
    """Reads and checks arrays.npz.

    Raises:
      ReportError: an unreadable file, or what `check` refuses, with the file's name.
    """
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return check({name: file[name] for name in file.files})
    except (ReportError, ValueError, OSError, EOFError, BadZipFile) as error:
        raise ReportError(f"{path}: {error}") from error


def pca(arrays: Mapping[str, np.ndarray]) -> Projection:
    """Two principal coordinates of all adapters, fitted on the trained ones."""
    gram = arrays["gram"].astype(np.float64)
    fit = arrays["kind"] == TRAINED
    inner = gram[np.ix_(fit, fit)]
    mean = inner.mean(axis=0)
    centred = inner - mean[:, None] - mean[None, :] + mean.mean()
    values, vectors = np.linalg.eigh(centred)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    # The sign of an eigenvector is arbitrary: make its largest entry positive.
    vectors = vectors[:, :2] * np.sign(vectors[np.abs(vectors[:, :2]).argmax(axis=0), [0, 1]])
    root = np.sqrt(np.maximum(values[:2], values[0] * 1e-12))

    def project(cross: np.ndarray) -> np.ndarray:
        return (cross[..., fit] - mean) @ (vectors - vectors.mean(axis=0)) / root

    paths = arrays.get("trajectory_cross")
    total = values.sum()
    shares = (float(values[0] / total), float(values[1] / total)) if total > 0 else (0.0, 0.0)
    return Projection(
        project(gram), None if paths is None else project(paths.astype(np.float64)), shares
    )


def tsne(arrays: Mapping[str, np.ndarray], start: np.ndarray, seed: int = 0) -> np.ndarray:
    """t-SNE [N, 2] of the delta distances, started from PCA, on one thread: bitwise repeatable.

    Args:
      arrays: with group adapters. start: [N, 2] PCA points. seed: of scikit-learn.
    """
    from sklearn.manifold import TSNE  # seconds to import: only where it is used
    from threadpoolctl import threadpool_limits

    gram = arrays["gram"].astype(np.float64)
    norms = np.diag(gram)
    square = np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0)
    np.fill_diagonal(square, 0)
    init = (start - start.mean(axis=0)) / max(float(start[:, 0].std()), 1e-12) * 1e-4
    model = TSNE(
        metric="precomputed",
        init=init.astype(np.float32),
        learning_rate="auto",
        perplexity=min(30.0, (len(gram) - 1) / 3),
        random_state=seed,
        n_jobs=1,
    )
    with threadpool_limits(1):
        return model.fit_transform(np.sqrt(square))
