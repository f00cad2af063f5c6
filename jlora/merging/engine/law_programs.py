"""The laws of the programs of a merge: jitted, sharded, in thin factors, of inputs in 16 bits.

A merge is the same function of its inputs however it runs; errors as in `laws`.

Deviates: nothing.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jlora.algebra import Deltas, LowRank
from jlora.core.adapter import Adapter
from jlora.core.site import Site
from jlora.merging.engine.inputs import gather
from jlora.merging.engine.law_world import Errors, World, gap, merged
from jlora.merging.engine.table import Merging
from jlora.methods.low_rank.lora import LoRA
from jlora.types import Dynamic


def jit(row: Merging, world: World) -> Errors:
    """Jitted against not jitted.

    Args:
      row: the merging method; it is run with its own options.
      world: the inputs.

    Returns:
      {path: error}, not yet relative to the norm of the bank.
    """
    return gap(merged(row, world, jit=False), merged(row, world))


def sharded(row: Merging, world: World) -> Errors:
    """Rows, columns and layers spread over devices, against one device.

    What is spread depends on shapes alone: one site without and one with layers are measured, in a
    program of their own, against the same sites in the program of all (a merge of all sites at once
    takes all).

    Args and Returns are those of `jit`.

    Raises:
      ValueError: the world has no mesh.
    """
    if world.mesh is None:
        raise ValueError("world.mesh: got None, expected a mesh")

    def put(t: Array, axis: int) -> Array:
        spec: list[Dynamic] = [None] * t.ndim
        spec[axis] = "d"
        if t.ndim > 3:
            spec[1] = "s"
        return jax.device_put(t, NamedSharding(world.mesh, PartitionSpec(*spec)))  # type: ignore[arg-type]

    one_of_each = {low[0].ndim: path for path, low in world.bank.items()}.values()
    paths = world.bank if row.scope == "adapter" else one_of_each
    bank: Deltas = {}
    for path in paths:
        u, v = world.bank[path][0], world.bank[path][1]
        bank[path] = LowRank(put(u, -2), put(v, -1))
    one_device = merged(row, world)
    return gap(merged(row, world, bank), {path: one_device[path] for path in bank})


def memory(row: Merging, world: World) -> Errors:
    """Zero where no array of the program on a large site is a quarter of a dense delta or more.

    Args and Returns are those of `jit`.
    """
    n, width = world.weights.shape[0], 4096
    u, v = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, width, 4), (n, 4, width)))

    def f(bank: Deltas, w: Array) -> Deltas:
        return merged(row, world._replace(weights=w), bank, w, jit=False)

    jaxpr = jax.make_jaxpr(f)({"x": LowRank(u, v)}, world.weights).jaxpr  # type: ignore[arg-type]
    return {"": 0.0 if 4 * max(_sizes(jaxpr)) < width * width else float("inf")}


def dtypes(row: Merging, world: World) -> Errors:
    """Adapters and factors kept in 16 bits, against the same numbers in float32.

    Args and Returns are those of `jit`.
    """
    half, exact = (_kept(world.bank, jnp.bfloat16, kind) for kind in (jnp.bfloat16, jnp.float32))
    factor = 0.7  # no number of 8 bits
    read = gather(_adapters(half, factor)).bank
    scaled: Deltas = {p: LowRank(u, v * jnp.float32(factor)) for p, (u, v) in exact.items()}  # type: ignore[misc]
    out = gap(merged(row, world, read), merged(row, world, scaled))
    half, exact = (_kept(world.bank, jnp.float16, kind) for kind in (jnp.float16, jnp.float32))
    deltas = merged(row, world, half)
    gaps = gap(deltas, merged(row, world, exact))
    wide = {p: all(t.dtype == jnp.float32 for t in d) for p, d in deltas.items()}
    return {p: max(e, gaps[p]) if wide[p] else float("inf") for p, e in out.items()}


def _kept(bank: Deltas, kept: Dynamic, dtype: Dynamic) -> Deltas:
    """A bank rounded to `kept`, in `dtype`."""
    return jax.tree.map(lambda t: t.astype(kept).astype(dtype), bank)


def _adapters(bank: Deltas, scale: float) -> Adapter:
    """LoRA adapters of factors [N, *stack, ...], their scale in float32."""
    trainable, frozen, rows = {}, {}, []
    for path, (u, v) in bank.items():  # type: ignore[misc]
        shape, rank = (*u.shape[1:-1], v.shape[-1]), u.shape[-1]
        site = Site(path, shape, "s" * (len(shape) - 2) + "io", jnp.dtype(jnp.float32))
        trainable[path] = {"a": u, "b": v}
        frozen[path] = {"scale": jnp.full(u.shape[:-2], scale, jnp.float32)}
        rows.append((site, LoRA(rank=rank)))
    return Adapter(trainable, frozen, tuple(rows))


def _sizes(jaxpr: Dynamic) -> Iterator[int]:
    """Elements of every array that a program and its inner programs make."""
    for e in jaxpr.eqns:
        yield from (getattr(v.aval, "size", 0) for v in e.outvars)
        for value in jax.tree.leaves(tuple(e.params.values()), is_leaf=_program):
            if _program(value):
                yield from _sizes(getattr(value, "jaxpr", value))


def _program(x: Dynamic) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")
