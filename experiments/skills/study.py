r"""Skills in parameter space: a new goal from three skills and a few demonstrations of it.

1. The base is cloned from all experts together, without a sign of which of them acts.
2. Each skill is a LoRA adapter on it, cloned from one expert; the last one, from the few
   demonstrations of the new goal.
3. What composes the skills, `jlora.compose.psec` in the weights or the same mixture of their
   predicted noise, is a network of the observation that is trained on those demonstrations.

.. math:: W(s) = W + \sum_n \alpha_n(s)\, u_n v_n
    \qquad\text{against}\qquad e(s) = \sum_n \alpha'_n(s)\, e_n

Every policy is run on the same episodes; its figure is the return.

Reference: Liu et al. 2025, arXiv:2502.05932 (PSEC).
Deviates: the simulator, its experts and all sizes are chosen here; skills are cloned, not learned
    by rewards.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import jlora as jl
from experiments.skills import policy
from experiments.skills.policy import Demos, Denoiser
from jlora.compose import psec
from jlora.core.adapter import Adapter
from jlora.types import Tree

Expert = Callable[[np.ndarray], np.ndarray]  # observations [n, d] -> actions [n, m]


class Simulator(Protocol):
    """Episodes side by side."""

    steps: int  # of an episode
    d_obs: int
    d_action: int

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        """Observations [n, d] of n new episodes, one per seed."""
        ...

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(observations [n, d], rewards [n]) after actions [n, m]."""
        ...


class Sizes(NamedTuple):
    """How much of everything; the defaults are those of the claim."""

    demos: int = 40  # episodes of each expert; also how many run side by side
    few: int = 4  # episodes of the new goal
    episodes: int = 60  # of each policy
    width: int = 128  # of the policy
    rank: int = 8
    base_steps: int = 4000
    skill_steps: int = 2000
    context_steps: int = 1000
    pull: float = 0.01  # weight of PSEC's penalty


class Skills(NamedTuple):
    """What is composed."""

    base: Tree
    adapters: tuple[Adapter, ...]  # the last one is of the new goal
    observed: Float[np.ndarray, "n d"]  # observations, for the control
    few: Demos  # of the new goal


def demonstrate(simulator: Simulator, expert: Expert, seeds: Sequence[int]) -> Demos:
    """What an expert does in episodes.

    Args:
      simulator: with as many episodes as seeds.
      expert: of observations.
      seeds: of the episodes.

    Returns:
      All steps, one after the other.
    """
    s, rows = simulator.reset(seeds), []
    for _ in range(simulator.steps):
        a = expert(s)
        rows.append((s, a))
        s = simulator.step(a)[0]
    return Demos(*(np.concatenate(t) for t in zip(*rows, strict=True)))


def returns(simulator: Simulator, denoiser: Denoiser, seeds: Sequence[int]) -> np.ndarray:
    """The return of a policy in every episode.

    Args:
      simulator: with as many episodes as seeds.
      denoiser: of the policy.
      seeds: of the episodes and of the policy's noise.

    Returns:
      Sums of rewards, [n].
    """
    act = jax.jit(lambda key, s: policy.draw(denoiser, key, s, simulator.d_action))
    s, total = simulator.reset(seeds), np.zeros(len(seeds))
    keys = jax.random.split(jax.random.key(seeds[0]), simulator.steps)
    for key in keys:
        s, rewards = simulator.step(np.asarray(act(key, jnp.asarray(s))))
        total += rewards
    return total


def learn(seed: int, experts: Mapping[str, Demos], few: Demos, sizes: Sizes) -> Skills:
    """The base, a skill of each expert, and the one of the new goal.

    Args:
      seed: of weights and batches.
      experts: demonstrations of the known skills.
      few: those of the new goal.
      sizes: widths and steps.

    Returns:
      All of them.
    """
    key = jax.random.key(seed)
    every = Demos(*(np.concatenate(t) for t in zip(*experts.values(), strict=True)))
    d_obs, d_action = every.observation.shape[1], every.action.shape[1]
    base = policy.init(key, d_obs, d_action, sizes.width)

    def plain(params: Tree, key: Array, s: Array, a: Array) -> Array:
        return policy.loss(lambda *z: policy.model(params, policy.inputs(*z)), key, s, a)

    base = policy.fit(jax.random.fold_in(key, 1), base, plain, every, sizes.base_steps)
    x = jnp.zeros((1, len(base["first"]["kernel"])))
    methods, tuned = {".*kernel": jl.LoRA(sizes.rank)}, jl.lift(policy.model)
    adapters = []
    for number, demos in enumerate([*experts.values(), few]):
        first, second = jax.random.split(jax.random.fold_in(key, 2 + number))
        fresh = jl.init(first, policy.model, base, x, methods=methods)

        def cloned(trained: Tree, key: Array, s: Array, a: Array, fresh: Adapter = fresh) -> Array:
            own = fresh.replace(trainable=trained)
            return policy.loss(lambda *z: tuned(base, own, policy.inputs(*z)), key, s, a)

        trained = policy.fit(second, fresh.trainable, cloned, demos, sizes.skill_steps)
        adapters.append(fresh.replace(trainable=trained))
    return Skills(base, tuple(adapters), every.observation, few)


def alone(skills: Skills, number: int) -> Denoiser:
    """The policy of one skill.

    Args:
      skills: base and adapters.
      number: of the skill; -1: the one of the new goal.

    Returns:
      Its denoiser.
    """
    tuned, own = jl.lift(policy.model), skills.adapters[number]
    return lambda *z: tuned(skills.base, own, policy.inputs(*z))


def in_parameters(skills: Skills) -> Callable[[Array, Array, Array, Array], Array]:
    """Skills that meet in the weights.

    Args:
      skills: base and adapters.

    Returns:
      (alpha [b, N], noisy actions, levels, observations) -> predicted noise.
    """
    tuned, one = jl.lift(policy.model), psec.compose(skills.adapters)
    return lambda alpha, *z: tuned(skills.base, one, policy.inputs(*z), ctx={"alpha": alpha})


def in_noise(skills: Skills) -> Callable[[Array, Array, Array, Array], Array]:
    """Skills whose predictions are mixed.

    Args:
      skills: base and adapters.

    Returns:
      As `in_parameters`.
    """
    tuned, bank = jl.lift(policy.model), jl.stack(skills.adapters)

    def predict(alpha: Array, *z: Array) -> Array:
        x = policy.inputs(*z)
        each = jax.vmap(lambda own: tuned(skills.base, own, x))(bank)
        return jnp.einsum("bn,nbm->bm", alpha, each)

    return predict


def compose(
    seed: int,
    skills: Skills,
    predict: Callable[[Array, Array, Array, Array], Array],
    sizes: Sizes,
    blind: bool = False,
) -> Denoiser:
    """A policy whose mixture depends on the observation, trained on the new goal.

    Args:
      seed: of the network and its batches.
      skills: base, adapters and demonstrations of the new goal.
      predict: `in_parameters` or `in_noise` of them.
      sizes: steps and the penalty's weight.
      blind: the network reads an observation of some other time, drawn by chance (the control).

    Returns:
      Its denoiser.
    """
    key = jax.random.key(seed)
    others = jnp.asarray(skills.observed)
    start = psec.init_context(key, others.shape[1], len(skills.adapters))

    def seen(s: Array) -> Array:
        if not blind:
            return s
        mark = jnp.sum(jnp.abs(s) * 1e4, -1).astype(jnp.int32)  # chance, but the same for a row
        return others[mark % len(others)]

    def objective(trained: Tree, key: Array, s: Array, a: Array) -> Array:
        alpha = psec.context(trained, seen(s))
        error = policy.loss(lambda *z: predict(alpha, *z), key, s, a)
        return error + sizes.pull * psec.penalty(alpha)

    trained = policy.fit(
        jax.random.fold_in(key, 1), start, objective, skills.few, sizes.context_steps
    )
    return lambda a, k, s: predict(psec.context(trained, seen(s)), a, k, s)
