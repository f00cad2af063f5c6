"""PSEC: skills composed in the weights reach a new goal better than skills composed in noise."""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.claims.protocol import Claim, Figures
from experiments.skills import reacher, study
from experiments.skills.study import Expert, Simulator, Sizes

SIZES = Sizes()


class Task(NamedTuple):
    """Where the skills are learned."""

    simulator: type[Simulator]  # of a number of episodes
    known: dict[str, Expert]
    goal: Expert


def arm() -> Task:
    """MuJoCo's planar arm."""
    known = {n: functools.partial(reacher.expert, cares=c) for n, c in reacher.KNOWN.items()}
    goal = functools.partial(reacher.expert, cares=reacher.REACH)
    return Task(reacher.Reacher, known, goal)


def figures(seed: int, task: Task, sizes: Sizes = SIZES) -> Figures:
    """The returns of all policies on the same episodes.

    Args:
      seed: of weights, batches and noise; and of the demonstrations. The episodes are the same.
      task: simulator and experts.
      sizes: how much of everything.
    """
    many, few = task.simulator(sizes.demos), task.simulator(sizes.few)  # type: ignore[call-arg]
    seeds = [1_000 * (seed + 1) + k for k in range(sizes.demos)]
    shown = {name: study.demonstrate(many, at, seeds) for name, at in task.known.items()}
    goal = study.demonstrate(few, task.goal, [500 + s for s in seeds[: sizes.few]])
    skills = study.learn(seed, shown, goal, sizes)
    policies = {
        "system": study.compose(seed, skills, study.in_parameters(skills), sizes),
        "baseline": study.compose(seed, skills, study.in_noise(skills), sizes),
        "control": study.compose(seed, skills, study.in_parameters(skills), sizes, blind=True),
        "one LoRA": study.alone(skills, -1),
    } | {name: study.alone(skills, k) for k, name in enumerate(task.known)}
    tests = task.simulator(sizes.episodes)  # type: ignore[call-arg]
    episodes = [1_000_000 + k for k in range(sizes.episodes)]
    found = {name: study.returns(tests, one, episodes) for name, one in policies.items()}
    s, expert = tests.reset(episodes), np.zeros(sizes.episodes)
    for _ in range(tests.steps):
        s, rewards = tests.step(task.goal(s))
        expert += rewards
    return Figures(
        units=tuple(f"episode {k}" for k in range(sizes.episodes)),
        system=tuple(found["system"].tolist()),
        baseline=tuple(found["baseline"].tolist()),
        control=tuple(found["control"].tolist()),
        more={name: float(t.mean()) for name, t in {**found, "expert": expert}.items()},
    )


def run(seed: int, workdir: Path) -> Figures:
    """Seed `seed`; nothing is shared by seeds."""
    return figures(seed, arm())


CLAIM = Claim(
    name="psec",
    systems=("PSEC",),
    statement="return of a new goal: three skills and one of few demonstrations composed in the "
    "weights, by the state > the same skills composed in predicted noise, by the state",
    reference="Liu et al. 2025, arXiv:2502.05932: parameter-level composition over noise-level",
    baseline="the same four adapters, predicted noise mixed by a network trained in the same way",
    control="the network that mixes reads observations of other times",
    unit="return of an episode of Reacher-v5 (MuJoCo)",
    assets=("gymnasium",),
    run=run,
)
