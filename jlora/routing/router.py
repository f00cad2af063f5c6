"""Top-k routing and what it must report: who was chosen, with which weight, how evenly.

Symbols: logits l -> `logits` [..., E]; k -> `top_k`; chosen experts I(t) and their weights g ->
`ids`, `weights` [..., k]; load f and mean probability P -> [E].

.. math::
    g_{t,e} = \\frac{\\exp l_{t,e}}{\\sum_{e' \\in I(t)} \\exp l_{t,e'}}, \\quad e \\in I(t) =
    \\mathrm{top}_k(l_t), \\qquad
    L_{balance} = E \\sum_e f_e P_e

with f_e the share of the T k choices that fell on e (a constant for the gradient) and P_e the mean
of softmax(l)_e. L is 1 when both are uniform, E when one expert takes everything.

Fedus, Zoph and Shazeer, `Switch Transformers <https://arxiv.org/abs/2101.03961>`_, 2022.

Source: paper (balance loss), generalised from k = 1 by dividing the counts by T k.
Deviates: nothing. Softmax over the chosen logits equals softmax over all, then renormalised.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jlora.contracts.router import Route, Router, Routes
from jlora.routing import reports
from jlora.routing.rule import Rule, State


def top_k(logits: Float[Array, "... experts"], k: int) -> Routes:
    """The k experts of largest logits of every token; ties go to the lower index, so logits should
    not start equal.

    Args:
      logits: of the router.
      k: experts per token, 1..E.

    Returns:
      Experts, weights, balance loss and load.

    Raises:
      ValueError: k not in 1..E.
    """
    experts = logits.shape[-1]
    if not 1 <= k <= experts:
        raise ValueError(f"top_k: expected in 1..{experts}, got {k}")
    best, ids = jax.lax.top_k(logits, k)
    return Routes(ids, jax.nn.softmax(best, axis=-1), *_balance(logits, ids))


@dataclasses.dataclass(frozen=True)
class TopK(Rule):
    """`top_k` as a rule, for batches with padding; it remembers nothing."""

    k: int = 2

    def routes(
        self,
        logits: Float[Array, "*T E"],
        state: State,
        train: bool,
        mask: Bool[Array, "*T"] | None = None,
    ) -> Routes:
        routes = top_k(logits, self.k)
        if mask is None:
            return routes
        soft = jax.nn.softmax(logits, axis=-1)
        balance, load = reports.measure(soft, routes.ids, jnp.ones_like(routes.weights), mask)
        return routes._replace(balance=balance, load=load)


def router(k: int) -> Route:
    """`TopK` as a router of the contract.

    Args:
      k: how many experts a token goes to, 1..E.

    Returns:
      A function of (logits [..., E]; state (); whether to train; mask [...] or None), whose balance
      loss and load leave out the tokens that the mask says are padding. All zero without any token.
    """
    return TopK(k)


def _balance(logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    tokens, experts = tuple(range(logits.ndim - 1)), logits.shape[-1]
    mean = jnp.mean(jax.nn.softmax(logits, axis=-1), axis=tokens)
    # sums of one-hot rows, not a scatter: explicit meshes have no rule for that
    load = jnp.mean(jax.nn.one_hot(ids, experts, dtype=mean.dtype), axis=(*tokens, ids.ndim - 1))
    return experts * jnp.sum(load * mean), load


def dense_weights(
    ids: Int[Array, "... k"], weights: Float[Array, "... k"], experts: int
) -> jax.Array:
    """The weights of the chosen experts as rows over all experts.

    Args:
      ids: the chosen experts.
      weights: their weights.
      experts: E.

    Returns:
      [..., E], zero for experts that were not chosen.
    """
    hot = jax.nn.one_hot(ids, experts, dtype=weights.dtype)
    return jnp.sum(hot * weights[..., None], axis=-2)


SYSTEM = Router(
    name="Top-k router with balance loss",
    paper="Fedus 2021, 2101.03961",
    symbol="top_k",
    evidence="identities and landmarks of the loss; mutation check",
    kind="component",
    init_state=lambda experts: (),
    route=router(2),
)
