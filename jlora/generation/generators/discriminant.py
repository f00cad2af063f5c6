r"""A linear discriminant written as an adapter of rank C: from K examples per class, no training.

=============  ===================================================================================
f              what enters the adapted matrix, its mean over the tokens of a text, [m]
m_c            mean of f over the examples of class c; the condition is [m_1, ..., m_C], [C m]
S, mu          covariance and mean of f over the texts of the training tasks, [m, m], [m]
h_c            class vector of the frozen head, [d_out]
rho, s         `shrinkage` and `gain`, chosen on the training tasks
Q              orthonormal columns [C, C - 1] that sum to zero
=============  ===================================================================================

The discriminant of class c, less the mean over classes, is :math:`g_c(f) = w_c^T f + k_c` with

.. math:: P = \Big(S + \rho\, \tfrac{\mathrm{tr}\, S}{m} I\Big)^{-1}, \qquad
    w_c = P\,(m_c - \bar m), \qquad
    k_c = -\tfrac12 m_c^T P m_c + \tfrac{1}{2C} \sum_{c'} m_{c'}^T P m_{c'}

and :math:`\nu^2 = \mathrm{tr}(Q^T W^T S\, W Q) / (C - 1)` is the variance of a score over texts.
The matrix of a layer that writes to the residual stream then adds
:math:`(s / \nu) \sum_c g_c(f)\, h_c`, by

.. math:: a = \big[\, W Q,\; \mu / \|\mu\|^2 \big], \qquad
    b = \frac{s}{\nu} \begin{bmatrix} Q^T H \\ k^T H \end{bmatrix} .

The last column of a stands for a constant, because :math:`\mu^T f / \|\mu\|^2 \approx 1`. For two
classes this is rank 2: the direction :math:`P (m_2 - m_1)`, its threshold halfway between the
classes, written along :math:`h_2 - h_1`.

Reference: Fisher 1936; Friedman 1989 (the regularised covariance). As an adapter original to jlora:
the structural prior of a generator, which a trained one has to beat.
Deviates: S is taken over all texts of the training tasks and not within the classes of a task, of
which K examples say little.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora import numerics
from jlora.contracts.generator import Generator, checked
from jlora.core.adapter import Adapter
from jlora.core.site import Site
from jlora.generation.baselines import soup


@dataclasses.dataclass(frozen=True)
class DiscriminantConfig:
    """Hyper-parameters."""

    site: str = "layers/ffn/down/kernel"  # path of the adapted matrix; of a stack, its last one
    shrinkage: float = 30.0  # rho: how much of the mean variance is added to every variance
    gain: float = 3.0  # s: standard deviation of what is added along a class vector


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Discriminant:
    """The state of the generator."""

    covariance: Float[Array, "m m"]  # S
    precision: Float[Array, "m m"]  # P
    mean: Float[Array, "m"]  # mu
    heads: Float[Array, "C d_out"]  # h
    template: Adapter  # sites and shapes; changes nothing
    config: DiscriminantConfig = dataclasses.field(metadata={"static": True})


def contrasts(classes: int) -> Float[np.ndarray, "C C-1"]:
    """Orthonormal columns that are orthogonal to a constant (Helmert's).

    Args:
      classes: C, at least 2.

    Returns:
      Q, float32.
    """
    rows = np.arange(classes)[:, None]
    k = np.arange(1, classes)[None]
    q = np.where(rows < k, -1.0, np.where(rows == k, k, 0.0)) / np.sqrt(k * (k + 1))
    return q.astype(np.float32)


def site_of(adapter: Adapter, path: str) -> Site:
    """The adapted site of a path.

    Args:
      adapter: any.
      path: of the site.

    Returns:
      The site.

    Raises:
      ValueError: there is none of that path.
    """
    for site, _ in adapter.sites:
        if site.path == path:
            return site
    have = [site.path for site, _ in adapter.sites]
    raise ValueError(f"site: got {path!r}, expected one of {have}")


def fit(
    key: PRNGKeyArray,
    conditions: Float[Array, "n E"],
    tasks: Int[Array, "n"],
    bank: Adapter,
    heads: Float[Array, "C d_out"],
    config: DiscriminantConfig | None = None,
    features: Float[Array, "N m"] | None = None,
) -> Discriminant:
    """What all tasks share: covariance and mean of the features.

    Args:
      key: not used.
      conditions: class means of the features of each adapter's task, E = C m.
      tasks: of each adapter.
      bank: n adapters of LoRA, of which sites, rank and scale are used.
      heads: class vectors of the frozen head, in the order of the classes.
      config: hyper-parameters; None: those of `DiscriminantConfig`.
      features: f of texts of the training tasks; None: the class means stand for texts.

    Returns:
      The state.

    Raises:
      ValueError: a site that the bank has not or that has no low-rank factors, a rank below C,
        heads, conditions or features of another width, or numbers that are not finite.
    """
    del key
    config = config or DiscriminantConfig()
    soup.examples(conditions, tasks, bank)
    template = bank[0].replace(trainable=jax.tree.map(jnp.zeros_like, bank[0].trainable))
    site = site_of(template, config.site)
    leaves, _ = template.arrays(site)
    if not {"a", "b", "scale"} <= set(leaves):
        raise ValueError(f"{site.path}: got leaves {sorted(leaves)}, expected a, b and scale")
    (m, rank), classes = leaves["a"].shape[-2:], len(heads)
    if heads.shape != (classes, site.d_out) or classes < 2 or rank < classes:
        raise ValueError(
            f"heads: got shape {heads.shape}, expected (C, {site.d_out}) with 2 <= C <= rank {rank}"
        )
    if conditions.shape[1] != classes * m:
        raise ValueError(
            f"conditions: got width {conditions.shape[1]}, expected C m = {classes} * {m}"
        )
    rows = conditions.reshape(-1, m) if features is None else features
    x = np.asarray(rows, np.float64)
    if x.ndim != 2 or x.shape[1] != m or not np.isfinite(x).all():
        raise ValueError(f"features: got shape {x.shape}, expected finite numbers [N, {m}]")
    mean = x.mean(0)
    covariance = (x - mean[None]).T @ (x - mean[None]) / len(x)
    ridge = config.shrinkage * np.trace(covariance) / m
    precision = np.linalg.inv(covariance + ridge * np.eye(m))
    dtype = conditions.dtype
    arrays = [jnp.asarray(t, dtype) for t in (covariance, precision, mean, heads)]
    return Discriminant(arrays[0], arrays[1], arrays[2], arrays[3], template, config)


def generate(key: PRNGKeyArray, state: Discriminant, condition: Float[Array, "E"]) -> Adapter:
    """The adapter of one task.

    Args:
      key: not used: one condition has one discriminant.
      state: of `fit`.
      condition: class means of the features of the task's examples, one after the other.

    Returns:
      An adapter like those of the bank: zero but in the last matrix of the site.

    Raises:
      ValueError: a condition of another width, or one that is not finite.
    """
    del key
    classes, m = state.heads.shape[0], state.mean.shape[0]
    means = checked(condition, classes * m).reshape(classes, m)
    q = jnp.asarray(contrasts(classes), means.dtype)
    solved = numerics.matmul(means, state.precision)  # [C, m], rows P m_c
    half = -0.5 * jnp.sum(solved * means, axis=1)
    directions = numerics.matmul(solved.T, q)  # W Q: what is equal in all classes cancels
    spread = jnp.sum(directions * numerics.matmul(state.covariance, directions))
    unit = jnp.sqrt(spread / (classes - 1))
    gain = state.config.gain / jnp.where(unit > 0, unit, jnp.ones_like(unit))
    constant = state.mean / jnp.sum(state.mean**2)
    offsets = (half - jnp.mean(half))[None]  # k
    a = jnp.concatenate([directions, constant[:, None]], axis=1)  # [m, C]
    b = gain * numerics.matmul(jnp.concatenate([q.T, offsets]), state.heads)  # [C, d_out]
    return _written(state.template, state.config.site, a, b)


def _written(template: Adapter, path: str, a: Array, b: Array) -> Adapter:
    """The template with the factors in the last matrix of a site."""
    leaves, _ = template.arrays(site_of(template, path))
    stack = leaves["scale"].shape
    last = tuple(n - 1 for n in stack)
    scale = leaves["scale"][last].astype(b.dtype)
    factors = {"a": a, "b": b / scale}
    slices = {
        "a": (*last, slice(None), slice(0, a.shape[1])), "b": (*last, slice(0, b.shape[0])),
    }  # fmt: skip

    def put(part: dict[str, dict[str, Array]]) -> dict[str, dict[str, Array]]:
        own = {
            name: jnp.zeros_like(t).at[slices[name]].set(factors[name].astype(t.dtype))
            if name in factors else t
            for name, t in part.get(path, {}).items()
        }  # fmt: skip
        return {**part, path: own} if own else part

    return template.replace(trainable=put(template.trainable), frozen=put(template.frozen))


SYSTEM = Generator(
    name="Linear discriminant as an adapter",
    paper="Fisher 1936; Friedman 1989",
    symbol="Discriminant",
    evidence="scores of a model by numpy; two classes by the textbook's threshold; lift is merge",
    kind="component",
    fit=fit,
    generate=generate,
    orderless=True,
    width=12,
    small={
        "heads": np.eye(2, 5, dtype=np.float32),
        "config": DiscriminantConfig(site="last", shrinkage=0.5),
    },
)
