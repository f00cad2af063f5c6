r"""Taps of the backward pass: gradients by the weights of a function, and by what sites return.

=========  =======================================================================
x_t, y_t   input and output rows of a site, y_t = x_t W
δ_t        the gradient of the loss by y_t, [d_out]
=========  =======================================================================

.. math::
    G = \frac{\partial L}{\partial W} = \sum_t x_t \delta_t^T, \qquad
    D = \sum_t \delta_t \delta_t^T

`gradients` gives G one matrix at a time: at most `limit` bytes of gradients exist at once. Sites
are taken in groups that fit, and the batches are read once per group; a stack of layers that does
not fit is taken layer by layer, inside the scan. `output_moments` sums D for all sites in one pass.
The base may be of any dtype, or quantised; the sums are in at least float32.

Original to jlora: a function that returns y and whose gradient by an array of zeros is x^T δ.
Deviates: nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jlora.analysis.taps import arguments, check_finite, gram, hashable, tap
from jlora.core.lift import lift
from jlora.core.method import Method
from jlora.core.site import Arrays, Site, at_least_float32
from jlora.types import Batch, Dynamic, Tree


class Gradient(NamedTuple):
    """The gradient by one matrix."""

    site: Site
    index: int  # of the matrix in the flattened stack; 0 of a site without one
    value: Array  # [d_in, d_out], summed over the batches


def gradients(
    loss: Callable,
    params: Tree,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    limit: int = 2**30,
) -> Iterator[Gradient]:
    """The gradient of a loss by each matrix, one after the other, summed over all batches.

    Args:
      loss: (params, *batch) -> scalar; a batch that is no tuple is one argument.
      params: the parameters.
      batches: a sequence, read once per group of matrices.
      sites: of `jl.sites`.
      limit: bytes of gradients that may exist at once; one matrix is always allowed.

    Yields:
      One per matrix, of stacks layer by layer; those of a group are kept until the last of it.

    Raises:
      ValueError: no batches, values that are not finite.
      TypeError: batches that can be read only once.
      DenseWeightError: a site that is used transposed or through a view of its weight.
    """
    if not isinstance(batches, Sequence):
        got = type(batches).__name__
        raise TypeError(f"batches: got {got}, expected a sequence: it is read several times")
    for group in _groups(sites, limit):
        alone = _bytes(group[0]) > limit and group[0].stack
        yield from (_by_layer if alone else _together)(loss, params, batches, group)


def output_moments(
    loss: Callable, params: Tree, batches: Iterable[Batch], sites: Sequence[Site]
) -> dict[str, Array]:
    """Second moments of the gradients of a loss by the outputs of sites, summed over all batches.

    Args:
      loss: (params, *batch) -> scalar; a batch that is no tuple is one argument.
      params: the parameters.
      batches: read once.
      sites: of `jl.sites`.

    Returns:
      By path, [*stack, d_out, d_out], in at least float32.

    Raises:
      ValueError: no batches, values that are not finite.
      DenseWeightError: as `gradients`.
    """
    z = {s.path: _zeros(s, *s.stack, s.d_out, s.d_out) for s in sites}
    total = _accumulated(loss, params, batches, sites, z, Probe("outputs"))
    for path, t in total.items():
        check_finite(path, t, "gradients of its outputs")
    return total


def layer_step(loss: Callable, site: Site) -> Callable[..., Array]:
    """The jitted step of `gradients` for a stack that is taken layer by layer.

    Args:
      loss: (params, *batch) -> scalar.
      site: a stacked site.

    Returns:
      (the sum so far [d_in, d_out], params, index of the layer, arguments of the loss) -> the sum.
    """
    adapter = tap([site], lambda path: Probe("weights", one_layer=True))

    def of_z(z: Array, params: Tree, index: Array, args: tuple) -> Array:
        return lift(loss)(params, adapter, *args, ctx={"z": z, "layer": index})

    def step(total: Array, params: Tree, index: Array, args: tuple) -> Array:
        return total + jax.grad(of_z)(jnp.zeros_like(total), params, index, args)

    return jax.jit(step)


@dataclasses.dataclass(frozen=True)
class Probe(Method):
    """Leaves x @ w as it is; the gradient by its z is G or D."""

    indexed: ClassVar[bool] = True
    of: str = "weights"  # or "outputs"
    one_layer: bool = False  # z is that of the layer ctx["layer"] only, [d_in, d_out]

    def apply(self, x: Dynamic, w: Dynamic, p: Arrays, ctx: Mapping[str, Dynamic]) -> Dynamic:
        """x @ w."""
        seen, y = x.dense() if hasattr(x, "dense") else x, x @ w
        if not self.one_layer:
            return _observed(self.of, y, seen, p["z"], jnp.ones(()))
        here = (ctx["index"] == ctx["layer"]).astype(jnp.float32)
        return _observed(self.of, y, seen, ctx["z"], here)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _observed(of: str, y: Array, x: Array, z: Array, here: Array) -> Array:
    """y; its gradient by z is that of the product y = x @ w by w, where `here` is 1."""
    return y


def _forward(of, y, x, z, here):
    return y, (x, z, here)


def _backward(of, kept, ct):
    x, z, here = kept
    left = x if of == "weights" else ct
    grad = lax.cond(here > 0, lambda: gram(left, ct).astype(z.dtype), lambda: jnp.zeros_like(z))
    return ct, jnp.zeros_like(x), grad, jnp.zeros_like(here)


_observed.defvjp(_forward, _backward)


def _groups(sites: Sequence[Site], limit: int) -> list[list[Site]]:
    """Neighbours whose gradients fit together; a site that does not fit is alone."""
    groups: list[list[Site]] = []
    for site in sites:
        if groups and sum(map(_bytes, (*groups[-1], site))) <= limit:
            groups[-1].append(site)
        else:
            groups.append([site])
    return groups


def _together(loss, params, batches, sites):
    """Whole sites, in one pass over the batches."""
    z = {s.path: _zeros(s, *s.stack, s.d_in, s.d_out) for s in sites}
    total = _accumulated(loss, params, batches, sites, z, Probe("weights"))
    for site in sites:
        value = total.pop(site.path).reshape(-1, site.d_in, site.d_out)
        check_finite(site.path, value, "gradients")
        for index in range(len(value)):
            yield Gradient(site, index, value[index])


def _by_layer(loss, params, batches, sites):
    """One layer of a stack per pass over the batches."""
    (site,) = sites
    step = layer_step(loss, site)
    for index in range(math.prod(site.stack)):
        total = _zeros(site, site.d_in, site.d_out)
        for batch in batches:
            total = step(total, params, jnp.asarray(index, jnp.int32), arguments(batch))
        if not batches:
            raise ValueError(f"{site.path}: got no data: no batches")
        check_finite(site.path, total, "gradients")
        yield Gradient(site, index, total)


def _accumulated(loss, params, batches, sites, z, probe) -> dict[str, Array]:
    """The sum over batches of what the backward pass leaves for the z of every site."""
    adapter, loss = tap(sites, lambda path: probe), hashable(loss)
    total, seen = z, False
    for batch in batches:
        total, seen = _step(loss, total, params, adapter, arguments(batch)), True
    if not seen:
        raise ValueError(f"{sites[0].path}: got no data: no batches")
    return total


@functools.partial(jax.jit, static_argnums=0)
def _step(loss, total, params, adapter, args):
    """The sum with one more batch."""

    def of_z(z):
        trainable = {path: {"z": t} for path, t in z.items()}
        return lift(loss)(params, adapter.replace(trainable=trainable), *args)

    zeros = jax.tree.map(jnp.zeros_like, total)
    return jax.tree.map(jnp.add, total, jax.grad(of_z)(zeros))


def _zeros(site: Site, *shape: int) -> Array:
    return jnp.zeros(shape, at_least_float32(site.dtype))


def _bytes(site: Site) -> int:
    item = jnp.dtype(at_least_float32(site.dtype)).itemsize
    return math.prod(site.stack) * site.d_in * site.d_out * item
