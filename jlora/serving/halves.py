r"""Classifier-free guidance on two devices: each evaluates one half, a weighted sum joins them.

.. math:: \hat y = (1 - w)\, y_\varnothing + w\, y_c
    = \textstyle\sum_{d \in \{0, 1\}} v_d\, f(z, t, \text{null} = [d = 0])

The sum over devices is the only communication: one prediction per step.

Reference: Li et al. 2024 (arXiv:2407.02031; USENIX ATC 2025): latent parallelism, 1.4 to 1.9
    times as fast there.
Deviates: the halves are joined by an all-reduce of weighted predictions, where the paper gathers
    both; the same number up to rounding.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from jlora.types import Dynamic, Tree

AXIS = "half"


def mesh(devices: tuple[Dynamic, ...] | None = None) -> Mesh:
    """The mesh of both halves.

    Args:
      devices: those that are used; None: the first of the default backend.

    Returns:
      A mesh of two devices.

    Raises:
      ValueError: another number of devices.
    """
    chosen = tuple(jax.devices()[:2]) if devices is None else devices
    if len(chosen) != 2:
        raise ValueError(f"halves: got {len(chosen)} devices, expected 2")
    return Mesh(np.asarray(chosen), (AXIS,))


def guided(
    model: Callable[..., Float[Array, "..."]], over: Mesh
) -> Callable[..., Float[Array, "..."]]:
    """Guidance whose halves are evaluated at the same time.

    Args:
      model: (params, z, t, cond, null) -> prediction, of one example or of a batch.
      over: of `mesh`.

    Returns:
      denoise(params, z, t, cond, scale), w = 1 being the conditional prediction.

    Raises:
      ValueError: another mesh.
    """
    if over.shape != {AXIS: 2}:
        raise ValueError(f"mesh: got {dict(over.shape)}, expected {{{AXIS!r}: 2}}")
    whole = PartitionSpec()

    def half(params: Tree, z: Array, t: Array, cond: Tree, scale: Array, null: Array) -> Array:
        weight = jnp.where(null[0], 1.0 - scale, scale)
        return jax.lax.psum(weight * model(params, z, t, cond, null[0]), AXIS)

    # what differs between the devices is not tracked through the model: a scan whose start does not
    # depend on `null` is refused otherwise
    local = jax.shard_map(
        half,
        mesh=over,
        in_specs=(*[whole] * 5, PartitionSpec(AXIS)),
        out_specs=whole,
        check_vma=False,
    )

    def denoise(params, z, t, cond, scale):
        return local(params, z, t, cond, jnp.float32(scale), jnp.asarray([True, False]))

    return denoise
