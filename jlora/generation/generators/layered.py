r"""A discriminant of the examples that reads several layers and remembers classes, as one adapter.

==========  ======================================================================================
f_k         what enters the adapted matrix of layer k, its mean over the tokens of a text, [m];
            the condition is the f_1, ..., f_L of the examples, by class
x           the text as `layer_reading` sees it: its embedding and the features of all layers, [D]
h_c         class vector of the frozen head, [d]
Q           orthonormal columns [C, C - 1] that sum to zero
==========  ======================================================================================

The examples have weight 1. A class that the memory recognises (`class_memory`) has one row more:
the mean of all training texts of that class, with the weight :math:`r_c \eta` of the trust eta.
Then weights are lowered until all classes weigh the same. With the rows X less the mean
:math:`\bar x` of the class means, weights D, targets Y (one-hot less 1/C) and
:math:`\tau = \mathrm{tr}(D X X^T) / \mathrm{tr} D`, the scores are the ridge regression

.. math:: W = X^T D^{1/2} \big(D^{1/2} X X^T D^{1/2} + \lambda \tau I\big)^{-1} D^{1/2} Y,
    \qquad g(x) = W^T (x - \bar x) .

Each layer adds its part of :math:`\frac{s}{\nu} g` to its output (`layer_reading.factors`), where
nu is the standard deviation of the examples' scores: an ordinary LoRA of rank C in every layer.

Reference: original to jlora. Ridge regression on a support set inside of a meta-learner: Bertinetto
et al. 2019 (arXiv:1805.08136), from its abstract.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora import numerics
from jlora.contracts.generator import Generator, checked
from jlora.core.adapter import Adapter
from jlora.generation.baselines import soup
from jlora.generation.generators.class_memory import Memory, recognised
from jlora.generation.generators.discriminant import contrasts, site_of
from jlora.generation.generators.layer_reading import Reading, factors, reading, seen

ROUNDING = 1e-5  # rows that differ by less, relative to their length, are the same in float32


@dataclasses.dataclass(frozen=True)
class LayeredConfig:
    """Hyper-parameters."""

    site: str = "layers/ffn/down/kernel"  # path of the adapted matrices, a stack of L
    ridge: float = 2.0  # lambda, over the mean squared length of a row
    share: float = 0.5  # omega: length of a layer's part of x, that of the embedding's is 1
    trust: float = 30.0  # eta: weight of a class of the memory, in examples
    caution: float = 1.0  # kappa of `class_memory`
    gain: float = 0.5  # s: standard deviation of a score, in lengths of a class vector


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layered:
    """The state of the generator."""

    reading: Reading
    known: Memory | None  # None: it remembers nothing
    heads: Float[Array, "C d"]  # h
    template: Adapter  # sites and shapes; changes nothing
    config: LayeredConfig = dataclasses.field(metadata={"static": True})
    width: int = dataclasses.field(metadata={"static": True})  # E = C K L m of a condition


def fit(
    key: PRNGKeyArray,
    conditions: Float[Array, "n E"],
    tasks: Int[Array, "n"],
    bank: Adapter,
    heads: Float[Array, "C d"],
    config: LayeredConfig | None = None,
    read: Reading | None = None,
    known: Memory | None = None,
) -> Layered:
    """The state: nothing is trained.

    Args:
      key: not used.
      conditions: features of the examples of each adapter's task, class by class, E = C K L m.
      tasks: of each adapter.
      bank: n adapters of LoRA, of which sites, rank and scale are used.
      heads: class vectors of the frozen head, in the order of the classes.
      config: hyper-parameters; None: those of `LayeredConfig`.
      read: of the base, by `reading`; None: the conditions' own rows stand for texts, the last
        layer's first features for the embedding, and layers above a layer change nothing.
      known: classes of the training tasks; None: none is remembered.

    Returns:
      The state.

    Raises:
      ValueError: a site that the bank has not or that is no stack of low-rank factors, a rank below
        C, or heads or conditions of another width.
    """
    del key
    config = config or LayeredConfig()
    soup.examples(conditions, tasks, bank)
    template = bank[0].replace(trainable=jax.tree.map(jnp.zeros_like, bank[0].trainable))
    site = site_of(template, config.site)
    leaves, _ = template.arrays(site)
    if not {"a", "b", "scale"} <= set(leaves) or leaves["a"].ndim != 3:
        raise ValueError(
            f"{site.path}: got leaves {sorted(leaves)}, expected stacks a, b and scale"
        )
    (layers, m, rank), classes = leaves["a"].shape, len(heads)
    if heads.shape != (classes, site.d_out) or classes < 2 or rank < classes:
        raise ValueError(
            f"heads: got shape {heads.shape}, expected (C, {site.d_out}) with 2 <= C <= rank {rank}"
        )
    width = conditions.shape[1]
    if width == 0 or width % (classes * layers * m):
        raise ValueError(
            f"conditions: got width {width}, expected C K L m = {classes} K {layers} {m}"
        )
    if read is None:
        rows = np.asarray(conditions).reshape(-1, layers, m)
        d = site.d_out
        read = reading(rows, rows[:, -1, :d], np.broadcast_to(np.eye(d), (layers, d, d)))
    return Layered(read, known, jnp.asarray(heads), template, config, width)


def solution(
    state: Layered,
    examples: Float[Array, "n L m"],
    labels: Int[Array, "n"],
    used: Float[Array, "n"],
    heads: Float[Array, "C d"],
) -> tuple[Float[Array, "L m C"], Float[Array, "L C d"]]:
    """The factors of one task, scale not included.

    Args:
      state: its own heads are not read.
      examples: f of each.
      labels: class of each, 0 to C - 1; a class without an example has no score.
      used: 1 for an example, 0 for a row that must not count.
      heads: class vectors.

    Returns:
      (a, b); b is zero where no example is used, or where all are equal.
    """
    read, config, classes = state.reading, state.config, len(heads)
    embedding, x = seen(read, examples, config.share)
    member = jax.nn.one_hot(labels, classes, dtype=x.dtype) * used[:, None]  # [n, C]
    counts = jnp.sum(member, axis=0)
    there = (counts > 0).astype(x.dtype)
    number = jnp.maximum(jnp.sum(there), 2.0)
    weight = used
    if state.known is not None:
        means = numerics.matmul((member / jnp.maximum(counts, 1.0)[None]).T, embedding)
        sure, rows = recognised(state.known, means, counts, config.caution)
        x, member = jnp.concatenate([x, rows]), jnp.concatenate([member, jnp.eye(classes)])
        weight = jnp.concatenate([weight, config.trust * sure])
    total = numerics.matmul(weight[None], member)[0]  # of each class
    least = jnp.min(jnp.where(there > 0, total, jnp.full_like(total, jnp.inf)))
    even = jnp.where(there > 0, least / jnp.maximum(total, 1e-9), jnp.zeros_like(total))
    weight = weight * numerics.matmul(member, even[:, None])[:, 0]
    weight = jnp.where(weight > 0, weight, jnp.zeros_like(weight))
    shared = jnp.maximum(jnp.sum(weight), 1e-9)
    centre = numerics.matmul((weight / shared)[None], x)[0]  # all classes weigh the same
    root = jnp.sqrt(weight)[:, None]
    rows = (x - centre[None]) * root
    gram = numerics.matmul(rows, rows.T)
    size = jnp.trace(gram) / shared
    length = jnp.sum(weight[:, None] * x**2) / shared
    apart = size > ROUNDING**2 * length
    size = jnp.where(apart, size, jnp.ones_like(size))
    targets = (member - there[None] / number) * root
    dual = numerics.solve(gram + config.ridge * size * jnp.eye(len(x), dtype=x.dtype), targets)
    w = numerics.matmul(rows.T, dual)  # [D, C]
    q = jnp.asarray(contrasts(classes), x.dtype)
    scores = numerics.matmul(numerics.matmul(x - centre[None], w), q)[: len(used)]
    spread = jnp.sum(used[:, None] * scores**2) / (jnp.maximum(jnp.sum(used), 1.0) * (number - 1))
    gain = config.gain / jnp.sqrt(jnp.where(spread > 0, spread, jnp.ones_like(spread)))
    gain = jnp.where(apart & (spread > 0), gain, jnp.zeros_like(gain))
    a, b = factors(read, config.share, gain * w, centre, heads)
    return a, jnp.where(gain > 0, b, jnp.zeros_like(b))


def written(
    template: Adapter, path: str, a: Float[Array, "L m C"], b: Float[Array, "L C d"]
) -> Adapter:
    """An adapter of these factors: as the first ranks of a stack of matrices, all else zero.

    Args:
      template: sites, shapes and scale.
      path: of the site.
      a: of all layers.
      b: of all layers, scale not included.

    Returns:
      An adapter like the template.
    """
    leaves, _ = template.arrays(site_of(template, path))
    scaled = b / leaves["scale"].astype(b.dtype)[:, None, None]
    new = {"a": (a, np.s_[:, :, : a.shape[2]]), "b": (scaled, np.s_[:, : b.shape[1]])}

    def put(part: dict[str, dict[str, Array]]) -> dict[str, dict[str, Array]]:
        own = {
            name: jnp.zeros_like(t).at[new[name][1]].set(new[name][0].astype(t.dtype))
            if name in new else t
            for name, t in part.get(path, {}).items()
        }  # fmt: skip
        return {**part, path: own} if own else part

    return template.replace(trainable=put(template.trainable), frozen=put(template.frozen))


def generate(key: PRNGKeyArray, state: Layered, condition: Float[Array, "E"]) -> Adapter:
    """The adapter of one task.

    Args:
      key: not used: one condition has one solution.
      state: of `fit`.
      condition: features of the examples, class by class, K of each.

    Returns:
      An adapter like those of the bank: zero but in the ranks of the task.

    Raises:
      ValueError: a condition of another width, or one that is not finite.
    """
    del key
    classes, (layers, m) = len(state.heads), state.reading.mean.shape
    examples = checked(condition, state.width).reshape(-1, layers, m)
    labels = jnp.repeat(jnp.arange(classes), len(examples) // classes)
    a, b = solution(state, examples, labels, jnp.ones(len(examples), examples.dtype), state.heads)
    return written(state.template, state.config.site, a, b)


SYSTEM = Generator(
    name="Layered discriminant with a memory of classes",
    paper="none (jlora)",
    symbol="Layered",
    evidence="scores and factors by float64 numpy; a recognised class; exchangeable classes",
    kind="component",
    fit=fit,
    generate=generate,
    orderless=True,
    width=48,
    small={"heads": np.eye(2, 6, dtype=np.float32), "config": LayeredConfig(site="layers")},
)
