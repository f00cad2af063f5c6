"""mergekit's merges of whole tensors, by its definitions: dense, one tensor at a time, NumPy.

=======  =====================================================================================
B        tensor of the base model, any shape; n elements
W_n      the same tensor of model n;  D_n = W_n - B, its task vector
w_n      `weight` of model n
S        sparsification of a task vector (`density`, `gamma`, `epsilon`)
=======  =====================================================================================

.. math::
    \\text{task vectors:} \\quad M = B + \\lambda \\frac{\\sum_n a_n w_n S(D_n)}{\\sum_n a_n w_n},
    \\qquad a_n = [\\, \\text{sgn}(w_n S(D_n)) = s \\,] \\text{ with a vote, else } 1

s is the sign of the weighted sum (+ where it is 0), with `vote: count` that of most. Without
`normalize` nothing is divided, and divisors of 0 count as 1. `rescale` multiplies S(D_n) so that
its l1 norm is that of D_n. The other methods are stated at their functions.

The merges of `jlora.merging` work on factors and give factors; these give the dense result, which
merged weights are written from, and take full checkpoints as well. Values are float32; norms and
inner products are summed in float64. `sparsify` has S.

Paper: Goddard et al. 2024, arXiv:2403.13257 (mergekit 0.1.5); of each method: `jlora.merging`.
Source: mergekit's definitions (formulas only).
Deviates: float32 throughout, where mergekit computes in the models' dtype; `int8_mask` has nothing
to save here; random masks are NumPy's.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from jlora.cli.merge.sparsify import largest
from jlora.types import Dynamic

Tensors = Sequence[np.ndarray]
BLOCK = 2**18  # elements of each model that are combined at a time
EPS = 1e-6


def task_vectors(
    x: Tensors, *, weight: Sequence[float], density: Sequence[float] = (), normalize: bool = False,
    rescale: bool = False, scale: float = 1.0, sparsify: Callable[..., np.ndarray] | None = None,
    vote: str = "", order: Callable[[np.ndarray], np.ndarray] = np.abs,
    rngs: Sequence[np.random.Generator] = (), gamma: Sequence[float] = (),
    epsilon: Sequence[float] = (),
) -> np.ndarray:  # fmt: skip
    """The merged task vector, as above.

    Args:
      x: D_n of every model, of one shape.
      weight: w_n, one per model.
      density: the share that `sparsify` keeps, one per model; 1: it is not called.
      normalize: divide by the sum of the weights (with a vote: of those that agree). False, as in
        task
        arithmetic; TIES has True.
      rescale: multiply what is left of a task vector so that its l1 norm is as before. False: only
        DARE and DELLA do.
      scale: lambda; 1: none.
      sparsify: (D, order, density, ...) -> D with zeros; None: nothing is dropped.
      vote: how a sign is elected, "sum" or "count"; "": none is.
      order: what elements are ranked by; the magnitudes.
      rngs: a generator per model, where `sparsify` is random.
      gamma: of `outliers`, one per model.
      epsilon: of `magprune`, one per model.

    Returns:
      M - B, float32.

    Raises:
      ValueError: another vote, or what `sparsify` refuses.
    """
    own = {key: values for key, values in (("gamma", gamma), ("epsilon", epsilon)) if values}
    kept = []
    for n, d in enumerate(x):
        if sparsify is not None and density[n] < 1:
            options: dict[str, Dynamic] = {key: values[n] for key, values in own.items()}
            if rngs:
                options["rng"] = rngs[n]
            thin = sparsify(d, order(d), density[n], **options)
            d = _rescaled(thin, d) if rescale else thin
        kept.append(d.reshape(-1))
    w = np.asarray(weight, np.float32)[:, None]
    out = np.empty(x[0].size, np.float32)
    for at in _blocks(out.size):
        y = w * np.stack([d[at] for d in kept])
        agree = _agree(y, vote) if vote else np.ones_like(y)
        total = (y * agree).sum(0)
        if normalize:
            share = (w * agree).sum(0)
            none = share == 0 if vote else np.abs(share) < 1e-8
            total = total / np.where(none, np.float32(1), share)
        out[at] = np.float32(scale) * total
    return out.reshape(x[0].shape)


def sce(x: Tensors, *, select_topk: float = 1.0) -> np.ndarray:
    """Select the elements of largest variance, weigh models by energy, average by majority sign.

    Args:
      x: D_n of every model, of one shape.
      select_topk: the share of the elements that differ between models; 1: all.

    Returns:
      M - B, float32.
    """
    d = np.stack([t.reshape(-1) for t in x])
    if select_topk < 1:
        variance = d.var(0)
        count = int(np.count_nonzero(variance) * select_topk)
        d = np.where(largest(variance, count), d, np.float32(0)) if count > 0 else 0 * d
    energy = np.square(d, dtype=np.float64).mean(1)
    flat = abs(energy.sum()) < EPS
    eta = np.full(len(x), 1 / len(x)) if flat else energy / energy.sum()
    share = eta.astype(np.float32)[:, None] * _agree(d, "sum")
    merged = (d * share).sum(0) / np.maximum(share.sum(0), np.float32(EPS))
    return merged.reshape(x[0].shape)


def model_stock(x: Tensors, *, filter_wise: bool = False) -> np.ndarray:
    r"""t times the mean task vector, of the mean cosine c of all pairs.

    .. math:: t = \frac{N c}{1 + (N - 1) c}

    Args:
      x: D_n of at least two models, of one shape.
      filter_wise: a t for each row; False: one for the tensor.

    Returns:
      M - B, float32.
    """
    rows = [d.reshape(-1, d.shape[-1] if d.ndim else 1) if filter_wise else d.reshape(1, -1)
            for d in x]  # fmt: skip
    norms = [np.sqrt(_dot(d, d)) for d in rows]
    pairs = [
        np.clip(_dot(rows[i], rows[j]) / np.maximum(norms[i] * norms[j], EPS), -1, 1)
        for i, j in itertools.combinations(range(len(x)), 2)
    ]
    cosine, n = np.mean(pairs, axis=0)[:, None], len(x)
    below = 1 + (n - 1) * cosine
    singular = np.abs(below) < EPS
    t = np.where(singular, 0, n * cosine / np.where(singular, 1, below)).astype(np.float32)
    return (t * (sum(rows) / np.float32(n))).reshape(x[0].shape)


def nearswap(x: Tensors, *, t: float) -> np.ndarray:
    """The task vector of one model, elements larger than t cut down to t.

    Args:
      x: D_1 alone.
      t: the threshold.

    Returns:
      M - B, float32.
    """
    (d,) = x
    return d * np.clip(t / np.maximum(np.abs(d), EPS), 0, 1).astype(np.float32)


def linear(x: Tensors, *, weight: Sequence[float], normalize: bool = True) -> np.ndarray:
    """The weighted sum of the tensors.

    Args:
      x: W_n of every model, of one shape.
      weight: one per model.
      normalize: divide by the sum of the weights; True, as in mergekit.

    Returns:
      M, float32.

    Raises:
      ValueError: weights whose sum is 0, with `normalize`.
    """
    total = float(np.sum(weight))
    if normalize and total == 0:
        raise ValueError("weight: they sum to 0 and cannot be normalised")
    out = _sum(weight, x)
    return out / np.float32(total) if normalize else out


def passthrough(x: Tensors, *, scale: Sequence[float | None] = (None,)) -> np.ndarray:
    """Returns the tensor of one model, float32.

    Args:
      x: W_1 alone.
      scale: a factor of it; None: 1.
    """
    return x[0] if scale[0] is None else x[0] * np.float32(scale[0])


def slerp(x: Tensors, *, t: float) -> np.ndarray:
    """From the first tensor (t = 0) to the second on a great circle; a line if |cos| > 0.9995.

    Args:
      x: two tensors of one shape.
      t: in 0..1.

    Returns:
      M, float32.
    """
    a, b = x
    na, nb = (n if n > 1e-8 else 1.0 for n in map(_norm, x))
    cos = np.clip(float(_dot(a.reshape(1, -1), b.reshape(1, -1))[0]) / (na * nb), -1, 1)
    if abs(cos) > 0.9995:
        return np.float32(1 - t) * a + np.float32(t) * b
    angle = math.acos(cos)
    first, second = (math.sin(c * angle) / math.sin(angle) for c in (1 - t, t))
    return np.float32(first) * a + np.float32(second) * b


def nuslerp(
    x: Tensors, *, weight: Sequence[float], nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> np.ndarray:  # fmt: skip
    """As `slerp`, with t = w_2 / (w_1 + w_2), of the whole tensors or of each vector alone.

    Args:
      x: two tensors of one shape.
      weight: w_1, w_2; t is 1/2 where their sum is 0.
      nuslerp_flatten: of the whole tensors; True, as in mergekit.
      nuslerp_row_wise: not flattened: each vector of the first axis, else of the last.

    Returns:
      M, or M - B of task vectors, float32.
    """
    t = 0.5 if abs(sum(weight)) < EPS else weight[1] / sum(weight)
    turned = nuslerp_row_wise and not nuslerp_flatten
    a, b = (np.swapaxes(v, 0, -1) for v in x) if turned else x
    shape = a.shape
    a, b = (v.reshape(1, -1) if nuslerp_flatten else v.reshape(-1, v.shape[-1]) for v in (a, b))
    norms = [np.maximum(np.sqrt(_dot(v, v)), 1e-7) for v in (a, b)]
    cos = np.clip(_dot(a, b) / (norms[0] * norms[1]), -1, 1)[:, None]
    line = 1 - cos**2 <= 1e-16
    angle = np.arccos(np.where(line, 0, cos))
    c = [np.where(line, k, np.sin(k * angle) / np.sin(angle)) for k in (1 - t, t)]
    out = (c[0].astype(np.float32) * a + c[1].astype(np.float32) * b).reshape(shape)
    return np.swapaxes(out, 0, -1) if turned else out


def multislerp(
    x: Tensors, *, weight: Sequence[float], normalize_weights: bool = True, eps: float = 1e-8
) -> np.ndarray:
    """One step of the spherical mean, from the direction of the mean, times the mean norm.

    Args:
      x: tensors of one shape; one alone is returned as it is.
      weight: one per model.
      normalize_weights: divide them by their sum; True, as in mergekit.
      eps: added to norms; 1e-8, as in mergekit.

    Returns:
      M, or M - B of task vectors, float32.

    Raises:
      ValueError: the weighted unit vectors of more than two tensors cancel.
    """
    if len(x) == 1:
        return x[0]
    w = np.asarray(weight, np.float64)
    w = w / w.sum() if normalize_weights else w
    norms = np.array([_norm(t) for t in x])
    mean = sum(c / (n + eps) * t for c, n, t in zip(w, norms, x, strict=True))
    size = _norm(mean)
    if size < eps:
        if len(x) > 2:
            raise ValueError("multislerp: the weighted unit vectors cancel; no such mean exists")
        return _sum(w, x)
    mean = mean / size
    tangent = np.zeros_like(mean)
    for c, n, t in zip(w, norms, x, strict=True):
        unit = t / (n + eps)
        tangent += c * (unit - np.vdot(unit, mean) * mean)
    angle = _norm(tangent) + eps
    out = mean * math.cos(angle) + tangent * (math.sin(angle) / angle)
    return (out * float((norms * w).sum())).astype(np.float32)


def karcher(x: Tensors, *, max_iter: int = 10, tol: float = 1e-5) -> np.ndarray:
    """The mean direction of least squared angles to all tensors, times the mean of their norms.

    Args:
      x: W_n of every model, of one shape; one alone is returned as it is.
      max_iter: steps at most; 10, as in mergekit.
      tol: of the step; 1e-5, as in mergekit.

    Returns:
      M, float32.
    """
    if len(x) == 1:
        return x[0]
    norms = [_norm(t) for t in x]
    units = [t.astype(np.float64) / n for t, n in zip(x, norms, strict=True) if n > tol]
    if not units:
        return np.zeros_like(x[0])
    mean = sum(units) / len(units)
    size = _norm(mean)
    mean = units[0] if size < tol else mean / size
    for _ in range(max_iter):
        tangent = np.zeros_like(mean)
        for unit in units:
            cos = float(np.clip(np.vdot(mean, unit), -1.0, 1.0))
            angle = math.acos(cos)
            if angle >= tol:
                tangent += angle / math.sin(angle) / len(units) * (unit - cos * mean)
        step = _norm(tangent)
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean /= _norm(mean)
    return np.asarray(np.mean(norms) * mean, np.float32)


def _agree(y: np.ndarray, vote: str) -> np.ndarray:
    """Which of [N, k] values have the elected sign: of the sum, or of most ("count"); + if even.

    Raises ValueError for another vote.
    """
    if vote not in ("sum", "count"):
        raise ValueError(f"vote: got {vote!r}, expected sum or count")
    tally = (y if vote == "sum" else np.sign(y)).sum(0)
    return (np.sign(y) == np.where(tally >= 0, np.float32(1), np.float32(-1))).astype(y.dtype)


def _rescaled(thin: np.ndarray, d: np.ndarray) -> np.ndarray:
    """`thin` times the ratio of the l1 norms of `d` and it."""
    before, after = (float(np.abs(t).sum(dtype=np.float64)) for t in (d, thin))
    return thin if before < 1e-7 or after < 1e-7 else thin * np.float32(before / after)


def _blocks(size: int) -> list[slice]:
    return [slice(k, min(k + BLOCK, size)) for k in range(0, size, BLOCK)]


def _sum(weights: Sequence[float] | np.ndarray, x: Tensors) -> np.ndarray:
    out = np.zeros_like(x[0])
    for w, t in zip(weights, x, strict=True):
        out += np.float32(w) * t
    return out


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products of the rows of [m, k] arrays, [m]."""
    return np.einsum("mk,mk->m", a, b, dtype=np.float64)


def _norm(x: Dynamic) -> float:
    return math.sqrt(float(_dot(x.reshape(1, -1), x.reshape(1, -1))[0]))
