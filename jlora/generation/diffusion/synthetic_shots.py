r"""DataDream: a generator that a few pictures have adapted draws the training set of a classifier.

=====================  ===================================================================
(x, y)                 the few real pictures with their classes, k "shots" of each
:math:`\phi`           LoRA on the generator G, trained on the real pictures
(s, y')                synthetic pictures: G with :math:`\phi`, asked for the class y'
:math:`\psi`           LoRA on the classifier C
:math:`\lambda`        share of the real pictures in the loss
=====================  ===================================================================

.. math::
    \phi &= \arg\min_\phi L_G(\phi; x, y), \qquad s \sim G_\phi(y') \\
    \psi &= \arg\min_\psi\; \lambda\, \overline{CE}(C_\psi(x), y)
            + (1 - \lambda)\, \overline{CE}(C_\psi(s), y')

Both stages are LoRA as ever; what the recipe adds is here: what the generator is asked for
(`balanced`) and the loss of the second stage (`mixture`). One adapter may serve all classes of a
set, or each class has its own: the paper has both.

Kim et al., `DataDream: Few-shot Guided Dataset Generation <https://arxiv.org/abs/2407.10910>`_,
2024.

Paper: Kim et al. 2024, arXiv:2407.10910.
Source: official code (ExplainableML/DataDream), for the loss.
Deviates: CutMix and MixUp, which the code offers, are the caller's.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.system import System


def balanced(
    key: PRNGKeyArray, labels: Int[np.ndarray, "p"], classes: int, each: int
) -> Int[np.ndarray, "n"]:
    """Prompts of a synthetic set with equally many pictures of each class.

    Args:
      key: of the choice.
      labels: the class of each prompt that the generator can be asked with, 0 to classes - 1.
      classes: how many there are.
      each: pictures per class; a class with fewer prompts is asked for some of them again.

    Returns:
      [classes * each], numbers of prompts, class by class.

    Raises:
      ValueError: a class without a prompt, a label that is no class, or `each` below 1.
    """
    if each < 1:
        raise ValueError(f"each: got {each}, expected at least 1")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels: got {labels.min()} to {labels.max()}, expected 0 to "
                         f"{classes - 1}")  # fmt: skip
    chosen = []
    for number in range(classes):
        own = np.flatnonzero(labels == number)
        if not len(own):
            raise ValueError(f"labels: got no prompt of class {number}, expected at least one")
        one = jax.random.fold_in(key, number)
        rounds = [jax.random.permutation(jax.random.fold_in(one, k), len(own))
                  for k in range(-(-each // len(own)))]  # fmt: skip
        chosen.append(own[np.concatenate([np.asarray(r) for r in rounds])[:each]])
    return np.concatenate(chosen)


def mixture(
    real: Float[Array, "b"], synthetic: Float[Array, "s"], share: float
) -> Float[Array, ""]:
    """The loss of the second stage.

    Args:
      real: cross entropies of real pictures.
      synthetic: those of synthetic ones; the numbers of both may differ.
      share: lambda, of the real ones; 1 leaves the synthetic ones out.

    Returns:
      lambda mean(real) + (1 - lambda) mean(synthetic).

    Raises:
      ValueError: a share outside 0 .. 1.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share: got {share}, expected 0 to 1")
    return share * jnp.mean(real) + (1.0 - share) * jnp.mean(synthetic)


SYSTEM = System(
    name="DataDream",
    paper="Kim 2024, 2407.10910",
    symbol="mixture",
    evidence="loss and its gradient by numpy; a loss of both halves weighs sets, not pictures; "
    "prompts are balanced and each is used before any is used again",
    kind="recipe",
    rows=(90,),
    claim="datadream",
)
