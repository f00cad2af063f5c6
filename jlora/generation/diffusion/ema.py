r"""A moving average of the parameters, kept inside the optimizer's state.

.. math::
    m_k = d\, m_{k-1} + (1 - d)\, \theta_k, \qquad \bar\theta_k = m_k / (1 - d^k)

:math:`\theta_k` are the parameters after update k. Chained last, so that it sees the final update;
checkpoints of the optimizer state then hold the average too.

Symbols: d -> ``decay``, m -> ``EmaState.inner.ema``, :math:`\bar\theta` -> ``averaged(state)``.
Shapes: those of the parameters, float32.
Raises: ValueError for a decay outside [0, 1), for an update without parameters, or when a state
does not hold exactly one average.
Papers: Polyak and Juditsky 1992; the bias correction is Adam's (Kingma and Ba 2015).
Source: papers; the recursion is optax.ema's.
Deviates: the correction makes early averages usable: there is no warm-up of the decay.
"""

from typing import NamedTuple

import jax
import numpy as np
import optax

from jlora.system import System
from jlora.types import Tree

ONE = np.ones((), np.float32)


class EmaState(NamedTuple):
    """State of the averaging transformation."""

    inner: optax.EmaState  # moments of (the parameters, the constant 1): the latter is 1 - d^k


def average(decay: float = 0.999) -> optax.GradientTransformationExtraArgs:
    """Follows the parameters; updates pass unchanged. Put it last in ``optax.chain``.

    Args:
      decay: d; 0.999 averages over about a thousand steps.

    Returns:
      A transformation whose update needs the parameters.

    Raises:
      ValueError: a decay outside [0, 1); at an update, no parameters.
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"ema decay: got {decay}, expected 0 <= decay < 1")
    ema = optax.ema(decay, debias=False)

    def init(params):
        return EmaState(ema.init((params, ONE)))  # pyright: ignore[reportArgumentType]

    def update(updates, state, params=None, **extra):
        del extra
        if params is None:
            raise ValueError("ema: update needs params, got None")
        _, inner = ema.update((optax.apply_updates(params, updates), ONE), state.inner)
        return updates, EmaState(inner)  # pyright: ignore[reportArgumentType]

    return optax.GradientTransformationExtraArgs(init, update)


def averaged(opt_state: Tree) -> Tree:
    """The bias-corrected average held somewhere in an optimizer state.

    Args:
      opt_state: after at least one update.

    Returns:
      A tree like the parameters.

    Raises:
      ValueError: the state does not hold exactly one average.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, EmaState))
    states = [leaf for leaf in leaves if isinstance(leaf, EmaState)]
    if len(states) != 1:
        raise ValueError(f"ema: got {len(states)} averages in the optimizer state, expected 1")
    pair: Tree = states[0].inner.ema
    moments, correction = pair
    return jax.tree.map(lambda m: m / correction, moments)


SYSTEM = System(
    name="Parameter average",
    paper="Polyak 1992; Kingma 2015",
    symbol="average",
    evidence="recursion by numpy; fixed point",
    kind="component",
)
