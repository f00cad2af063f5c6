r"""Nearest-condition and softmax-weighted soups: look the task up instead of generating.

Symbols: :math:`q_m` is ``query`` [m, E], :math:`c_n` is ``conditions`` [n, E], :math:`\tau` is
``temperature``.

.. math:: w_{mn} = \mathrm{softmax}_n(s(q_m, c_n) / \tau), \qquad
    s = \cos(q, c) \;\text{ or }\; -\|q - c\|^2 ;

the nearest-condition soup is the limit :math:`\tau \to 0`. The rows are weights over training
entries for ``soup.combine``. Where a task has several adapters let the entries be tasks and
multiply: ``nearest(...) @ soup.task_weights(...)`` is the soup of the nearest task.

Paper: none; the retrieval baselines of the weight-generation literature (SG-LoRA's weighted soup).
Deviates: the temperature is not a free choice: ``choose_temperature`` takes the one with the least
leave-one-task-out error on the training tasks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora import algebra
from jlora.contracts.generator import Generator, checked
from jlora.core.adapter import Adapter
from jlora.generation.baselines import soup

KINDS = ("cosine", "distance")
TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # tried by `fit`


def similarity(
    query: Float[Array, "m E"], conditions: Float[Array, "n E"], kind: str = "cosine"
) -> Float[Array, "m n"]:
    """How alike conditions are.

    Args:
      query: conditions of m tasks.
      conditions: those of n training entries.
      kind: "cosine", or "distance": minus the squared distance.

    Returns:
      [m, n].

    Raises:
      ValueError: unknown ``kind``, or arrays that are not [m, E] and [n, E].
    """
    if kind not in KINDS:
        raise ValueError(f"similarity kind {kind!r}, expected one of {KINDS}")
    if query.ndim != 2 or conditions.ndim != 2 or query.shape[1] != conditions.shape[1]:
        raise ValueError(
            f"similarity: query {query.shape}, conditions {conditions.shape}; "
            "expected [m, E], [n, E]"
        )
    inner = soup.matmul(query, conditions.T)
    norm_q = jnp.sum(query**2, axis=1)[:, None]
    norm_c = jnp.sum(conditions**2, axis=1)[None, :]
    if kind == "cosine":
        return inner / jnp.sqrt(norm_q * norm_c)
    return 2 * inner - norm_q - norm_c


def nearest(similarities: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """One-hot weights on the most similar entry, the first one on a tie.

    Args:
      similarities: of `similarity`.

    Returns:
      [m, n].
    """
    n = similarities.shape[1]
    return jax.nn.one_hot(jnp.argmax(similarities, axis=1), n, dtype=similarities.dtype)


def softmax(
    similarities: Float[Array, "m n"], temperature: float | Float[Array, ""]
) -> Float[Array, "m n"]:
    """Softmax weights.

    Args:
      similarities: of `similarity`.
      temperature: tau > 0.

    Returns:
      [m, n], rows sum to one.
    """
    tau = jnp.asarray(temperature, similarities.dtype)
    return jax.nn.softmax(similarities / tau, axis=1)


def leave_out(similarities: Float[Array, "n n"], groups: Int[Array, "n"]) -> Float[Array, "n n"]:
    """Similarities with every entry of the row's own task excluded.

    Args:
      similarities: among the training entries.
      groups: task of each entry.

    Returns:
      [n, n], minus infinity for entries of one task.
    """
    same = groups[:, None] == groups[None, :]
    return jnp.where(same, -jnp.inf, similarities)


def choose_temperature(
    similarities: Float[Array, "n n"],
    gram: Float[Array, "n n"],
    groups: Int[Array, "n"],
    temperatures: Sequence[float],
) -> tuple[float, np.ndarray]:
    """Temperature of least leave-one-task-out error in delta space, training tasks only.

    Args:
      similarities: [n, n] among the training entries.
      gram: [n, n] inner products of their deltas.
      groups: [n] task of each entry; at least two different ones.
      temperatures: candidates, all > 0.

    Returns:
      (temperature, errors [len(temperatures)]): mean squared error of each candidate.

    Raises:
      ValueError: no candidates, one not above 0, a single task, or errors that are not finite.
    """
    if not temperatures or min(temperatures) <= 0:
        raise ValueError(f"temperatures {list(temperatures)}, expected some, all above 0")
    if len(np.unique(np.asarray(groups))) < 2:
        raise ValueError("choose_temperature needs at least two tasks to leave one out")
    others = leave_out(similarities, groups)
    norms = jnp.diagonal(gram)
    errors = np.asarray(
        [jnp.mean(soup.squared_error(softmax(others, t), gram, gram, norms)) for t in temperatures]
    )
    if not np.isfinite(errors).all():
        raise ValueError(f"leave-one-task-out errors are not finite: {errors.tolist()}")
    return float(temperatures[int(np.argmin(errors))]), errors


class SoftSoup(NamedTuple):
    """The state of the generator."""

    examples: soup.Examples
    temperature: Float[Array, ""]  # of least leave-one-task-out error


def fit(
    key: PRNGKeyArray, conditions: Float[Array, "n E"], tasks: Int[Array, "n"], bank: Adapter
) -> SoftSoup:
    """The soups of all tasks, and the temperature that predicts each best from the others.

    Args:
      key: not used.
      conditions: of each adapter.
      tasks: of each adapter; at least two different ones.
      bank: n adapters that differ in what is trained alone.

    Returns:
      One soup and condition per task, and the temperature.

    Raises:
      ValueError: as `soup.examples` and `choose_temperature` do.
    """
    del key
    train = soup.examples(conditions, tasks, bank)
    alike = similarity(train.conditions, train.conditions)
    groups = jnp.arange(len(train.conditions), dtype=jnp.int32)
    best, _ = choose_temperature(alike, algebra.gram(train.soups), groups, TEMPERATURES)
    return SoftSoup(train, jnp.asarray(best, conditions.dtype))


def generate(key: PRNGKeyArray, state: SoftSoup, condition: Float[Array, "E"]) -> Adapter:
    """The softmax-weighted soup of the tasks whose conditions are alike, by cosine.

    Args:
      key: not used.
      state: of `fit`.
      condition: of the new task.

    Returns:
      An adapter like those of the bank.

    Raises:
      ValueError: a condition of another width, or one that is not finite.
    """
    del key
    train, tau = state
    query = checked(condition, train.conditions.shape[1])[None]
    return soup.mixed(softmax(similarity(query, train.conditions), tau), train.soups)


SYSTEM = Generator(
    name="Nearest-condition and softmax soups",
    paper="none (jlora)",
    symbol="softmax",
    evidence="similarities by numpy; limits; temperature by leave-one-task-out",
    kind="composition",
    fit=fit,
    generate=generate,
    orderless=True,
)
