r"""A control branch as a service: it runs while the base's encoder does, on a device of its own.

.. math::
    \text{exact:} \quad u_k = \mathrm{decode}(\mathrm{encode}(z_k, k),\; \mathrm{branch}(z_k, k))
    \qquad
    \text{stale:} \quad u_k = \mathrm{decode}(\mathrm{encode}(z_k, k),\;
        \mathrm{branch}(z_{k-1}, k - 1))

The exact form has one synchronisation per step, before the decoder, and gives what the parts give
one after the other. The stale form never waits for the branch of its own step, which was sent off
one step earlier; the first step is exact. It is for slow links, where neighbouring outputs of the
branch are alike (`jlora.serving.bounded_loading.cosines`).

Reference: Li et al. 2024 (arXiv:2407.02031; USENIX ATC 2025): ControlNet-as-a-service and its
    asynchronous pipeline, which uses the output of the step before.
Deviates: both run by JAX's asynchronous dispatch in one process; the paper's service has several
    branches and queues requests of others.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from jlora.types import Dynamic, Tree


class Parts(NamedTuple):
    """Three jitted functions; what is bound in them lies on the device where they run."""

    encode: Callable[[Tree, Float[Array, "..."], int], Tree]  # (weights, state, step)
    branch: Callable[[Tree, Float[Array, "..."], int], Tree]  # (control, state, step) -> residuals
    # (weights, encoded, residuals, state, step) -> next state
    decode: Callable[[Tree, Tree, Tree, Float[Array, "..."], int], Float[Array, "..."]]


class Placed(NamedTuple):
    """Weights, each on its device."""

    params: Tree  # of the base
    control: Tree  # of the branch, and what it shares with the base
    base: Dynamic  # device of encoder and decoder
    service: Dynamic  # device of the branch; may be the base's


def placed(params: Tree, control: Tree, base: Dynamic, service: Dynamic) -> Placed:
    """Weights on their devices.

    Args:
      params: of the base.
      control: of the branch.
      base: device of encoder and decoder.
      service: device of the branch.

    Returns:
      Both, moved.
    """
    return Placed(
        jax.device_put(params, base), jax.device_put(control, service), base, service
    )  # fmt: skip


def run(
    parts: Parts, at: Placed, z: Float[Array, "..."], steps: int, *, stale: bool = False
) -> tuple[Float[Array, "..."], list[Tree]]:
    """All steps of a request.

    Args:
      parts: the functions.
      at: weights and devices.
      z: the first state.
      steps: T.
      stale: use what the branch said of the step before; False: of the same step.

    Returns:
      The last state, and the residuals that each step used.

    Raises:
      ValueError: no steps.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    z, used, coming = jax.device_put(z, at.base), [], None
    for number in range(steps):
        sent = parts.branch(at.control, jax.device_put(z, at.service), number)  # does not wait
        encoded = parts.encode(at.params, z, number)
        residuals = jax.device_put(coming if stale and number else sent, at.base)
        z, coming = parts.decode(at.params, encoded, residuals, z, number), sent
        used.append(residuals)
    return jax.block_until_ready(z), used
