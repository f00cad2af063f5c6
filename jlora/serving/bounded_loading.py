r"""Bounded asynchronous loading: a picture is begun without its adapter, which arrives on the way.

Of T denoising steps the first ones decide what a picture shows and hardly notice an adapter of a
style. So the adapter is read by another thread while the base makes them, at most K of them; what
has not arrived then is waited for. It is merged into the weights in place, and no step is compiled
again:

.. math::
    z_{k+1} = \mathrm{step}(W_k, z_k, k), \qquad
    W_k = \begin{cases} W & k < p \\ W + \Delta & k \ge p \end{cases}, \qquad
    p = \min(K, \text{steps made when the adapter arrived})

K is profiled: with z of a run with the adapter from the start and z' of one without, from the same
noise,

.. math::
    K = \max \{ k \le T : \cos(z_j, z'_j) \ge 0.99 \text{ for all } j \le k \}

Symbols: K -> ``bound``, p -> ``patched``, T -> ``steps``, :math:`\Delta` -> the adapter's delta.

Reference: Li et al. 2024 (arXiv:2407.02031), as published at USENIX ATC 2025 (Katz): loading
    bounded by K, waiting, patching in place, the cosine of 0.99 (there K = 10 was set where the
    profile turned at about step 20).
Deviates: "in place" is a jitted merge that is given the buffers of the weights; `unpatch` subtracts
    the delta again, up to rounding. The published rule takes the first step below 0.99; K here is
    the last one before it, after which nothing has differed yet.
"""

import time
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from jlora.core.adapter import Adapter
from jlora.core.bank import one_adapter
from jlora.core.merge import merge
from jlora.system import System
from jlora.types import Tree

ALIKE = 0.99  # cosine from which on two states count as the same


class Ran(NamedTuple):
    """What happened to one request."""

    z: Float[Array, "..."]  # the last state
    params: Tree  # as the last step used them
    patched: int  # p, steps that were made without the adapter
    waited: float  # seconds of the wait at K; 0 where the adapter had arrived


@partial(jax.jit, donate_argnums=0)
def patch(params: Tree, adapter: Adapter) -> Tree:
    """The weights with an adapter merged, in the memory of the weights.

    Args:
      params: given up: their buffers become those of the result where the backend can.
      adapter: one adapter; others of its sites and ranks need no new compilation.

    Returns:
      As `params`.

    Raises:
      ValueError: as `jlora.merge`.
    """
    one_adapter(adapter, "patch")
    return merge(params, adapter)


@partial(jax.jit, donate_argnums=0)
def unpatch(params: Tree, adapter: Adapter) -> Tree:
    """The weights without an adapter that `patch` merged, up to rounding.

    Args:
      params: given up, as in `patch`.
      adapter: the one that was merged, whose delta does not depend on the weights.

    Returns:
      As `params`.

    Raises:
      ValueError: as `jlora.merge`.
    """
    one_adapter(adapter, "unpatch")
    # the merge is W + delta: reflected at W it is W - delta
    return jax.tree.map(lambda w, m: w + (w - m), params, merge(params, adapter))


def request(
    step: Callable[[Tree, Float[Array, "..."], int], Float[Array, "..."]],
    params: Tree,
    z: Float[Array, "..."],
    steps: int,
    load: Callable[[], Adapter],
    bound: int,
    executor: Executor,
    merged: Callable[[Tree, Adapter], Tree] = patch,
) -> Ran:
    """Makes all steps of a request while its adapter is loaded.

    Args:
      step: (weights, state, number of the step) -> state; jitted, so that weights with and without
        the adapter are arguments of one program.
      params: the base's weights; given up as soon as `merged` gives them up.
      z: the first state.
      steps: T.
      load: reads the adapter; called once, by a thread of `executor`. What it raises is raised.
      bound: K, steps that are made without the adapter at most; 0 waits at once, T makes a picture
        of the base where the adapter is late.
      executor: of threads.
      merged: (weights, adapter) -> weights.

    Returns:
      The last state, the weights that it was made with, and how the request went.

    Raises:
      ValueError: K outside 0..T.
    """
    if not 0 <= bound <= steps:
        raise ValueError(f"bound: got {bound}, expected 0 to {steps} steps")
    future, patched, waited = executor.submit(load), steps, 0.0
    for number in range(steps):
        if patched == steps and (future.done() or number == bound):
            start = time.perf_counter()
            late = not future.done()
            adapter = future.result()
            waited = (time.perf_counter() - start) * late
            params, patched = merged(params, adapter), number
        # a step that was only enqueued has not been made: the bound counts those that were
        z = jax.block_until_ready(step(params, z, number))
    return Ran(z, params, patched, waited)


def cosines(
    one: Float[np.ndarray, "n states ..."], other: Float[np.ndarray, "n states ..."]
) -> Float[np.ndarray, "states"]:
    """How alike the states of two runs are, step by step.

    Args:
      one: states of n samples with the adapter, from the first to the last.
      other: without it, from the same noise.

    Returns:
      The mean cosine over samples, float64.

    Raises:
      ValueError: other shapes.
    """
    if one.shape != other.shape or one.ndim < 3:
        raise ValueError(f"states: got {one.shape} and {other.shape}, expected [n, states, ...]")
    a, b = (x.reshape(*x.shape[:2], -1).astype(np.float64) for x in (one, other))
    size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return ((a * b).sum(-1) / size).mean(0)


def profiled(alike: Float[np.ndarray, "states"], least: float = ALIKE) -> int:
    """K of a profile.

    Args:
      alike: of `cosines`; its first value is that of the noise, before any step.
      least: the cosine below which states differ; 0.99, as in the paper.

    Returns:
      The number of steps after which the states have been alike so far, at most T.

    Raises:
      ValueError: the first states differ already, so they are not of one noise.
    """
    if not alike[0] >= least:
        raise ValueError(f"profile: got {alike[0]} before the first step, expected one noise")
    below = np.flatnonzero(~(np.asarray(alike) >= least))
    return int(below[0]) - 1 if len(below) else len(alike) - 1


SYSTEM = System(
    name="SwiftDiffusion",
    paper="Li 2024, 2407.02031; USENIX ATC 2025",
    symbol="request",
    evidence="steps and weights by numpy at every arrival; waiting with gated threads; one "
    "compilation; the profile of known states; exact and stale control, guidance on two devices",
    rows=(84,),
    tests=(
        *("tests/serving/control_service_test.py", "tests/serving/halves_test.py"),
        "tests/models/dit/control_test.py",
    ),
    claim="swift_diffusion",
)
