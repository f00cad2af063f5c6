r"""Compositions of denoisers: several adapters that steer one denoising loop.

===========  ==================================================================================
e(A, z, t)   prediction of the base with adapter A (of the base alone: e(z, t)), as z
A_n          adapter n of N
w            how much of each adapter counts in a step, [N]
===========  ==================================================================================

A system gives three functions:

- ``prepare(adapters) -> state``, once: a PyTree of arrays;
- ``weights(N, T) -> [T, N]``: the weights of every step of a loop of T;
- ``denoise(model, params, state, w, z, t) -> e``: one prediction, of any ``model(params, z, t)``.

Then every loop is

.. math:: z_{k+1} = z_k + \eta \, e(A_1..A_N; w_k; z_k, t_k)

Laws, each an error relative to the largest prediction, 0 where it holds:

=========  =====================================================================================
single     one adapter of weight 1 is that adapter's denoiser
zero       with all weights 0 it is the denoiser of the base
absent     an adapter of weight 0 might as well be another one
order      adapters in another order, each with its own weight, give the same prediction
turns      a loop with the system's own weights does not depend on the order of the adapters
batch      a vmap over samples, each with weights of its own, is the loop over samples
scan       weights over the steps of a scan are the unrolled loop
finite     predictions and their derivatives by the weights are finite, those not all zero
jit        jitted is eager
=========  =====================================================================================
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.contracts import tiny
from jlora.contracts.distance import gap
from jlora.core.adapter import Adapter
from jlora.core.lift import lift
from jlora.core.method import Method
from jlora.system import System
from jlora.types import Dynamic, Tree

LAWS = ("single", "zero", "absent", "order", "turns", "batch", "scan", "finite", "jit")
STEPS, RATE = 4, 0.3  # of the loops that the laws run

Denoiser = Callable[[Tree, Array, Array], Array]  # (params, z, t) -> prediction, as z


def alike(adapters: int, steps: int) -> Float[Array, "T N"]:
    """The weights of a system that counts all adapters alike, in every step.

    Args:
      adapters: N.
      steps: T.

    Returns:
      [T, N], each 1 / N.
    """
    return jnp.full((steps, adapters), 1.0 / adapters, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Composition(System):
    """The record of a composition.

    Attributes:
      prepare: adapters -> state, a PyTree of arrays that `denoise` reads.
      denoise: (model, params, state, weights [N], z, t) -> prediction, as z.
      weights: (N, T) -> weights of every step [T, N].
    """

    laws: ClassVar[tuple[str, ...]] = LAWS
    suite: ClassVar[tuple[str, ...]] = ("tests/contracts/composition_test.py",)

    prepare: Callable[[Sequence[Adapter]], Tree]
    denoise: Callable[[Denoiser, Tree, Tree, Array, Array, Array], Array]
    weights: Callable[[int, int], Array] = alike


class World(NamedTuple):
    """What the laws are measured on: the model of `tiny`, and samples."""

    params: tiny.Params
    adapters: tuple[Adapter, ...]  # three, all different
    z: Float[Array, "S 3 5"]  # samples
    w: Float[Array, "S 3"]  # weights of each sample, of both signs


def world(methods: Sequence[Method], seed: int = 0) -> World:
    """Random adapters, samples and weights.

    Args:
      methods: one adaptation method per adapter; ranks may differ.
      seed: of the draws.

    Returns:
      The world.
    """
    p, rng = tiny.params(seed), np.random.default_rng(seed + 1)
    w = jnp.asarray(rng.uniform(0.3, 1.2, size=(2, len(methods))), jnp.float32).at[0, 1].mul(-1.0)
    return World(p, tiny.trained(methods, p), tiny.inputs(2, seed), w)


def error(law: str, record: Composition, at: World) -> float:
    """The error of a law.

    Args:
      law: one of `LAWS`.
      record: the system.
      at: what it is measured on.

    Returns:
      0 where the law holds, infinity where something is not finite.
    """
    worst = CHECKS[law](record, at)
    return worst if np.isfinite(worst) else float("inf")


def loop(
    record: Composition,
    model: Denoiser,
    params: Tree,
    state: Tree,
    z: Float[Array, "..."],
    w: Float[Array, "T N"],
) -> Float[Array, "..."]:
    """The loop of the equation, under scan, at times from 1 down to 1 / T.

    Args:
      record: the composition.
      model: (params, z, t) -> prediction.
      params: weights of the base.
      state: of `record.prepare`.
      z: where it starts.
      w: weights of every step.

    Returns:
      As z, after T steps.
    """

    def step(z: Array, given: tuple[Array, Array]) -> tuple[Array, None]:
        t, weights = given
        return z + RATE * record.denoise(model, params, state, weights, z, t), None

    return jax.lax.scan(step, z, (_times(len(w)), w))[0]


def _times(steps: int) -> Float[Array, "T"]:
    return jnp.linspace(1.0, 1.0 / steps, steps, dtype=jnp.float32)


@functools.lru_cache(maxsize=32)
def _compiled(denoise: Callable[..., Array]) -> Callable[..., Array]:
    """`denoise` of the tiny model, compiled once for all laws: (params, state, w, z, t)."""
    return jax.jit(functools.partial(denoise, tiny.model))


def _predict(record: Composition, at: World, adapters: Sequence[Adapter], w: Dynamic) -> Array:
    """The prediction at the first sample and time 0.5."""
    state, w = record.prepare(adapters), jnp.asarray(w, jnp.float32)
    return _compiled(record.denoise)(at.params, state, w, at.z[0], jnp.float32(0.5))


def single(record: Composition, at: World) -> float:
    """The first adapter alone, with weight 1.

    Args and Returns are those of `error`.
    """
    want = lift(tiny.model)(at.params, at.adapters[0], at.z[0], jnp.float32(0.5))
    return gap(_predict(record, at, at.adapters[:1], [1.0]), want)


def zero(record: Composition, at: World) -> float:
    """All adapters, with weight 0.

    Args and Returns are those of `error`.
    """
    got = _predict(record, at, at.adapters, np.zeros(len(at.adapters)))
    return gap(got, tiny.model(at.params, at.z[0], jnp.float32(0.5)))


def absent(record: Composition, at: World) -> float:
    """The last adapter, of weight 0, exchanged for the first.

    Args and Returns are those of `error`.
    """
    w = at.w[0].at[-1].set(0.0)
    other = (*at.adapters[:-1], at.adapters[0])
    return gap(_predict(record, at, at.adapters, w), _predict(record, at, other, w))


def order(record: Composition, at: World) -> float:
    """Adapters and weights in reverse.

    Args and Returns are those of `error`.
    """
    turned = _predict(record, at, at.adapters[::-1], at.w[0][::-1])
    return gap(turned, _predict(record, at, at.adapters, at.w[0]))


def turns(record: Composition, at: World) -> float:
    """Adapters in reverse, with the system's own weights of a loop.

    Args and Returns are those of `error`.
    """
    w = record.weights(len(at.adapters), STEPS)
    results = [_unrolled(record, at, a, w) for a in (at.adapters[::-1], at.adapters)]
    return gap(*results)


def _unrolled(
    record: Composition, at: World, adapters: Sequence[Adapter], w: Float[Array, "T N"]
) -> Array:
    """`loop` in Python."""
    state, z, one = record.prepare(adapters), at.z[0], _compiled(record.denoise)
    for t, weights in zip(_times(len(w)), w, strict=True):
        z = z + RATE * one(at.params, state, weights, z, t)
    return z


def batch(record: Composition, at: World) -> float:
    """All samples under one vmap, against one by one.

    Args and Returns are those of `error`.
    """
    state, t, one = record.prepare(at.adapters), jnp.float32(0.5), _compiled(record.denoise)
    run = jax.jit(jax.vmap(functools.partial(record.denoise, tiny.model), (None, None, 0, 0, None)))
    want = [one(at.params, state, w, z, t) for w, z in zip(at.w, at.z, strict=True)]
    return gap(run(at.params, state, at.w, at.z, t), jnp.stack(want))


def scan(record: Composition, at: World) -> float:
    """A loop whose weights change in every step, against the same one unrolled.

    Args and Returns are those of `error`.
    """
    w = jnp.tile(at.w, (STEPS // 2, 1))
    w = w * jnp.linspace(0.5, 1.5, STEPS, dtype=w.dtype)[:, None]
    run = jax.jit(functools.partial(loop, record, tiny.model))
    got = run(at.params, record.prepare(at.adapters), at.z[0], w)
    return gap(got, _unrolled(record, at, at.adapters, w))


def finite(record: Composition, at: World) -> float:
    """0, or infinity where a derivative by a weight is zero or something is not finite.

    Args and Returns are those of `error`.
    """
    state = record.prepare(at.adapters)

    @jax.jit
    def slopes(w: Array) -> Array:
        return jax.grad(lambda w: jnp.sum(jnp.sin(_predicted(w))))(w)

    def _predicted(w: Array) -> Array:
        return record.denoise(tiny.model, at.params, state, w, at.z[0], jnp.float32(0.5))

    gradients = np.asarray([slopes(w) for w in (at.w[0], jnp.zeros_like(at.w[0]))])
    return 0.0 if (np.isfinite(gradients) & (gradients != 0)).all() else float("inf")


def jit(record: Composition, at: World) -> float:
    """Jitted against eager.

    Args and Returns are those of `error`.
    """
    state = record.prepare(at.adapters)
    given = (at.params, state, at.w[0], at.z[0], jnp.float32(0.5))
    return gap(_compiled(record.denoise)(*given), record.denoise(tiny.model, *given))


CHECKS: Mapping[str, Callable[[Composition, World], float]] = {
    "single": single,
    "zero": zero,
    "absent": absent,
    "order": order,
    "turns": turns,
    "batch": batch,
    "scan": scan,
    "finite": finite,
    "jit": jit,
}
