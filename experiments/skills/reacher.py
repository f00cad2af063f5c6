r"""A planar arm of MuJoCo and experts that each do one thing.

=====  ===================================================================================
q, v   angles of the joints and their velocities, [2]
e      fingertip - target, [2]
J(q)   Jacobian of the fingertip, [2, 2]
C      the projection on what an expert cares for, [2, 2]
=====  ===================================================================================

.. math::
    a = \mathrm{clip}\left(-\frac{k\, J(q)^\top C e + d\, v}{\tau},\; -1,\; 1\right)

Known skills bring the fingertip to the target along x, along y and along the diagonal, each
whatever the distance across; the new goal is to reach the target, C = 1. The reward is the
simulator's: minus distance, minus squared torque.

Reference: Gymnasium, Reacher-v5 (MuJoCo), which is a package of its own (``jlora[simulator]``).
Deviates: units of the observation, for the policy, and actions that are shares of a torque of tau.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

VERSION = "1.4.0"  # of gymnasium, as pinned in `experiments.data.pinned`
LINKS = 0.1, 0.11  # lengths in metres, of the model's file
STEPS = 50  # of an episode, the simulator's own
GAIN, DAMPING = 30.0, 0.1  # k and d
TORQUE = 0.25  # tau; the experts want more in one step of a hundred
UNITS = np.asarray([1, 1, 1, 1, 5, 5, 0.2, 0.2, 5, 5], "f4")  # of cos, sin, target, v and e
KNOWN = {
    "along x": ((1.0, 0.0), (0.0, 0.0)),
    "along y": ((0.0, 0.0), (0.0, 1.0)),
    "along the diagonal": ((0.5, 0.5), (0.5, 0.5)),
}
REACH = ((1.0, 0.0), (0.0, 1.0))


class Reacher:
    """Episodes side by side, each on a simulator of its own."""

    steps = STEPS
    d_obs, d_action = 10, 2

    def __init__(self, count: int):
        """Starts as many simulators.

        Args:
          count: of episodes.

        Raises:
          ModuleNotFoundError: gymnasium or MuJoCo is not installed.
          RuntimeError: another release of gymnasium than the pinned one.
        """
        import gymnasium  # type: ignore[import-not-found]

        if gymnasium.__version__ != VERSION:
            raise RuntimeError(f"gymnasium: got {gymnasium.__version__}, expected {VERSION}: "
                               "pip install 'jlora[simulator]'")  # fmt: skip
        self.envs: list[Any] = [gymnasium.make("Reacher-v5") for _ in range(count)]

    def reset(self, seeds: Sequence[int]) -> Float[np.ndarray, "n 10"]:
        """The first observations.

        Args:
          seeds: of the starts and targets, one per simulator.

        Returns:
          cos q, sin q, target, v and e, times `UNITS`.
        """
        pairs = zip(self.envs, seeds, strict=True)
        observations = np.stack([env.reset(seed=seed)[0] for env, seed in pairs])
        return observations.astype("f4") * UNITS[None]

    def step(self, actions: Float[np.ndarray, "n 2"]) -> tuple[np.ndarray, np.ndarray]:
        """One step of every simulator.

        Args:
          actions: torques of the joints in units of tau, -1 to 1.

        Returns:
          (observations [n, 10], rewards [n]).
        """
        results = [env.step(TORQUE * a) for env, a in zip(self.envs, actions, strict=True)]
        s, rewards = (np.asarray([f[k] for f in results], "f4") for k in (0, 1))
        return s * UNITS[None], rewards


def expert(
    observation: Float[np.ndarray, "n 10"], cares: Sequence[Sequence[float]]
) -> Float[np.ndarray, "n 2"]:
    """What an expert does.

    Args:
      observation: of `Reacher`.
      cares: C.

    Returns:
      a.
    """
    cos, sin, v, e = ((observation / UNITS[None])[:, k : k + 2] for k in (0, 2, 6, 8))
    e = e @ np.asarray(cares, "f4").T
    c = cos[:, 0] * cos[:, 1] - sin[:, 0] * sin[:, 1]  # of q_0 + q_1
    s = sin[:, 0] * cos[:, 1] + cos[:, 0] * sin[:, 1]
    far = LINKS[1] * np.stack([-s, c], -1)  # the fingertip by q_1
    near = far + LINKS[0] * np.stack([-sin[:, 0], cos[:, 0]], -1)  # by q_0
    pull = np.stack([np.sum(j * e, -1) for j in (near, far)], -1)
    return np.clip(-(GAIN * pull + DAMPING * v) / TORQUE, -1.0, 1.0).astype("f4")
