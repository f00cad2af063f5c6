"""AdaMerging: coefficients that make the merged model certain of unlabelled examples.

=========  ====================================================================
Delta_n    delta of adapter n, one a task
c          coefficients: one a task, or one a task, site and slice; 0.3 at first
f_k        the model with the head of task k; p = softmax(f_k(x))
=========  ====================================================================

.. math:: \\min_c \\sum_k E_{x \\sim k} \\, H\\Bigl(\\mathrm{softmax} f_k\\bigl(x;
          \\textstyle\\sum_n c_n \\Delta_n\\bigr)\\Bigr), \\qquad H(p) = -\\sum_y p_y \\log p_y

Entropy stands for the loss that needs labels. Only the coefficients are learned, by gradient
through the lifted model, on the inputs of the tasks to be solved. Certain is not right: where
adapters clash much at the start, entropy may fall and accuracy with it (seen on toy tasks).

Shapes: logits [..., classes]; batches[k] has a leading axis of steps.

Paper: Yang et al. 2023, arXiv:2310.02575.
Source: documentation of fusion_bench; start 0.3 as in scripts built on the official code; the rate
from memory, unverified.
Deviates: on adapters instead of full weights; the ++ variant is this one on adapters that TIES has
trimmed.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jlora.core.adapter import Adapter
from jlora.merging.engine.inputs import gather
from jlora.merging.learned.coefficients import Learned, everywhere, learn
from jlora.system import System
from jlora.types import Batch


def entropy(logits: Float[Array, "... classes"]) -> Array:
    """The mean entropy of predictions.

    Args:
      logits: before softmax.

    Returns:
      [], in nats.
    """
    logp = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.mean(jnp.sum(jnp.exp(logp) * logp, axis=-1))


def adamerging(
    tasks: Sequence[Callable[[Adapter, Batch], Float[Array, "... classes"]]],
    adapters: Sequence[Adapter] | Adapter,
    batches: Sequence[Batch],
    *,
    layerwise: bool = True,
    start: float = 0.3,
    rate: float = 1e-3,
) -> Learned:
    """Coefficients for which every task's predictions are certain.

    Args:
      tasks: tasks[k](adapter, batch) are the logits of task k.
      adapters: a list, or a bank.
      batches: for each task its unlabelled inputs, with a leading axis of steps, one Adam step
        each.
      layerwise: a coefficient for every site and slice; True, as in the paper's better variant.
      start: the first value of all coefficients; 0.3, as in the paper.
      rate: of Adam; 1e-3, as in the paper.

    Returns:
      The merged adapter, its coefficients, and the loss of each step.

    Raises:
      ValueError: other numbers of tasks and batches, and as `gather` and `learn` do.
    """
    if len(tasks) != len(batches) or not tasks:
        raise ValueError(
            f"batches: got {len(batches)}, expected one for each of {len(tasks)} tasks"
        )
    gathered = gather(adapters)
    first = everywhere(gathered, start) if layerwise else jnp.full_like(gathered.weights, start)

    def loss(adapter: Adapter, batch: Sequence[Batch]) -> Array:
        parts = [entropy(f(adapter, x)) for f, x in zip(tasks, batch, strict=True)]
        return sum(parts[1:], parts[0])

    return learn(loss, gathered, first, tuple(batches), rate=rate)


SYSTEM = System(
    name="AdaMerging",
    paper="Yang 2023, 2310.02575",
    symbol="adamerging",
    claim="adamerging",
    evidence="entropy by numpy; accuracy of three toy tasks without labels; mutation check",
)
