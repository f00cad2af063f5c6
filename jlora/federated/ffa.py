"""FFA-LoRA: one frozen random u for all clients; only v is trained, sent and averaged.

======  ==================================================================
u       `bank.u[0]`, drawn once, frozen, the same for every client
v_k     what client k trained, [R, d_out]
p_k     its share, sums to 1
======  ==================================================================

.. math:: u \\, \\bigl(\\sum_k p_k v_k\\bigr) = \\sum_k p_k u v_k

The delta is linear in v, so the average is exact, noise added for privacy enters linearly (no
product of two noises), and alpha and the step of SGD are one setting: eta' = eta (alpha/alpha')^2.
The trainable side is `jlora.LoRA(freeze_a=True)`; half is sent.

Shapes: bank u [N, d_in, R], v [N, R, d_out]; weights [N]; result u [d_in, R], v [R, d_out].

Paper: Sun et al. 2024, arXiv:2403.12313.
Source: abstract, and algebra.
Deviates: nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jlora.algebra import LowRank
from jlora.contracts.aggregation import Aggregation, Round
from jlora.federated.fedavg import weighted


def ffa(bank: LowRank, weights: Float[Array, "n"]) -> LowRank:
    """The exact average of one site.

    Clients whose u differ are an error outside of transformations: the average of v means nothing
    then.

    Args:
      bank: u [N, d_in, R], all equal, v [N, R, d_out].
      weights: shares, summing to 1.

    Returns:
      u [d_in, R], v [R, d_out].
    """
    if not isinstance(bank.u, jax.core.Tracer):
        require_shared(bank.u)
    return LowRank(bank.u[0], weighted(weights, bank.v))


def require_shared(u: Float[Array, "n ..."]) -> None:
    """Refuses clients whose u is not that of client 0.

    Args:
      u: of the clients.

    Raises:
      ValueError: the first client that differs.
    """
    differs = np.asarray(jnp.any(u != u[:1], axis=tuple(range(1, u.ndim))))
    if differs.any():
        k = int(np.argmax(differs))
        raise ValueError(f"client {k}: got another u than client 0, expected one frozen u for all")


SYSTEM = Aggregation(
    name="FFA-LoRA",
    paper="Sun 2024, 2403.12313",
    symbol="ffa",
    claim="ffa",
    evidence="exact; alpha and rate are one setting; noise is linear; mutation check",
    rows=(69,),
    aggregate=lambda bank, weights: Round(ffa(bank, weights)),
    exact=True,
    shared="u",
)
