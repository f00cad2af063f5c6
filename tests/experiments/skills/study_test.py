"""Skills of a diffusion policy on a line: what is drawn, what is mixed, what the figures are."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import psec as claim
from experiments.skills import policy, reacher, study
from experiments.skills.study import Sizes

SIZES = Sizes(
    demos=6, few=2, episodes=5, width=16, rank=2, base_steps=60, skill_steps=40, context_steps=20
)


class Line:
    """A point on a line; it is rewarded for being near its target, and sees both."""

    steps, d_obs, d_action = 4, 2, 1

    def __init__(self, count):
        self.count = count

    def reset(self, seeds):
        draws = [np.random.default_rng(seed).normal(size=2) for seed in seeds]
        self.at = np.asarray(draws, "f4")
        assert len(self.at) == self.count
        return self.at.copy()

    def step(self, actions):
        self.at = self.at + np.concatenate([actions, 0 * actions], -1)
        return self.at.copy(), -np.abs(self.at[:, 0] - self.at[:, 1])


def toward(s, gain):
    return np.clip(gain * (s[:, 1:] - s[:, :1]), -1, 1).astype("f4")


TASK = claim.Task(
    Line,
    {"half": functools.partial(toward, gain=0.5), "away": functools.partial(toward, gain=-0.5)},
    functools.partial(toward, gain=1.0),
)


@pytest.fixture(scope="module")
def skills():
    shown = {n: study.demonstrate(Line(6), at, range(6)) for n, at in TASK.known.items()}
    return study.learn(0, shown, study.demonstrate(Line(2), TASK.goal, range(2)), SIZES)


NOISY, LEVEL, SEEN = jnp.asarray([[0.3], [-0.7]]), jnp.asarray([0, 7], jnp.int32), jnp.ones((2, 2))


def test_demonstrations_are_the_steps_of_episodes():
    found = study.demonstrate(Line(3), TASK.goal, [4, 5, 6])
    assert found.observation.shape == (12, 2) and found.action.shape == (12, 1)
    after = found.observation[:3, :1] + found.action[:3]
    np.testing.assert_allclose(found.observation[3:6, :1], after, rtol=1e-6)
    assert np.abs(found.observation[9:, 0] - found.observation[9:, 1]).max() < 1  # it gets there


def test_a_denoiser_that_knows_the_action_draws_it():
    want = jnp.asarray([[0.5, -0.25]])

    def exact(a, k, s):
        left = policy.remains()[k][:, None]
        return (a - jnp.sqrt(left) * want) / jnp.sqrt(1 - left)

    got = jax.jit(lambda key: policy.draw(exact, key, jnp.zeros((1, 3)), 2))(jax.random.key(0))
    np.testing.assert_allclose(got, want, atol=1e-4)
    loss = policy.loss(exact, jax.random.key(1), jnp.zeros((1, 3)), want)
    assert loss < 1e-6 < policy.loss(lambda a, k, s: 0 * a, jax.random.key(1), SEEN[:1], want)


def alone_each(skills):
    return jax.jit(lambda *z: [study.alone(skills, k)(*z) for k in range(3)])(NOISY, LEVEL, SEEN)


def test_one_hot_mixtures_are_the_skills_and_others_differ(skills):
    wanted = alone_each(skills)
    ways = [jax.jit(way(skills)) for way in (study.in_parameters, study.in_noise)]
    for predict in ways:
        for number, want in enumerate(wanted):
            alpha = jnp.tile(jnp.eye(3)[number][None], (2, 1))
            np.testing.assert_allclose(
                predict(alpha, NOISY, LEVEL, SEEN), want, rtol=1e-4, atol=1e-5
            )
    by_weight, by_noise = (way(jnp.full((2, 3), 0.5), NOISY, LEVEL, SEEN) for way in ways)
    assert np.abs(by_weight - by_noise).max() > 1e-3  # the network is not linear


def test_learning_moves_skills_apart_and_leaves_the_rest(skills):
    each = alone_each(skills)
    assert min(np.abs(a - b).max() for a in each for b in each if a is not b) > 1e-3
    shown = study.demonstrate(Line(6), TASK.known["half"], range(6))

    def loss(number):
        one = study.alone(skills, number)
        keys = jax.random.split(jax.random.key(5), 20)
        s, a = (jnp.asarray(t) for t in shown)
        return jax.jit(jax.vmap(lambda key: policy.loss(one, key, s, a)))(keys).mean()

    assert loss(0) < loss(1)  # "half" is nearer to its own expert than "away"


def test_a_blind_mixture_is_another_policy_but_a_function_of_the_row(skills):
    sighted, blind = (
        study.compose(0, skills, study.in_parameters(skills), SIZES, blind=b) for b in (False, True)
    )
    seen = jnp.asarray([[0.1, 0.7], [0.1, 0.7]])
    noisy, level = jnp.full((2, 1), 0.2), jnp.zeros(2, jnp.int32)
    got = jax.jit(blind)(noisy, level, seen)
    np.testing.assert_array_equal(got[0], got[1])
    assert np.abs(got - jax.jit(sighted)(noisy, level, seen)).max() > 1e-5


def test_figures_are_returns_of_the_same_episodes(monkeypatch):
    kinds = []

    def returns(simulator, denoiser, seeds):
        kinds.append((type(simulator), denoiser, tuple(seeds)))
        return np.full(len(seeds), float(len(kinds)))

    monkeypatch.setattr(study, "returns", returns)
    monkeypatch.setattr(study, "learn", lambda *_: None)
    monkeypatch.setattr(study, "in_parameters", lambda _: "weights")
    monkeypatch.setattr(study, "in_noise", lambda _: "noise")
    monkeypatch.setattr(study, "compose", lambda seed, s, how, sizes, blind=False: (how, blind))
    monkeypatch.setattr(study, "alone", lambda s, number: number)
    found = claim.figures(3, TASK, SIZES)
    made = [k[1] for k in kinds]
    assert made == [("weights", False), ("noise", False), ("weights", True), -1, 0, 1]
    assert len({k[2] for k in kinds}) == 1 and len(found.units) == 5
    assert (found.system, found.baseline, found.control) == ((1.0,) * 5, (2.0,) * 5, (3.0,) * 5)
    assert found.more["one LoRA"] == 4.0 and -5 < found.more["expert"] < 0


def test_returns_are_sums_of_rewards_under_the_policy(skills):
    def still(a, k, s):  # predicts the noise of the action 0
        return a / jnp.sqrt(1 - policy.remains()[k][:, None])

    line = Line(3)
    start = line.reset([7, 8, 9])
    got = study.returns(line, still, [7, 8, 9])
    np.testing.assert_allclose(got, -4 * np.abs(start[:, 0] - start[:, 1]), atol=1e-3)


def observations(e, v=(0.0, 0.0)):
    """The arm stretched along x."""
    return np.asarray([[1, 1, 0, 0, 0, 0, *v, *e]], "f4") * reacher.UNITS[None]


def test_experts_by_hand():
    # stretched along x, only y moves: J = [[0, 0.21], [0, 0.11]] for (q_0, q_1)
    got = reacher.expert(observations((0.3, -0.01)), reacher.REACH)
    np.testing.assert_allclose(got, [[30 * 0.21 * 0.01 / 0.25, 30 * 0.11 * 0.01 / 0.25]], rtol=1e-5)
    got = reacher.expert(observations((0.3, -0.01), (0.5, 0.0)), reacher.KNOWN["along x"])
    np.testing.assert_allclose(got, [[-0.1 * 0.5 / 0.25, 0.0]], atol=1e-6)
    got = reacher.expert(observations((0.01, 0.0)), reacher.KNOWN["along the diagonal"])
    np.testing.assert_allclose(got, [[-30 * 0.21 * 0.005 / 0.25, -30 * 0.11 * 0.005 / 0.25]])


@pytest.mark.skipif(importlib.util.find_spec("gymnasium") is None, reason="jlora[simulator]")
@pytest.mark.filterwarnings("ignore")  # of the simulator
def test_the_arm_is_the_experts_and_the_goal_needs_both():
    arm = reacher.Reacher(4)
    total = {}
    for name, cares in {**reacher.KNOWN, "reach": reacher.REACH}.items():
        s, total[name] = arm.reset(range(4)), 0.0
        for _ in range(arm.steps):
            s, rewards = arm.step(reacher.expert(s, cares))
            total[name] += rewards.mean()
    assert s.shape == (4, arm.d_obs) and total.pop("reach") > max(total.values()) + 1


def test_a_missing_or_other_simulator_is_said(monkeypatch):
    import sys
    import types

    other = types.SimpleNamespace(__version__="0.1")
    monkeypatch.setitem(sys.modules, "gymnasium", other)
    with pytest.raises(RuntimeError, match=r"gymnasium: got 0\.1, expected 1\.4\.0"):
        reacher.Reacher(1)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ModuleNotFoundError):
        reacher.Reacher(1)


def break_noise(patch):
    patch.setattr(study, "in_noise", study.in_parameters)


def break_parameters(patch):
    right = study.psec.compose
    patch.setattr(study.psec, "compose", lambda skills: right(skills[::-1]))


@pytest.mark.parametrize("broken", [break_noise, break_parameters])
def test_mutation_is_noticed(monkeypatch, broken, skills):
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        test_one_hot_mixtures_are_the_skills_and_others_differ(skills)
