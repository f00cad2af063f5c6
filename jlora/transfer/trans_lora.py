r"""Trans-LoRA: an adapter moves to another base model, without the data it was trained on.

===========  ==================================================================================
M_s, A_s     source base and its adapter
M_t, A_t     target base and its adapter, of any method
D_seed       a few texts of the task, five in the paper
D_w          texts that a language model wrote, prompted with D_seed; N of them
phi          discriminator, trained together with A_s (`jlora.transfer.discriminator`)
K            texts that are kept
===========  ==================================================================================

.. math::
    D_K = \text{the } K \text{ texts of } D_w \text{ with the largest } \ell_\phi, \qquad
    A_t = \arg\min_A \sum_{x \in D_K}
    \mathrm{CE}\bigl(M_t(x; A),\; \mathrm{softmax}(M_s(x; A_s) / \tau)\bigr)

Written (`jlora.transfer.written`), filtered, labelled by the source, distilled. Source and target
share the names of the classes and nothing else: each has its own tokens of the same texts.

Reference: Wang et al. 2024, arXiv:2405.17258.
Deviates: the paper generates answers as text and trains the target on them; a classifier's answer
is a distribution over classes, and the whole of it is learned (``temperature=0`` learns the most
likely class alone, which is the paper's). The paper's target writes the text itself; here any
decoder does, because an encoder cannot write. The filter is that of `discriminator`.
"""

from typing import NamedTuple

import jax
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.core.adapter import Adapter
from jlora.core.lift import lift
from jlora.system import System
from jlora.transfer.discriminator import Discriminator, accept, log_odds
from jlora.transfer.distill import Apply, distill, soft_labels
from jlora.types import Dynamic, Tree

RATE = 2e-4  # the paper's peak rate of Adam where the task is hard


class Model(NamedTuple):
    """A base with an adapter."""

    apply: Apply  # (params, *inputs) -> logits [N, C]
    params: Tree  # of the base
    adapter: Adapter  # trained (source), or at its start (target)


class Texts(NamedTuple):
    """Texts that were written, as the models read them."""

    embedding: Float[Array, "N d"]  # of the source base, for the discriminator
    source: tuple[Dynamic, ...]  # inputs of the source's model, N rows each
    target: tuple[Dynamic, ...]  # inputs of the target's model, N rows each


class Transferred(NamedTuple):
    """What `trans_lora` returns."""

    adapter: Adapter  # A_t
    kept: Int[Array, "K"]  # numbers of the texts that it learned from
    odds: Float[Array, "N"]  # log-odds of all texts; above 0: taken for real
    labels: Float[Array, "K C"]  # what the source said of the kept ones
    losses: Float[Array, "steps"]  # of each batch


def trans_lora(
    key: PRNGKeyArray,
    source: Model,
    target: Model,
    discriminator: Discriminator,
    texts: Texts,
    *,
    keep: int,
    temperature: float = 1.0,
    steps: int = 200,
    batch: int = 8,
    solver: optax.GradientTransformation | None = None,
) -> Transferred:
    """An adapter of the target that does what the source's does. Meant to be jitted as a whole.

    Args:
      key: of the batches.
      source: the adapter that is moved, with its base.
      target: the base it moves to, with a fresh adapter of any method: LoRA, DoRA, ...
      discriminator: that came with the source adapter.
      texts: written ones.
      keep: K, how many of them are learned from; static.
      temperature: tau of the source's answers; 1 hands on its own probabilities.
      steps: of training; the paper's 20 epochs of 80 texts, at the batch below.
      batch: texts per step, the paper's.
      solver: None: Adam whose rate falls linearly from 2e-4 to 0, the paper's.

    Returns:
      The adapter, and what it was made from.

    Raises:
      ValueError: `keep` above the number of texts, inputs with another number of rows, classes of
        source and target that differ in number, or what `distill` refuses.
    """
    if solver is None:
        solver = optax.adam(optax.linear_schedule(RATE, 0.0, steps))
    odds = log_odds(discriminator, texts.embedding)
    for leaf in jax.tree.leaves((texts.source, texts.target)):
        if leaf.shape[:1] != odds.shape:
            raise ValueError(f"texts: got shape {leaf.shape}, expected {odds.shape[0]} rows")
    kept = accept(odds, keep)
    read, inputs = jax.tree.map(lambda x: x[kept], (texts.source, texts.target))
    answers = lift(source.apply)(source.params, source.adapter, *read)
    learned = jax.eval_shape(lift(target.apply), target.params, target.adapter, *inputs)
    if learned.shape != answers.shape:
        raise ValueError(f"target: got logits {learned.shape}, expected the source's "
                         f"{answers.shape}")  # fmt: skip
    labels = soft_labels(answers, temperature)
    student = distill(
        key, target.apply, target.params, target.adapter, inputs, labels,
        solver=solver, steps=steps, batch=batch,
    )  # fmt: skip
    return Transferred(student.adapter, kept, odds, labels, student.losses)


SYSTEM = System(
    name="Trans-LoRA",
    paper="Wang 2024, 2405.17258",
    symbol="trans_lora",
    evidence="loss and filter by numpy; onto its own base it becomes the source; LoRA to LoRA and "
    "to DoRA; mutation check",
    kind="mechanism",
    rows=(66,),
    tests=tuple(f"tests/transfer/{t}_test.py" for t in ("discriminator", "distill", "written")),
    claim="trans_lora",
    more_claims=("trans_lora_filter", "trans_lora_larger"),
)
