"""Recognition of classes against float64 NumPy; its own classes, strangers, and one class twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.generation.generators import class_memory

D, KINDS, EACH = 6, 5, 64


@functools.cache
def texts():
    """(e [N, d], its row [N, 8], class [N]) around centres that are far apart."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(KINDS), EACH)
    centres = 3 * rng.normal(size=(KINDS, D))
    e = 1.0 + centres[groups] + rng.normal(size=(len(groups), D)) * np.linspace(0.5, 1.5, D)
    return e, rng.normal(size=(len(groups), 8)), groups


@functools.cache
def known():
    """Their memory."""
    return class_memory.memory(*texts())


def ask(means, counts, caution=1.0):
    """`recognised` of arrays."""
    return RECOGNISED(known(), jnp.asarray(means, "f4"), jnp.asarray(counts, "f4"), caution)


RECOGNISED = jax.jit(class_memory.recognised)


def test_the_probability_is_that_of_the_equation():
    e, rows, groups = texts()
    means = np.stack([e[groups == j].mean(0) for j in range(KINDS)])
    rest = np.concatenate([e[groups == j] - means[j] for j in range(KINDS)])
    within = rest.T @ rest / len(rest)
    metric = np.linalg.inv(within + 0.5 * np.trace(within) / D * np.eye(D))
    # All KINDS - 1 axes are kept: between class means the distance is that of the metric.
    point = means[2] + 0.3 * (means[3] - means[2])
    square = (point - means[2]) @ metric @ (point - means[2])
    axes = np.asarray(known().axes, "f8")
    spread = np.trace(axes.T @ within @ axes)
    t = np.log(square / (spread * (1 / 8 + 1 / EACH)))
    alpha, beta, gamma = np.asarray(known().calibration, "f8")
    want = 1 / (1 + np.exp(-(alpha - beta * t + gamma * np.log(8) - 1.0)))
    far = means.mean(0)
    r, found = ask([point, far], [8, 8])
    assert float(r[0]) == pytest.approx(want, rel=2e-3) and 1e-6 < want < 0.999
    np.testing.assert_allclose(found[0], rows[groups == 2].mean(0), rtol=1e-4, atol=1e-5)
    # Mutation: distances that forget how many texts a mean is of would be seen.
    forgot = 1 / (1 + np.exp(-(alpha - beta * np.log(square / spread) + gamma * np.log(8) - 1)))
    assert abs(forgot - want) > 1e-2


def test_own_classes_are_recognised_and_strangers_are_not():
    e, rows, groups = texts()
    rng = np.random.default_rng(1)
    some = np.stack([e[rng.permutation(np.flatnonzero(groups == j))[:16]].mean(0) for j in (0, 4)])
    r, found = ask(some, [16, 16])
    assert r.min() > 0.9
    for row, j in zip(found, (0, 4), strict=True):
        np.testing.assert_allclose(row, rows[groups == j].mean(0), rtol=1e-4, atol=1e-5)
    means = np.stack([e[groups == j].mean(0) for j in (0, 1)])
    between = means.mean(0)  # of no class
    assert ask([between, some[1]], [16, 16])[0][0] < 0.1


def test_a_class_that_is_recognised_twice_is_none():
    e, _, groups = texts()
    own = e[groups == 0]
    r, _ = ask([own[:16].mean(0), own[16:32].mean(0)], [16, 16])
    assert r.max() < 0.1
    r, _ = ask([own[:16].mean(0), e[groups == 1][:16].mean(0)], [16, 0])
    assert r[0] > 0.9 and r[1] == 0, "a class without an example is not recognised"


def test_more_caution_recognises_less():
    e, _, groups = texts()
    point = [e[groups == 0][:4].mean(0), e.mean(0)]  # of the second there is no example
    found = [float(ask(point, [4, 0], caution)[0][0]) for caution in (0.0, 1.0, 4.0)]
    assert found[0] > found[1] > found[2]


def test_too_few_classes_and_texts_are_refused():
    e, rows, groups = texts()
    with pytest.raises(ValueError, match="got 2 of finite texts, expected at least 3"):
        class_memory.memory(e[groups < 2], rows[groups < 2], groups[groups < 2])
    with pytest.raises(ValueError, match="of finite texts"):
        class_memory.memory(e * np.nan, rows, groups)
    few = np.arange(len(e)) % EACH < 7
    with pytest.raises(ValueError, match="got none of 8 texts"):
        class_memory.memory(e[few], rows[few], groups[few])
