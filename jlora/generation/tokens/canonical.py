r"""Canonical LoRA factors: one representative of each class {(a G, G^-1 b) : G in GL(r)}.

The delta s a b does not change under any invertible G, so two adapters that do the same thing can
have unrelated weights; a generator should see one representative. Symbols: `a` [d_in, r],
`b` [r, d_out], s = `scale` (alpha / rank). s is folded into b first, so that adapters of different
alpha with equal deltas have equal canonical factors; the results have scale 1 and `unfold` gives
factors for a template's scale back. With Q_a R_a = qr(a), Q_b R_b = qr(s b^T) and the core's SVD
U S V^T = R_a R_b^T:

.. math::
    \text{balanced\_svd:}\quad & a' = Q_a U S^{1/2} D,\quad b' = D S^{1/2} V^T Q_b^T, \\
    \text{procrustes:}\quad & a'' = a' R,\quad b'' = R^T b',\quad R = P Q^T,\quad
        P \Sigma Q^T = a'^T a_0 + b' b_0^T .

D has signs +-1 that make the entry of largest modulus in each column of a' positive. (a_0, b_0) is
the balanced form of a reference adapter. The cost is O((d_in + d_out) r^2): dW is never formed.

`balanced_svd` jumps where two singular values cross or where two entries tie for the largest
modulus; `procrustes` is smooth there, and undefined only where the r x r overlap with the
reference is singular. Not meant to be differentiated.

Source: the QR + core SVD form and sign rule of W2T, arXiv 2603.15990; orthogonal Procrustes,
Schoenemann, "A generalized solution of the orthogonal Procrustes problem", 1966.
Deviates: W2T keeps unit vectors and S as separate tokens; here S^1/2 goes into both factors.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora import numerics
from jlora.numerics import matmul
from jlora.system import System

Tree = Mapping[str, Mapping[str, Array]]
KINDS = ("none", "balanced_svd", "procrustes", "frozen_A")


def balanced_svd(
    a: Float[Array, "d_in r"], b: Float[Array, "r d_out"]
) -> tuple[Float[Array, "d_in r"], Float[Array, "r d_out"]]:
    """Factors with a'b' = ab, a'^T a' = b' b'^T = S descending, and fixed signs.

    Args:
      a: [d_in, r], float32 or float64.
      b: [r, d_out], same dtype.

    Returns:
      (a', b') of the same shapes and dtype; columns beyond the rank of a b are zero.
    """
    rank = a.shape[1]
    q_a, r_a = numerics.qr(a)
    q_b, r_b = numerics.qr(b.T)
    u, s, vt = numerics.svd(matmul(r_a, r_b.T))
    root = jnp.sqrt(s)
    left, right = matmul(q_a, u), matmul(vt, q_b.T)
    peak = jnp.take_along_axis(left, jnp.argmax(jnp.abs(left), axis=0)[None], axis=0)[0]
    sign = jnp.where(peak < 0, -jnp.ones_like(root), jnp.ones_like(root))
    pad = rank - s.shape[0]  # r > min(d_in, d_out): fewer directions than columns
    left = jnp.pad(left * (sign * root)[None, :], ((0, 0), (0, pad)))
    right = jnp.pad(right * (sign * root)[:, None], ((0, pad), (0, 0)))
    return left, right


def procrustes(
    a: Float[Array, "d_in r"],
    b: Float[Array, "r d_out"],
    a_ref: Float[Array, "d_in r"],
    b_ref: Float[Array, "r d_out"],
) -> tuple[Float[Array, "d_in r"], Float[Array, "r d_out"]]:
    """Balanced factors turned by the rotation that brings them closest to a balanced reference.

    Args:
      a: [d_in, r].
      b: [r, d_out].
      a_ref: [d_in, r] factor of the reference, in any gauge.
      b_ref: [r, d_out] likewise.

    Returns:
      (a'', b'') with a''b'' = ab, minimising |a'' - a_0|^2 + |b'' - b_0|^2 over O(r).
    """
    a, b = balanced_svd(a, b)
    a_ref, b_ref = balanced_svd(a_ref, b_ref)
    p, _, qt = numerics.svd(matmul(a.T, a_ref) + matmul(b, b_ref.T))
    turn = matmul(p, qt)
    return matmul(a, turn), matmul(turn.T, b)


def _over_stack(fn, *args: Array):
    """Maps a function of matrices over all leading axes, which the arguments share."""
    for _ in range(args[0].ndim - 2):
        fn = jax.vmap(fn)
    return fn(*args)


def canonicalise(
    kind: str,
    trainable: Tree,
    scale: Mapping[str, Float[Array, "*stack"]] | None = None,
    reference: Tree | None = None,
) -> dict[str, dict[str, Array]]:
    """Canonical factors of every site of an adapter (vmap over a bank).

    Args:
      kind: "none", "balanced_svd", "procrustes" or "frozen_A" (A is no trainable leaf, so there
        is no gauge: only the scale is folded in).
      trainable: path -> {"a" [*stack, d_in, r], "b" [*stack, r, d_out], ...}; further leaves
        pass through.
      scale: path -> [*stack], the scale to fold into b; None where it is 1 or to be left alone.
      reference: for "procrustes", a tree like `trainable`, its own scale already folded in.

    Returns:
      A tree of the same structure, shapes and dtypes, with a'b' = scale a b.

    Raises:
      ValueError: unknown kind, missing factors or reference, or a trained "a" under "frozen_A".
    """
    if kind not in KINDS:
        raise ValueError(f"unknown canonical form {kind!r}, expected one of {KINDS}")
    if (kind == "procrustes") != (reference is not None):
        raise ValueError(f"{kind}: mode 'procrustes' requires a reference; no other mode takes one")
    out = {}
    for path, leaves in trainable.items():
        need = {"b"} if kind in ("none", "frozen_A") else {"a", "b"}
        if not need <= set(leaves) or (kind == "frozen_A" and "a" in leaves):
            raise ValueError(f"{path}: {kind} wants trainable {need}, got {sorted(leaves)}")
        new = dict(leaves)
        if scale is not None:
            new["b"] = _times(new["b"], scale[path])
        if kind == "balanced_svd":
            new["a"], new["b"] = _over_stack(balanced_svd, new["a"], new["b"])
        elif reference is not None:
            ref = reference[path]
            new["a"], new["b"] = _over_stack(procrustes, new["a"], new["b"], ref["a"], ref["b"])
        out[path] = new
    return out


def unfold(
    trainable: Tree, scale: Mapping[str, Float[Array, "*stack"]]
) -> dict[str, dict[str, Array]]:
    """Factors for a template with its own scale: b / scale, so that scale a b is the delta.

    Args:
      trainable: canonical factors of scale 1.
      scale: path -> [*stack], non-zero.

    Returns:
      path -> name -> array, of the same shapes.
    """
    return {
        path: dict(leaves) | {"b": _times(leaves["b"], 1.0 / scale[path])}
        for path, leaves in trainable.items()
    }


def _times(b: Array, scale: Array) -> Array:
    return b * jnp.asarray(scale, b.dtype)[..., None, None]


SYSTEM = System(
    name="Canonical factors",
    paper="W2T 2026, 2603.15990; Schönemann 1966",
    symbol="canonicalise",
    evidence="delta kept and gauge removed; dense SVD by numpy; mutation check",
    kind="component",
)
