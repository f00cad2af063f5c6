r"""A discriminant of the examples on top of a shared adapter, both trained in episodes.

=============  ===================================================================================
f_i            what enters the adapted matrix under the shared adapter, its mean over the tokens
               of example i, [m]
y_i            one-hot class of example i less 1/C, [C]; the condition is [f_1, ..., f_n], by class
S, mu          covariance within the classes and mean of f, over texts of training tasks
h_c            class vector of the frozen head, [d_out]
theta          the shared adapter: factors of all sites, the same for every task
rho, lambda, s shrinkage, ridge and gain; their logarithms are trained with theta
Q              orthonormal columns [C, C - 1] that sum to zero
=============  ===================================================================================

With X the examples less the mean :math:`\bar x` of the class means, the scores of a text are the
ridge regression from features to classes in the metric P, solved among the n examples (Woodbury):

.. math:: P = \Big(S + \rho\, \tfrac{\mathrm{tr}\, S}{m} I\Big)^{-1}, \qquad
    W = P X^T \big(X P X^T + \lambda \tau I\big)^{-1} Y, \qquad
    \tau = \tfrac1n \mathrm{tr}(X P X^T), \qquad g(f) = W^T (f - \bar x) .

A large :math:`\lambda` gives Fisher's discriminant with the pooled covariance S, a small one
separates the examples. With :math:`\nu^2 = \mathrm{tr}(Q^T W^T S\, W Q) / (C - 1)` the generated
adapter is theta and, in the last matrix of the site, C more ranks that add
:math:`(s / \nu) \sum_c g_c(f)\, h_c`:

.. math:: a = \big[\, W Q,\; \mu / \|\mu\|^2 \big], \qquad
    b = \frac{s}{\nu} \begin{bmatrix} Q^T H \\ -(W^T \bar x)^T H \end{bmatrix},

where the last column of a stands for a constant. In an episode the loss is the cross-entropy of
other texts of the task under this adapter; its gradient reaches theta through the features of the
examples, the solution and the logits. Without examples only theta is left.

Reference: Bertinetto, Henriques, Torr and Vedaldi 2019 (arXiv:1805.08136): a closed-form ridge
regression of the support set inside the training of shared features; from its abstract.
Deviates: the features are trained as a low-rank adapter, the metric P is that of the training
tasks, and the solution becomes an adapter too, so that one ordinary LoRA is all that is kept.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora import numerics
from jlora.contracts.generator import Generator, checked
from jlora.core.adapter import Adapter
from jlora.generation.baselines import soup
from jlora.generation.generators.discriminant import contrasts, site_of
from jlora.types import Tree


@dataclasses.dataclass(frozen=True)
class EpisodicConfig:
    """Hyper-parameters; the last three are where training starts."""

    site: str = "layers/ffn/down/kernel"  # path of the adapted matrix; of a stack, its last one
    shrinkage: float = 1.0  # rho: how much of the mean variance is added to every variance
    ridge: float = 10.0  # lambda, over the mean squared length of an example
    gain: float = 3.0  # s: standard deviation of a score, in units of a class vector


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Learned:
    """What episodes train."""

    shared: Tree  # trainable part of theta
    log_shrinkage: Float[Array, ""]
    log_ridge: Float[Array, ""]
    log_gain: Float[Array, ""]


class Statistics(NamedTuple):
    """Of the features of training texts: S = U diag(e) U^T."""

    basis: Float[Array, "m m"]  # U
    variances: Float[Array, "m"]  # e
    mean: Float[Array, "m"]  # mu


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Episodic:
    """The state of the generator."""

    learned: Learned
    statistics: Statistics
    heads: Float[Array, "C d_out"]  # h
    template: Adapter  # sites, shapes and what theta does not train
    config: EpisodicConfig = dataclasses.field(metadata={"static": True})
    width: int = dataclasses.field(metadata={"static": True})  # E = n m of a condition


class Episode(NamedTuple):
    """A task for one step: examples and other texts of it; a tree of them has a leading axis."""

    examples: Tree  # inputs of the model, leading axis n
    labels: Int[Array, "n"]  # class of each example
    used: Float[Array, "n"]  # 1, or 0 for a row that is not among the examples
    queries: Tree  # inputs of the model, leading axis q
    answers: Int[Array, "q"]  # class of each query
    heads: Float[Array, "C d_out"]  # class vectors of the task


ROUNDING = 1e-5  # a sum that is smaller, relative to its terms, is zero in float32
Model = Callable[..., Array]  # (trainable part of an adapter, inputs, [heads]) -> rows


def statistics(features: Float[np.ndarray, "N m"], classes: Int[np.ndarray, "N"]) -> Statistics:
    """Covariance within classes and mean of the features of training texts.

    Args:
      features: f of each text under the shared adapter.
      classes: which class of which task a text is of; equal numbers are one class.

    Returns:
      The statistics, from sums in float64.

    Raises:
      ValueError: features that are not a finite matrix with a class per row.
    """
    x, groups = np.asarray(features, np.float64), np.asarray(classes)
    if x.ndim != 2 or groups.shape != x.shape[:1] or not np.isfinite(x).all():
        raise ValueError(
            f"features: got shapes {x.shape} and {groups.shape}, expected finite [N, m] and [N]"
        )
    _, place = np.unique(groups, return_inverse=True)
    count = np.bincount(place)
    centre = np.zeros((len(count), x.shape[1]))
    np.add.at(centre, place, x)
    rest = x - (centre / count[:, None])[place]
    variances, basis = np.linalg.eigh(rest.T @ rest / len(x))
    arrays = basis, np.maximum(variances, 0.0), x.mean(0)
    return Statistics(*(jnp.asarray(t, features.dtype) for t in arrays))


def fit(
    key: PRNGKeyArray,
    conditions: Float[Array, "n E"],
    tasks: Int[Array, "n"],
    bank: Adapter,
    heads: Float[Array, "C d_out"],
    config: EpisodicConfig | None = None,
    shared: Adapter | None = None,
    texts: Statistics | None = None,
) -> Episodic:
    """The state before any episode: closed form alone where theta is zero.

    Args:
      key: not used.
      conditions: features of the examples of each adapter's task, class by class, E = C K m.
      tasks: of each adapter.
      bank: n adapters of LoRA, of which sites, rank and scale are used.
      heads: class vectors of the frozen head, in the order of the classes.
      config: hyper-parameters; None: those of `EpisodicConfig`.
      shared: theta, an adapter like those of the bank; None: zero.
      texts: statistics of training texts; None: the conditions' own rows stand for them.

    Returns:
      The state; `loss` is what trains its `learned`.

    Raises:
      ValueError: a site that the bank has not or that has no low-rank factors, a rank below C,
        or heads or conditions of another width.
    """
    del key
    config = config or EpisodicConfig()
    soup.examples(conditions, tasks, bank)
    one = bank[0] if shared is None else shared
    if shared is None:
        one = one.replace(trainable=jax.tree.map(jnp.zeros_like, one.trainable))
    site = site_of(one, config.site)
    leaves, _ = one.arrays(site)
    if not {"a", "b", "scale"} <= set(leaves):
        raise ValueError(f"{site.path}: got leaves {sorted(leaves)}, expected a, b and scale")
    (m, rank), classes = leaves["a"].shape[-2:], len(heads)
    if heads.shape != (classes, site.d_out) or classes < 2 or rank < classes:
        raise ValueError(
            f"heads: got shape {heads.shape}, expected (C, {site.d_out}) with 2 <= C <= rank {rank}"
        )
    width = conditions.shape[1]
    if width == 0 or width % (classes * m):
        raise ValueError(f"conditions: got width {width}, expected C K m = {classes} K {m}")
    if texts is None:
        per_class = width // m // classes
        own = np.repeat(np.asarray(tasks) * classes, width // m)
        side = np.tile(np.repeat(np.arange(classes), per_class), len(conditions))
        texts = statistics(np.asarray(conditions).reshape(-1, m), own + side)
    numbers = (config.shrinkage, config.ridge, config.gain)
    learned = Learned(one.trainable, *(jnp.log(jnp.float32(x)) for x in numbers))
    return Episodic(learned, texts, jnp.asarray(heads), one, config, width)


def solution(
    learned: Learned,
    texts: Statistics,
    examples: Float[Array, "n m"],
    labels: Int[Array, "n"],
    used: Float[Array, "n"],
    heads: Float[Array, "C d_out"],
) -> tuple[Float[Array, "m C"], Float[Array, "C d_out"]]:
    """The factors of one task, scale not included.

    Args:
      learned: its three numbers are used.
      texts: statistics of training texts.
      examples: f of each.
      labels: class of each, 0 to C - 1; a class without an example has no score.
      used: 1 for an example, 0 for a row that must not count.
      heads: class vectors.

    Returns:
      (a, b); b is zero where no example is used, or where all classes are equal.
    """
    classes = len(heads)
    member = jax.nn.one_hot(labels, classes, dtype=examples.dtype) * used[:, None]  # [n, C]
    counts = jnp.sum(member, axis=0)
    there = (counts > 0).astype(examples.dtype)  # classes with an example
    number = jnp.maximum(jnp.sum(there), 2.0)
    means = numerics.matmul((member / jnp.maximum(counts, 1.0)[None]).T, examples)
    centre = jnp.sum(means, axis=0) / number
    x = (examples - centre[None]) * used[:, None]
    targets = member - used[:, None] * there[None] / number  # Y
    z = numerics.matmul(x, texts.basis)  # features along the axes of S
    metric = 1 / (texts.variances + jnp.exp(learned.log_shrinkage) * jnp.mean(texts.variances))
    gram = numerics.matmul(z * metric[None], z.T)  # X P X^T
    size = jnp.trace(gram) / jnp.maximum(jnp.sum(used), 1.0)
    ridge = jnp.exp(learned.log_ridge) * jnp.where(size > 0, size, jnp.ones_like(size))
    dual = jnp.linalg.solve(gram + ridge * jnp.eye(len(x), dtype=x.dtype), targets)
    q = jnp.asarray(contrasts(classes), x.dtype)
    weights = numerics.matmul(dual, q)
    along = metric[:, None] * numerics.matmul(z.T, weights)  # U^T W Q
    spread = jnp.sum(texts.variances[:, None] * along**2) / (number - 1)
    terms = metric[:, None] * numerics.matmul(jnp.abs(z).T, jnp.abs(weights))
    # Classes with equal examples: what is left of the sum is rounding, and not a direction.
    apart = spread > ROUNDING**2 * jnp.sum(texts.variances[:, None] * terms**2)
    along = jnp.where(apart, along, jnp.zeros_like(along))
    unit = jnp.sqrt(jnp.where(apart, spread, jnp.ones_like(spread)))
    directions = numerics.matmul(texts.basis, along)  # W Q
    offsets = -numerics.matmul(q, numerics.matmul(directions.T, centre[:, None]))  # -W^T x-bar
    constant = texts.mean / jnp.sum(texts.mean**2)
    a = jnp.concatenate([directions, constant[:, None]], axis=1)
    rows = jnp.concatenate([q.T, offsets.T])
    return a, jnp.exp(learned.log_gain) / unit * numerics.matmul(rows, heads)


def appended(
    template: Adapter,
    shared: Tree,
    path: str,
    a: Float[Array, "m C"],
    b: Float[Array, "C d_out"],
) -> Adapter:
    """Theta with the factors as the last ranks of the last matrix of a site.

    Args:
      template: sites, and what theta does not train.
      shared: trainable part of theta.
      path: of the site.
      a: takes the place of theta's last C columns there.
      b: scale not included.

    Returns:
      An adapter like the template.
    """
    leaves, _ = template.arrays(site_of(template, path))
    last = tuple(n - 1 for n in leaves["scale"].shape)
    ranks, rank = a.shape[1], leaves["a"].shape[-1]
    factors = {"a": a, "b": b / leaves["scale"][last].astype(b.dtype)}
    own = slice(rank - ranks, rank)
    where = {"a": (*last, slice(None), own), "b": (*last, own)}

    def put(part: dict[str, dict[str, Array]]) -> dict[str, dict[str, Array]]:
        new = {
            name: t.at[where[name]].set(factors[name].astype(t.dtype)) if name in factors else t
            for name, t in part.get(path, {}).items()
        }
        return {**part, path: new} if new else part

    return template.replace(trainable=put(shared), frozen=put(template.frozen))


def loss(
    learned: Learned, state: Episodic, episode: Episode, features: Model, logits: Model
) -> Float[Array, ""]:
    """Cross-entropy of an episode's queries under the adapter of its examples.

    Args:
      learned: what is differentiated; the state's own is not read.
      state: statistics, template and site.
      episode: one task.
      features: (adapter, inputs) -> f [n, m]; the adapter is theta alone.
      logits: (adapter, inputs, heads) -> [q, C].

    Returns:
      Mean over the queries.
    """
    theta = state.template.replace(trainable=learned.shared)
    states = features(theta, episode.examples)
    given = states, episode.labels, episode.used, episode.heads
    a, b = solution(learned, state.statistics, *given)
    adapter = appended(state.template, learned.shared, state.config.site, a, b)
    rows = logits(adapter, episode.queries, episode.heads)
    return optax.softmax_cross_entropy_with_integer_labels(rows, episode.answers).mean()


def generate(key: PRNGKeyArray, state: Episodic, condition: Float[Array, "E"]) -> Adapter:
    """The adapter of one task.

    Args:
      key: not used: one condition has one solution.
      state: of `fit`, trained or not.
      condition: features of the examples under the shared adapter, class by class, K of each.

    Returns:
      An adapter like those of the bank: theta, and the task's ranks in the last matrix of the site.

    Raises:
      ValueError: a condition of another width, or one that is not finite.
    """
    del key
    classes, m = len(state.heads), len(state.statistics.mean)
    examples = checked(condition, state.width).reshape(-1, m)
    labels = jnp.repeat(jnp.arange(classes), len(examples) // classes)
    used = jnp.ones(len(examples), examples.dtype)
    a, b = solution(state.learned, state.statistics, examples, labels, used, state.heads)
    return appended(state.template, state.learned.shared, state.config.site, a, b)


SYSTEM = Generator(
    name="Episodic discriminant over a shared adapter",
    paper="Bertinetto et al. 2019, arXiv:1805.08136",
    symbol="Episodic",
    evidence="factors by float64 numpy; Fisher's limit; exchangeable classes; gradient to theta",
    kind="component",
    fit=fit,
    generate=generate,
    orderless=True,
    width=24,
    small={
        "heads": np.eye(2, 5, dtype=np.float32),
        "config": EpisodicConfig(site="last", shrinkage=0.5, ridge=1.0),
    },
)
