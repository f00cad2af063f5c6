"""Three equal ways to run every token through its own few low-rank experts.

Symbols: experts A_e, B_e -> `a` [E, d_in, r], `b` [E, r, d_out]; routes -> `ids`, `weights`
[..., k].

.. math::
    y_t = \\sum_{j=1}^{k} g_{t,j} \\; x_t A_{e} B_{e}, \\quad e = ids_{t,j}

===========  ==================================  ==================================================
back-end     cost a token                        good for
===========  ==================================  ==================================================
``dense``    E r (d_in + d_out)                  few small experts; any transform, any kind of x
``gather``   k r (d_in + d_out), copies experts  a handful of tokens (decoding)
``ragged``   k r (d_in + d_out) + a sort         many tokens, many experts
===========  ==================================  ==================================================

``ragged`` cannot be vmapped over x alone (JAX's `ragged_dot` lacks that rule): flatten the tokens
or take another back-end there.

On a mesh with explicit axes, where JAX has no rule for the gather and the sort, ``gather`` and
``ragged`` run on every device on its own tokens. Tokens may be split along any of their axes and b
along d_out; a split d_in, r or axis of experts is refused, for those sums cross devices.

Reference: the sparse-dispatch literature; `jax.lax.ragged_dot`.
Deviates: nothing; all three drop no token.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jlora.core import compat
from jlora.routing.router import dense_weights
from jlora.system import System
from jlora.types import Dynamic

BACKENDS = ("dense", "gather", "ragged")


def dispatch(
    x: Dynamic,
    a: Float[Array, "experts d_in r"],
    b: Float[Array, "experts r d_out"],
    ids: Int[Array, "... k"],
    weights: Float[Array, "... k"],
    backend: str = "dense",
) -> jax.Array:
    """Every token through its own experts.

    Args:
      x: tokens [..., d_in], or what stands for them with the back-end "dense".
      a: first factors; cast to the dtype of x, as are all others.
      b: second factors.
      ids: the experts of each token.
      weights: their weights, scales included.
      backend: "dense", "gather" or "ragged"; "dense" works for any x and any transformation.

    Returns:
      [..., d_out], in the dtype of x.

    Raises:
      ValueError: an unknown back-end, one that needs tokens as an array and x is not one, or
        factors that are split where the back-end cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    a, b, weights = (t.astype(x.dtype) for t in (a, b, weights))
    if backend == "dense":
        return _dense(x, a, b, ids, weights)
    if not isinstance(x, jax.Array):
        raise ValueError(f"backend {backend!r} needs tokens [..., d_in], got {type(x).__name__}")
    run = functools.partial(_flat, {"gather": _gather, "ragged": _ragged}[backend])
    if compat.explicit(x):
        return _on_mesh(run, backend, x, a, b, ids, weights)
    return run(x, a, b, ids, weights)


def _flat(run: Dynamic, x: Array, a: Array, b: Array, ids: Array, weights: Array) -> jax.Array:
    lead, k = x.shape[:-1], ids.shape[-1]
    y = run(x.reshape(-1, x.shape[-1]), a, b, ids.reshape(-1, k), weights.reshape(-1, k))
    return y.reshape(*lead, -1)


def _on_mesh(run: Dynamic, backend: str, *args: Array) -> jax.Array:
    """Every device with its own tokens, all experts, and its columns of b."""
    spec, mesh = jax.sharding.PartitionSpec, jax.typeof(args[0]).sharding.mesh
    of = [(*s, *[None] * (t.ndim - len(s))) for t in args for s in [jax.typeof(t).sharding.spec]]
    (*lead, d_in), first, (*second, d_out) = of[:3]
    for name, entries in (("x: d_in", (d_in,)), ("a", first), ("b: experts, r", second)):
        if any(entries):
            raise ValueError(f"backend {backend!r}: {name}: got split along {entries}, expected "
                             "whole on an explicit mesh")  # fmt: skip
    tokens = spec(*lead, None)
    ids, weights = (jax.sharding.reshard(t, tokens) for t in args[3:])
    inside = (tokens, spec(), spec(None, None, d_out), tokens, tokens)
    names = frozenset(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == jax.sharding.AxisType.Explicit
    )
    local = jax.shard_map(
        run, mesh=mesh, in_specs=inside, out_specs=spec(*lead, d_out), axis_names=names
    )
    return local(*args[:3], ids, weights)


def mixed(
    x: Dynamic,
    a: Float[Array, "experts d_in r"],
    b: Float[Array, "experts r d_out"],
    gates: Float[Array, "... experts"],
) -> jax.Array:
    """Every token through all experts, each with a weight.

    Args:
      x: tokens [..., d_in], or what stands for them.
      a: first factors; cast to the dtype of x, as are all others.
      b: second factors.
      gates: the weights, scales included.

    Returns:
      [..., d_out], in the dtype of x.
    """
    a, b, gates = (t.astype(x.dtype) for t in (a, b, gates))
    experts, d_in, rank = a.shape
    h = x @ jnp.moveaxis(a, 0, 1).reshape(d_in, experts * rank)
    return (h * jnp.repeat(gates, rank, axis=-1)) @ b.reshape(experts * rank, -1)


def _dense(x: Dynamic, a: jax.Array, b: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    return mixed(x, a, b, dense_weights(ids, weights, a.shape[0]))


def _gather(x, a, b, ids, weights):
    h = jnp.einsum("ti,tkir->tkr", x, a[ids])
    return jnp.einsum("tkr,tkro,tk->to", h, b[ids], weights)


def _ragged(x, a, b, ids, weights):
    experts, k = a.shape[0], ids.shape[1]
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)  # choices of one expert lie together
    sizes = jnp.bincount(flat, length=experts).astype(jnp.int32)
    token = order // k
    h = jax.lax.ragged_dot(x[token], a, sizes)
    y = jax.lax.ragged_dot(h, b, sizes) * weights.reshape(-1)[order][:, None]
    return jnp.zeros((x.shape[0], b.shape[-1]), x.dtype).at[token].add(y)


SYSTEM = System(
    name="Sparse dispatch",
    paper="none (jlora)",
    symbol="dispatch",
    evidence="numpy value; equal gradients of three back-ends; bank under vmap",
    kind="component",
)
