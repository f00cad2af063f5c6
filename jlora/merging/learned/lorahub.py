"""LoraHub: a few labelled examples of a new task choose the weights of known adapters.

=========  ====================================================================
A_n, B_n   factors of adapter n, `u` [d_in, R] and `v` [R, d_out]
c          coefficients [N] in [-1.5, 1.5], 0 at the start
L          loss on the examples
=========  ====================================================================

.. math:: \\min_c \\; L\\Bigl(\\bigl(\\sum_n c_n A_n\\bigr) \\bigl(\\sum_n c_n B_n\\bigr)\\Bigr)
          + 0.05 \\, \\mathrm{mean} |c|

`lorahub` searches without gradients, as the paper does; `lorahub_gradient` descends through the
lifted model. `space="factors"` mixes factors as above: cheap to store (rank R), dependent on the
basis of each adapter, and flat at c = 0, where both sums vanish: descent cannot start there.
`space="deltas"` takes sum c_n A_n B_n instead, of rank N R.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; coefficients [N].

Paper: Huang et al. 2023, arXiv:2307.13269.
Source: README and copies of the official code (sail-sg/lorahub) for the penalty; notes for the
bounds; the start from memory, unverified.
Deviates: the search is CMA-ES (theirs: nevergrad's NGOpt, a portfolio), counted in evaluations;
the gradient variant and the delta space are ours.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, PRNGKeyArray

from jlora.algebra import LowRank
from jlora.core.adapter import Adapter
from jlora.merging.engine.inputs import gather
from jlora.merging.engine.record import Merging
from jlora.merging.exact.concat import concat
from jlora.merging.learned import cma
from jlora.merging.learned.coefficients import Learned, Loss, learn, mixed, penalised
from jlora.system import System
from jlora.types import Batch


def factor_mix(bank: LowRank, weights: Float[Array, "n"]) -> LowRank:
    """(sum w u)(sum w v) of one site: the composition of the paper.

    Args:
      bank: u [N, d_in, R], v [N, R, d_out].
      weights: [N]. Both factors are multiplied: -1 gives the adapter itself, and 1/2 a quarter of
        it. So `merge` refuses negative ones; the search of the paper does not.

    Returns:
      u [d_in, R], v [R, d_out].
    """
    u = jnp.einsum("n,nir->ir", weights, bank.u, precision=lax.Precision.HIGHEST)
    return LowRank(u, jnp.einsum("n,nro->ro", weights, bank.v, precision=lax.Precision.HIGHEST))


def lorahub(
    loss: Loss,
    adapters: Sequence[Adapter] | Adapter,
    batch: Batch,
    key: PRNGKeyArray,
    *,
    budget: int = 40,
    space: str = "factors",
    bound: float = 1.5,
    l1: float = 0.05,
    sigma: float = 0.5,
) -> Learned:
    """Coefficients by search without gradients.

    At least one generation is made, whatever the budget.

    Args:
      loss: of (adapter, batch).
      adapters: a list, or a bank.
      batch: the labelled examples.
      key: of the search.
      budget: evaluations of the loss, at most; 40, as in the paper.
      space: "factors", as in the paper, or "deltas".
      bound: of the absolute value of coefficients; 1.5, as in the paper.
      l1: strength of the penalty on |coefficients|; 0.05, as in the paper.
      sigma: spread of the first samples; 0.5.

    Returns:
      The merged adapter, its coefficients, and the best loss of each generation.

    Raises:
      ValueError: another space, and as `gather` does.
    """
    fn, gathered = _space(space), gather(adapters)
    objective = penalised(loss, gathered, l1, fn)
    start = jnp.zeros(next(iter(gathered.bank.values()))[0].shape[0])
    rounds = max(1, budget // cma.population(start.shape[0]))
    result = cma.minimise(
        lambda c: objective(c, batch), start, key, generations=rounds, sigma=sigma, bound=bound
    )
    return Learned(mixed(gathered, result.best, fn), result.best, result.values)


def lorahub_gradient(
    loss: Loss,
    adapters: Sequence[Adapter] | Adapter,
    batches: Batch,
    *,
    space: str = "deltas",
    bound: float = 1.5,
    l1: float = 0.05,
    rate: float = 5e-2,
) -> Learned:
    """Coefficients by Adam from 1/N.

    Args:
      loss: of (adapter, batch).
      adapters: a list, or a bank.
      batches: labelled examples with a leading axis of steps, one Adam step each.
      space: "deltas", which can be descended on, or "factors", as in the paper.
      bound: of the absolute value of coefficients; 1.5, as in the paper.
      l1: strength of the penalty on |coefficients|; 0.05, as in the paper.
      rate: of Adam; 5e-2.

    Returns:
      The merged adapter, its coefficients, and the loss of each step.

    Raises:
      ValueError: another space, and as `gather` and `learn` do.
    """
    fn, gathered = _space(space), gather(adapters)
    return learn(loss, gathered, gathered.weights, batches, rate=rate, l1=l1, bound=bound, fn=fn)


def _space(space: str) -> Callable:
    if space not in ("factors", "deltas"):
        raise ValueError(f"space: got {space!r}, expected 'factors' or 'deltas'")
    return factor_mix if space == "factors" else concat


SYSTEMS = (
    Merging(
        name="factor_mix",
        paper="Huang 2023, 2307.13269",
        symbol="factor_mix",
        claim="lorahub",
        function=factor_mix,
        signed=False,
        breaks={
            "gauge": "factors are summed as they are written",
        },
        evidence="numpy value; law suite",
    ),
    System(
        name="LoraHub",
        paper="Huang 2023, 2307.13269",
        symbol="lorahub",
        claim="lorahub",
        evidence="objective by numpy; five examples beat every single adapter and the average",
    ),
    System(
        name="LoraHub by gradient",
        paper="Huang 2023, 2307.13269",
        symbol="lorahub_gradient",
        claim="lorahub_gradient",
        evidence="as LoraHub; the factor space is flat at its start",
        kind="composition",
    ),
)
