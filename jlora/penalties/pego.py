r"""PEGO: a group of LoRAs whose deltas are kept orthogonal to the weight and to one another.

===============  ====================================================================
W                the frozen weight, [d_in, d_out]
N                number of LoRAs of the group, `groups`
D_i              delta of one, s A_i B_i, [d_in, d_out]
lambda           `weight`
abs-sum          of a matrix: the sum of the absolute values of its entries
===============  ====================================================================

.. math::
    W' = W + \sum_{i=1}^{N} D_i, \qquad
    \Omega = \lambda \Big[ \sum_i \lVert W^T D_i \rVert_{1} +
    \sum_{i < j} \lVert D_i^T D_j \rVert_{1} \Big]

summed over all matrices. The first term keeps what the pre-trained weight does, the second makes
the LoRAs learn different things; both are for test data from a domain that was not trained on. The
group is one `LoRA` of rank N r at scale 1, ``jl.LoRA(rank=N * r, alpha=N * r)``, of which
consecutive columns of A and rows of B belong together, so a trained one merges as any. Products are
taken through the factors, :math:`(W^T A_i) B_i` and :math:`B_i^T (A_i^T A_j) B_j`: the sums of
absolute values need matrices of [d_out, d_out], one at a time. At the start (B = 0) value and
gradient are zero. The first term can vanish for D_i other than 0 only where the rank of W is below
d_in.

Reference: Hu et al. 2024, arXiv:2407.15085.
Source: paper and official code.
Deviates: nothing that is known.
"""

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora import numerics
from jlora.contracts.penalty import Params, Penalty
from jlora.core.adapter import Adapter
from jlora.core.lift import flatten
from jlora.core.site import at_least_float32, fold, widened
from jlora.methods.low_rank.lora import LoRA
from jlora.types import Tree


def pego(adapter: Adapter, params: Tree, groups: int = 4, weight: float = 0.1) -> jax.Array:
    """The penalty of all matrices that LoRA adapts.

    Args:
      adapter: of any methods; sites of others than LoRA do not count. Stacked layers do, each.
      params: the frozen parameters that it belongs to.
      groups: N, into how many LoRAs of equal rank each is cut; 4 as in the paper.
      weight: lambda; 0.1 as in the official code.

    Returns:
      [], not negative, of the dtype of the factors, at least float32; zero where none counts.

    Raises:
      ValueError: groups below 1 or no divisor of a rank, a weight that is negative, a site that is
        not in the parameters.
    """
    if not weight >= 0:
        raise ValueError(f"weight: got {weight}, expected a number >= 0")
    leaves, pairs = flatten(params)[0], []
    for site, method in adapter.sites:
        if not isinstance(method, LoRA):
            continue
        if site.path not in leaves:
            raise ValueError(f"{site.path}: got no such leaf of params, expected the base weight")
        p = widened({**adapter.frozen[site.path], **adapter.trainable[site.path]})
        rank = p["a"].shape[-1]
        if groups < 1 or rank % groups:
            raise ValueError(
                f"{site.path}: groups: got {groups}, expected a divisor of rank {rank}"
            )
        w = fold(leaves[site.path], site.kinds)
        w = jax.lax.stop_gradient(w.astype(at_least_float32(p["a"].dtype)))
        stack = w.shape[:-2]
        scale = jnp.broadcast_to(p["scale"], stack)[..., None, None].astype(p["a"].dtype)
        parts = [t.reshape(-1, *t.shape[-2:]) for t in (w, p["a"] * scale, p["b"])]
        for w, a, b in zip(*parts, strict=True):  # a layer at a time
            pairs.append(of_matrix(w, a, b, groups))
    return weight * sum(pairs[1:], pairs[0]) if pairs else jnp.zeros((), jnp.float32)


def of_matrix(
    w: Float[Array, "d_in d_out"],
    a: Float[Array, "d_in R"],
    b: Float[Array, "R d_out"],
    groups: int,
) -> jax.Array:
    """Both terms of one matrix, without their weight.

    Args:
      w: W.
      a: all A_i side by side, with the scale, R = N r.
      b: all B_i, one below the other.
      groups: N, a divisor of R.

    Returns:
      [].
    """
    lefts, rights = jnp.split(a, groups, axis=1), jnp.split(b, groups, axis=0)
    total = jnp.zeros((), a.dtype)
    for left, right in zip(lefts, rights, strict=True):
        total = total + _absolute(numerics.matmul(w.T, left), right)
    for i, j in itertools.combinations(range(groups), 2):
        gram = numerics.matmul(lefts[i].T, lefts[j])
        total = total + _absolute(numerics.matmul(rights[i].T, gram), rights[j])
    return total


@jax.checkpoint
def _absolute(left: Array, right: Array) -> Array:
    """The abs-sum of left @ right, which the backward pass makes again; the slope at 0 is 0."""
    product = numerics.matmul(left, right)
    return jnp.sum(product * jax.lax.stop_gradient(jnp.sign(product)))


def without_b(adapter: Adapter) -> Adapter:
    """An adapter whose penalty is zero.

    Args:
      adapter: of LoRA sites.

    Returns:
      The adapter with B = 0.
    """
    t = {path: {**p, "b": jnp.zeros_like(p["b"])} for path, p in adapter.trainable.items()}
    return adapter.replace(trainable=t)


def _penalty(adapter: Adapter, params: Params, ctx: object) -> jax.Array:
    del ctx
    return pego(adapter, params, groups=2)


SYSTEM = Penalty(
    name="PEGO",
    paper="Hu 2024, 2407.15085",
    symbol="pego",
    kind="composition",
    claim="pego",
    evidence="both terms by numpy; zero for deltas orthogonal to the weight and to one another",
    rows=(32,),
    examples=(LoRA(rank=4, alpha=4.0),),
    penalty=_penalty,
    zero=without_b,
    additive=True,
    breaks={"thin": "a sum of absolute values needs the entries, which are d_out x d_out"},
)
