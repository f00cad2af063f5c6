r"""FiTv2's AdaLN-LoRA: one modulation matrix for all blocks, and a low-rank one per block.

A DiT block reads its condition as six vectors, which shift, scale and gate its attention and its
feed-forward part. In DiT each block computes them by a matrix of its own; together these matrices
hold a third of all parameters. FiTv2 shares one matrix and adds a product of small ones:

.. math::
    m_l(c) = W\,\mathrm{silu}(c) + b + U_l\,(D_l\,\mathrm{silu}(c) + a_l) + u_l, \qquad
    l = 1 \dots L

With :math:`W`, :math:`b`, :math:`U_l` and :math:`u_l` at zero a fresh block is the identity. It is
a layer that is trained from nothing, not an adapter: the sum depends on l through the product
alone, and nothing is frozen. At r = d it holds every adaLN: :math:`D_l = I` and
:math:`U_l = W_l - W`.

Symbols: c -> ``condition`` [d], W and b -> ``shared`` {kernel [d, 6 d], bias [6 d]}, D and a ->
``down`` {kernel [d, r], bias [r]}, U and u -> ``up`` {kernel [r, 6 d], bias [6 d]} of one block;
kernels are stored (in, out). Numbers: 6 d^2 + 6 d + L (7 d r + r + 6 d), of adaLN L (6 d^2 + 6 d).

Raises: ValueError for a rank outside 1 .. d and for kernels that are not [L, d, 6 d].
Reference: Wang et al. 2024, FiTv2 (arXiv:2410.13925); adaLN-zero, Peebles and Xie 2023
    (arXiv:2212.09748).
Deviates: `approximated`, which finds the factors of trained adaLN matrices, is original to jlora.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.system import System
from jlora.types import Tree

PARTS = 6  # shift, scale, gate of attention, then of the feed-forward part


def modulation(
    condition: Float[Array, "d"], own: Tree, shared: Tree | None = None
) -> Float[Array, "6 d"]:
    """The six vectors of one block.

    Args:
      condition: c, of one picture.
      own: {down, up} of the block, or {kernel [d, 6 d], bias [6 d]} of adaLN.
      shared: {kernel, bias} of all blocks; None: `own` is adaLN's.

    Returns:
      Shift, scale and gate of attention, then of the feed-forward part.
    """
    x = jax.nn.silu(condition)
    if shared is None:
        return _dense(x, own).reshape(PARTS, -1)
    return (_dense(x, shared) + _dense(_dense(x, own["down"]), own["up"])).reshape(PARTS, -1)


def _dense(x: Array, leaves: Tree) -> Array:
    return x @ leaves["kernel"] + leaves["bias"]


def init_shared(width: int) -> Tree:
    """W and b, zero.

    Args:
      width: d.

    Returns:
      {kernel [d, 6 d], bias [6 d]}, float32.
    """
    wide = PARTS * width
    return {"kernel": jnp.zeros((width, wide)), "bias": jnp.zeros((wide,))}


def init_own(key: PRNGKeyArray, width: int, rank: int) -> Tree:
    """The modulation of one fresh block, which returns zero.

    Args:
      key: of D, which is drawn from Glorot's uniform law.
      width: d.
      rank: r; 0 for adaLN.

    Returns:
      {down, up}, or {kernel, bias} of adaLN, float32.

    Raises:
      ValueError: a rank outside 0 .. d.
    """
    if not 0 <= rank <= width:
        raise ValueError(f"rank: got {rank}, expected 0 (adaLN) to width {width}")
    if rank == 0:
        return init_shared(width)
    draw = jax.nn.initializers.glorot_uniform()
    wide = PARTS * width
    return {
        "down": {"kernel": draw(key, (width, rank), jnp.float32), "bias": jnp.zeros((rank,))},
        "up": {"kernel": jnp.zeros((rank, wide)), "bias": jnp.zeros((wide,))},
    }


def size(width: int, depth: int, rank: int) -> int:
    """Numbers in the modulation of all blocks.

    Args:
      width: d.
      depth: L.
      rank: r; 0 for adaLN.

    Returns:
      The count of the module's docstring.
    """
    full = PARTS * width * (width + 1)
    if rank == 0:
        return depth * full
    return full + depth * ((PARTS + 1) * width * rank + rank + PARTS * width)


def approximated(
    kernel: Float[Array, "L d wide"], bias: Float[Array, "L wide"], rank: int
) -> tuple[Tree, Tree]:
    """AdaLN-LoRA nearest to adaLN matrices around their mean, in Frobenius norm.

    W and b are the means over the blocks; U D of a block is the truncated singular value
    decomposition of what remains, so at r = d the modulation is the same.

    Args:
      kernel: W_l of adaLN, (in, out).
      bias: of them.
      rank: r, 1 to d.

    Returns:
      (shared, own): own with a leading axis L, float32.

    Raises:
      ValueError: another shape, or a rank outside 1 .. d.
    """
    whole, offset = np.asarray(kernel, np.float64), np.asarray(bias, np.float64)
    if whole.ndim != 3 or whole.shape[2] != PARTS * whole.shape[1]:
        raise ValueError(f"kernel: got shape {whole.shape}, expected [L, d, 6 d]")
    if offset.shape != (whole.shape[0], whole.shape[2]):
        raise ValueError(f"bias: got shape {offset.shape}, expected [L, 6 d] of kernel")
    if not 1 <= rank <= whole.shape[1]:
        raise ValueError(f"rank: got {rank}, expected 1 to {whole.shape[1]}")
    mean, middle = whole.mean(0), offset.mean(0)
    left, values, right = np.linalg.svd(whole - mean, full_matrices=False)
    root = np.sqrt(values[:, :rank])
    down, up = left[:, :, :rank] * root[:, None], root[:, :, None] * right[:, :rank]
    own = {
        "down": {"kernel": _single(down), "bias": jnp.zeros((len(whole), rank))},
        "up": {"kernel": _single(up), "bias": _single(offset - middle)},
    }
    return {"kernel": _single(mean), "bias": _single(middle)}, own


def _single(x: np.ndarray) -> Array:
    return jnp.asarray(x.astype(np.float32))


SYSTEM = System(
    name="FiTv2 AdaLN-LoRA",
    paper="Wang 2024, 2410.13925",
    symbol="modulation",
    evidence="the sum by NumPy; a fresh block is the identity; at full rank every adaLN, below it"
    " the error of the truncated decomposition; numbers counted",
    rows=(18,),
    claim="fitv2_adaln_lora",
)
