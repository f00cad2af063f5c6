r"""Aggregation rounds of federated learning: what the server makes of the clients' adapters.

===========  =====================================================================
u_k, v_k     factors of client k at one site, [d_in, R] and [R, d_out]
p_k          its weight: share of examples; 0 for a client that sat the round out
D            what every client's weight changes by after the round, [d_in, d_out]
===========  =====================================================================

Clients are the leading axis of a bank. A system gives ``aggregate(bank, weights) -> Round``: the
factors that training continues from, and what is added to the frozen weight. Then

.. math:: D = \text{residual} + \bar u \bar v

and a system that claims to be exact has :math:`D = \sum_k p_k u_k v_k`.

Laws, each an error relative to the largest entry of D, 0 where it holds:

============  ============================================================================
order         clients in another order give the same D
absent        a client of weight 0 might as well not be there
equal         equal clients give the delta that each of them has
exact         D is the exact average (systems that claim it)
finite        D and its derivative by the weights are finite, and D when all adapters are zero
jit           jitted is eager
============  ============================================================================
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.algebra import LowRank
from jlora.contracts.distance import gap
from jlora.system import System

LAWS = ("order", "absent", "equal", "exact", "finite", "jit")


class Round(NamedTuple):
    """What the server sends back for one site."""

    mean: LowRank  # the factors that the clients continue from
    residual: LowRank | None = None  # what is added to the frozen weight; None: nothing


Aggregate = Callable[[LowRank, Array], Round]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aggregation(System):
    """The record of an aggregation.

    Attributes:
      aggregate: (bank u [N, d_in, R], v [N, R, d_out]; weights [N]) -> `Round`, of one site.
      exact: whether D is claimed to be the exact weighted average.
      shared: the factor that all clients have in common: "", "u", or "uv" (a trained core between).
    """

    laws: ClassVar[tuple[str, ...]] = LAWS
    suite: ClassVar[tuple[str, ...]] = ("tests/contracts/aggregation_test.py",)

    aggregate: Aggregate
    exact: bool = False
    shared: str = ""


class World(NamedTuple):
    """What the laws are measured on."""

    bank: LowRank  # clients [N >= 3, ...], all different
    weights: Float[Array, "N"]  # all positive and different, summing to 1


def world(record: Aggregation, seed: int = 0, clients: int = 4) -> World:
    """Random clients of one site, 7 x 6 of rank 3.

    Args:
      record: the system, for the factor that it shares.
      seed: of the draws.
      clients: N, at least 3.

    Returns:
      The clients and their weights.
    """
    rng = np.random.default_rng(seed)
    u, v = rng.normal(size=(clients, 7, 3)), rng.normal(size=(clients, 3, 6))
    if record.shared:
        u = np.broadcast_to(u[:1], u.shape)
    if record.shared == "uv":  # u_k = L C_k, v_k = R
        u, v = u @ rng.normal(size=(clients, 3, 3)), np.broadcast_to(v[:1], v.shape)
    p = np.linspace(0.5, 1.5, clients)
    bank = LowRank(jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32))
    return World(bank, jnp.asarray(p / p.sum(), jnp.float32))


def error(law: str, record: Aggregation, at: World) -> float:
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


def laws_of(record: Aggregation) -> tuple[str, ...]:
    """The laws that a system can be asked for.

    Args:
      record: the system.

    Returns:
      Names of `LAWS`; "exact" of systems that claim it alone.
    """
    return tuple(law for law in LAWS if law != "exact" or record.exact)


def dense(record: Aggregation, bank: LowRank, weights: Float[Array, "N"]) -> np.ndarray:
    """D of one round.

    Args:
      record: the system.
      bank: the clients' factors.
      weights: p.

    Returns:
      [d_in, d_out], float64.
    """
    mean, residual = record.aggregate(bank, weights)
    parts = [mean] + ([residual] if residual is not None else [])
    return np.sum([np.asarray(x.u, "f8") @ np.asarray(x.v, "f8") for x in parts], axis=0)


def average(bank: LowRank, weights: Float[Array, "N"]) -> np.ndarray:
    """The exact average of the deltas.

    Args:
      bank: the clients' factors.
      weights: p.

    Returns:
      [d_in, d_out], float64.
    """
    u, v, p = (np.asarray(t, "f8") for t in (*bank, weights))
    return np.einsum("n,nir,nro->io", p, u, v)


def _pick(bank: LowRank, clients: np.ndarray) -> LowRank:
    return LowRank(bank.u[clients], bank.v[clients])


def order(record: Aggregation, at: World) -> float:
    """Clients in reverse.

    Args and Returns are those of `error`.
    """
    turned = np.arange(len(at.weights))[::-1].copy()
    again = dense(record, _pick(at.bank, turned), at.weights[turned])
    return gap(dense(record, *at), again)


def absent(record: Aggregation, at: World) -> float:
    """The last client with weight 0, against the round without it.

    Args and Returns are those of `error`.
    """
    present = at.weights.at[-1].set(0.0)
    present = present / jnp.sum(present)
    without = np.arange(len(at.weights) - 1)
    return gap(
        dense(record, at.bank, present), dense(record, _pick(at.bank, without), present[:-1])
    )


def equal(record: Aggregation, at: World) -> float:
    """All clients as the first.

    Args and Returns are those of `error`.
    """
    same = _pick(at.bank, np.zeros(len(at.weights), np.int32))
    one = np.asarray(at.bank.u[0], "f8") @ np.asarray(at.bank.v[0], "f8")
    return gap(dense(record, same, at.weights), one)


def exact(record: Aggregation, at: World) -> float:
    """Against the average of the dense deltas.

    Args and Returns are those of `error`.
    """
    return gap(dense(record, *at), average(*at))


def finite(record: Aggregation, at: World) -> float:
    """0, or infinity where a value or a derivative by the weights is not finite.

    Args and Returns are those of `error`.
    """

    def total(weights: Array, bank: LowRank) -> Array:
        mean, residual = record.aggregate(bank, weights)
        parts = [mean] + ([residual] if residual is not None else [])
        return sum((jnp.sum(jnp.sin(x.u @ x.v)) for x in parts), jnp.zeros(()))

    zero = LowRank(*(jnp.zeros_like(t) for t in at.bank))
    if record.shared:
        zero = LowRank(at.bank.u, zero.v)
    numbers = (*jax.value_and_grad(total)(at.weights, at.bank), total(at.weights, zero))
    return 0.0 if all(np.isfinite(np.asarray(t)).all() for t in numbers) else float("inf")


def jit(record: Aggregation, at: World) -> float:
    """Jitted against eager.

    Args and Returns are those of `error`.
    """
    compiled = dataclasses.replace(record, aggregate=jax.jit(record.aggregate))
    return gap(dense(compiled, *at), dense(record, *at))


CHECKS: Mapping[str, Callable[[Aggregation, World], float]] = {
    "order": order,
    "absent": absent,
    "equal": equal,
    "exact": exact,
    "finite": finite,
    "jit": jit,
}
