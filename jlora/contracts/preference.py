r"""Preference objectives: losses of pairs of answers, of which one is preferred.

=============  =============================================================================
c, r           log-probability of the chosen and of the rejected answer, [B]
c_0, r_0       the same of the reference: the base, which is the model with its adapter off
h              (c - r) - (c_0 - r_0), how much more the adapter prefers the chosen one
=============  =============================================================================

A system gives ``objective(log_probs, params, adapter, batch) -> [B]``, where
``log_probs(params, adapter, batch)`` is a lifted model and `None` in the place of the adapter
switches it off. There is no second model: the reference shares the weights of the base, and takes
no gradient.

Laws, each an error of numbers about 1, 0 where it holds:

===========  ===============================================================================
start        at the start, where the adapter changes nothing, the loss is what is claimed
sign         a larger c lowers the loss there, a larger r raises it
shift        a constant added to both c and r changes nothing
reference    it is the base by one pass with no adapter (systems that have a reference), and
             neither the adapter nor the weights get a gradient through it
rows         the loss of a pair depends on that pair alone
finite       loss and gradient are finite, however far apart the answers are
jit          jitted is eager
===========  ===============================================================================
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlora import types
from jlora.contracts import tiny
from jlora.contracts.distance import gap
from jlora.core.adapter import Adapter
from jlora.core.lift import lift
from jlora.core.method import Method
from jlora.system import System
from jlora.types import Tree

LAWS = ("start", "sign", "shift", "reference", "rows", "finite", "jit")
FAR = 1e4  # log-probabilities of a long answer


class LogProbs(NamedTuple):
    """What a model says of pairs of answers."""

    chosen: Float[Array, "B"]  # sums over the tokens of an answer
    rejected: Float[Array, "B"]
    chosen_length: Float[Array, "B"]  # tokens of the answer
    rejected_length: Float[Array, "B"]


Scorer = Callable[[Tree, Adapter | None, types.Batch], LogProbs]  # (params, adapter, batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(System):
    """The record of a preference objective.

    Attributes:
      objective: (log_probs, params, adapter, batch) -> loss of each pair [B].
      referenced: whether it has a reference.
      start: the loss of every pair where the adapter changes nothing; None: it depends on the pair.
    """

    laws: ClassVar[tuple[str, ...]] = LAWS
    suite: ClassVar[tuple[str, ...]] = ("tests/contracts/preference_test.py",)

    objective: Callable[[Scorer, Tree, Adapter, types.Batch], Array]
    referenced: bool = True
    start: float | None = None


class Batch(NamedTuple):
    """Pairs of answers of three tokens for the model of `tiny`, whose outputs are logits."""

    chosen: Float[Array, "B 3 5"]
    rejected: Float[Array, "B 3 5"]
    tokens: Int[Array, "2 B 3"]  # of the chosen and of the rejected answers
    mask: Float[Array, "2 B 3"]  # 1 where a token belongs to the answer; lengths differ


class World(NamedTuple):
    """What the laws are measured on."""

    params: tiny.Params
    fresh: Adapter  # changes nothing
    adapter: Adapter  # the same, in training
    batch: Batch


def world(method: Method, seed: int = 0) -> World:
    """Random pairs, whose chosen answers are shorter.

    Args:
      method: the adaptation method of all sites.
      seed: of the draws.

    Returns:
      The world.
    """
    rng, p = np.random.default_rng(seed), tiny.params(seed)
    fresh = tiny.fresh(method, p)
    mask = np.ones((2, 4, tiny.TOKENS), "f4")
    mask[0, :, -1] = 0.0
    tokens = jnp.asarray(rng.integers(tiny.WIDTH, size=mask.shape), jnp.int32)
    both = tiny.inputs(4, seed), tiny.inputs(4, seed + 1)
    return World(p, fresh, tiny.moved(fresh), Batch(*both, tokens, jnp.asarray(mask)))


def laws_of(record: Preference) -> tuple[str, ...]:
    """The laws that a system can be asked for.

    Args:
      record: the system.

    Returns:
      Names of `LAWS`; "start" of systems that claim a loss alone.
    """
    return tuple(law for law in LAWS if law != "start" or record.start is not None)


def error(law: str, record: Preference, at: World) -> float:
    """The error of a law.

    Args:
      law: one of `LAWS`.
      record: the system.
      at: what it is measured on.

    Returns:
      0 where the law holds, infinity where something is not finite.
    """
    worst = CHECKS[law](record, at)
    return worst if np.isfinite(worst) else float("inf")


def scores(params: Tree, adapter: Adapter | None, batch: Batch) -> LogProbs:
    """The `log_probs` of the laws: of the lifted tiny model.

    Args:
      params: its weights.
      adapter: None: the base.
      batch: pairs of answers.

    Returns:
      Log-probabilities and lengths.
    """
    return _scores(lambda z: lift(tiny.model)(params, adapter, z, jnp.zeros(())), batch)


def _of_base(params: Tree, batch: Batch) -> LogProbs:
    """The same of the base, which is not lifted."""
    return _scores(lambda z: tiny.model(params, z, jnp.zeros(())), batch)


def _scores(logits: Callable[[Array], Array], batch: Batch) -> LogProbs:
    log_probs = jax.nn.log_softmax(logits(jnp.concatenate([batch.chosen, batch.rejected])))
    one_hot = jax.nn.one_hot(batch.tokens, tiny.WIDTH, dtype=log_probs.dtype)
    per_token = jnp.sum(log_probs.reshape(one_hot.shape) * one_hot, axis=-1)
    sums, lengths = jnp.sum(per_token * batch.mask, axis=-1), jnp.sum(batch.mask, axis=-1)
    return LogProbs(sums[0], sums[1], lengths[0], lengths[1])


def _loss(record: Preference, at: World, chosen: Array, rejected: Array) -> Array:
    """[B], of a policy that is the base plus `chosen` [B] and `rejected` [B]."""
    base = _of_base(at.params, at.batch)
    policy = base._replace(chosen=base.chosen + chosen, rejected=base.rejected + rejected)

    def log_probs(params: Tree, adapter: Adapter | None, batch: types.Batch) -> LogProbs:
        del params, batch
        return base if adapter is None else policy

    return record.objective(log_probs, at.params, at.adapter, at.batch)


def _slopes(record: Preference, at: World, by: float) -> tuple[Array, Array, Array]:
    """(loss [B], its derivatives by c and by r [B]), where c is larger by `by`."""
    shift, zero = jnp.full(len(at.batch.chosen), by, jnp.float32), jnp.zeros(len(at.batch.chosen))

    def total(c: Array, r: Array) -> tuple[Array, Array]:
        loss = _loss(record, at, c, r)
        return jnp.sum(loss), loss

    slopes, loss_and_aux = jax.grad(total, (0, 1), has_aux=True)(shift, zero)
    return loss_and_aux, *slopes


def start(record: Preference, at: World) -> float:
    """The loss of a fresh adapter against the claim.

    Args and Returns are those of `error`.
    """
    assert record.start is not None
    result = record.objective(scores, at.params, at.fresh, at.batch)
    return gap(result, jnp.full(result.shape, record.start, result.dtype))


def sign(record: Preference, at: World) -> float:
    """0, or infinity where a slope at the start has the wrong sign.

    Args and Returns are those of `error`.
    """
    _, by_chosen, by_rejected = _slopes(record, at, 0.0)
    right = (np.asarray(by_chosen) < 0).all() and (np.asarray(by_rejected) > 0).all()
    return 0.0 if right else float("inf")


def shift(record: Preference, at: World) -> float:
    """Both answers less likely by the same factor.

    Args and Returns are those of `error`.
    """
    c, r = jnp.asarray([0.5, -0.5, 2.0, 0.0]), jnp.asarray([0.1, 1.0, -1.0, 0.0])
    return gap(_loss(record, at, c - 3.0, r - 3.0), _loss(record, at, c, r))


def reference(record: Preference, at: World) -> float:
    """Loss and gradients against those with the base's log-probabilities as constants.

    Infinite where the number of passes with no adapter is not 1, or 0 without a reference.

    Args and Returns are those of `error`.
    """
    base, off = _of_base(at.params, at.batch), []

    def counted(params: Tree, adapter: Adapter | None, batch: Batch) -> LogProbs:
        off.append(adapter is None)
        return scores(params, adapter, batch)

    def constant(params: Tree, adapter: Adapter | None, batch: Batch) -> LogProbs:
        return base if adapter is None else scores(params, adapter, batch)

    def sloped(log_probs: Scorer) -> Tree:
        def total(params: Tree, trainable: Tree) -> Array:
            adapter = at.adapter.replace(trainable=trainable)
            return jnp.sum(record.objective(log_probs, params, adapter, at.batch))

        return jax.jit(jax.value_and_grad(total, (0, 1)))(at.params, at.adapter.trainable)

    difference = gap(sloped(counted), sloped(constant))
    return difference if sum(off) == int(record.referenced) else float("inf")


def rows(record: Preference, at: World) -> float:
    """Pairs in reverse, the first two of them alone.

    Args and Returns are those of `error`.
    """
    turned = Batch(at.batch.chosen[::-1][:2], at.batch.rejected[::-1][:2],
                   at.batch.tokens[:, ::-1][:, :2], at.batch.mask[:, ::-1][:, :2])  # fmt: skip
    some = record.objective(scores, at.params, at.adapter, turned)
    return gap(some, record.objective(scores, at.params, at.adapter, at.batch)[::-1][:2])


def finite(record: Preference, at: World) -> float:
    """0, or infinity where a loss or a slope is not finite.

    Args and Returns are those of `error`.
    """
    numbers = [np.asarray(t) for by in (-FAR, 0.0, FAR) for t in _slopes(record, at, by)]
    return 0.0 if all(np.isfinite(t).all() for t in numbers) else float("inf")


def jit(record: Preference, at: World) -> float:
    """Jitted against eager.

    Args and Returns are those of `error`.
    """

    def run(params: Tree, adapter: Adapter, batch: Batch) -> Array:
        return record.objective(scores, params, adapter, batch)

    given = (at.params, at.adapter, at.batch)
    return gap(jax.jit(run)(*given), run(*given))


CHECKS: Mapping[str, Callable[[Preference, World], float]] = {
    "start": start,
    "sign": sign,
    "shift": shift,
    "reference": reference,
    "rows": rows,
    "finite": finite,
    "jit": jit,
}
