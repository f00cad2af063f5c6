"""Audits: dense oracles, copies, real re-training as the unit."""

import jax.numpy as jnp
import numpy as np

from jlora.generation.audit import metrics as audit
from jlora.generation.baselines import soup, span

RNG = np.random.default_rng(0)
TASKS = np.repeat(np.arange(3), 4)  # 3 tasks x (2 seeds x 2 snapshots)
SEEDS = np.tile([0, 0, 1, 1], 3)
CENTRES = 4 * RNG.normal(size=(3, 30))
RUNS = RNG.normal(size=(3, 2, 30))
REAL = np.stack([CENTRES[t] + RUNS[t, s] for t, s in zip(TASKS, SEEDS, strict=True)])
REAL = (REAL + 0.01 * RNG.normal(size=REAL.shape)).astype("f4")
NEW = np.repeat(CENTRES, 2, 0) + RNG.normal(size=(6, 30))  # fresh seeds of the three tasks
NEW = NEW.astype("f4")
NEW_TASKS = np.repeat(np.arange(3), 2)


def inner(x, y=None):
    return jnp.asarray(np.asarray(x) @ np.asarray(x if y is None else y).T)


def squared(x):
    return jnp.asarray((np.asarray(x) ** 2).sum(1))


def nearest(x):
    return audit.nearest_distance(inner(x, REAL), squared(x), squared(REAL))


def test_nearest_distance_matches_dense():
    dense = np.linalg.norm(NEW[:, None] - REAL[None], axis=-1) / np.linalg.norm(REAL, axis=1)
    value, index = nearest(NEW)
    np.testing.assert_allclose(value, dense.min(1), rtol=1e-3)
    np.testing.assert_array_equal(index, dense.argmin(1))


def test_novelty_of_a_copy_is_zero_and_of_a_new_seed_is_one():
    held_out = nearest(NEW)[0]
    assert audit.novelty_ratio(nearest(REAL[::3])[0], held_out) < 2e-3
    fresh = np.repeat(CENTRES, 40, 0) + RNG.normal(size=(120, 30))
    many = np.repeat(CENTRES, 40, 0) + RNG.normal(size=(120, 30))
    ratio = audit.novelty_ratio(nearest(fresh)[0], nearest(many)[0])
    np.testing.assert_allclose(ratio, 1, atol=0.1)
    one, two = jnp.asarray([3.0, 1.0, 8.0]), jnp.asarray([1.0, 2.0, 4.0, 9.0])
    np.testing.assert_allclose(audit.novelty_ratio(one, two), 3 / 3, rtol=1e-6)  # of medians
    np.testing.assert_allclose(audit.novelty_ratio(two, one[:1]), 1, rtol=1e-6)
    # An interpolation between seeds is nearer than a new seed: the audit must see it.
    between = (REAL[0::4] + REAL[2::4]) / 2
    assert audit.novelty_ratio(nearest(between)[0], held_out) < 0.8


def test_within_task_distance_counts_pairs_of_different_runs_of_one_task():
    want = []
    for task in range(3):
        rows = [i for i in range(12) if TASKS[i] == task]
        pairs = [(i, j) for i in rows for j in rows if SEEDS[i] != SEEDS[j]]
        want.append(np.mean([np.linalg.norm(REAL[i] - REAL[j]) for i, j in pairs]))
    tasks, seeds = jnp.asarray(TASKS), jnp.asarray(SEEDS)
    got = audit.within_task_distance(inner(REAL), tasks, seeds)
    np.testing.assert_allclose(got, np.mean(want), rtol=1e-3)
    # Mutation: counting snapshots of one run as pairs makes real adapters look less diverse.
    naive = audit.within_task_distance(inner(REAL), tasks, jnp.arange(12))
    assert naive < 0.8 * got
    # A task without a pair does not count; without any pair there is no answer.
    part = audit.within_task_distance(inner(REAL[:5]), tasks[:5], seeds[:5])
    np.testing.assert_allclose(part, want[0], rtol=1e-3)
    assert jnp.isnan(audit.within_task_distance(inner(REAL[:2]), tasks[:2], seeds[:2]))


def test_diversity_ratio_of_one_repeated_adapter_is_zero_and_of_new_seeds_near_one():
    real = (inner(REAL), jnp.asarray(TASKS), jnp.asarray(SEEDS))
    same = np.repeat(REAL[::4], 3, 0)
    assert audit.diversity_ratio(inner(same), jnp.repeat(jnp.arange(3), 3), *real) < 2e-3
    ratio = audit.diversity_ratio(inner(NEW), jnp.asarray(NEW_TASKS), *real)
    assert 0.7 < ratio < 1.4


def test_confusion_of_the_soups_themselves_is_the_identity():
    soups = np.asarray(soup.combine(soup.task_weights(jnp.asarray(TASKS), 3), jnp.asarray(REAL)))
    args = inner(soups), squared(soups), squared(soups)
    own = audit.nearest_soup_confusion(*args, jnp.arange(3))
    np.testing.assert_array_equal(own.counts, np.eye(3))
    assert own.diagonal == 1
    # Mutation: shuffled labels must show.
    shifted = audit.nearest_soup_confusion(*args, jnp.asarray([1, 2, 0]))
    assert shifted.diagonal == 0
    uneven = audit.nearest_soup_confusion(
        inner(REAL[:3], soups), squared(REAL[:3]), squared(soups), jnp.asarray([0, 0, 1])
    )
    np.testing.assert_allclose(uneven.matrix, [[1, 0, 0], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(uneven.diagonal, 2 / 3, rtol=1e-6)


def test_soup_distance_and_affine_residual_match_dense():
    mine = REAL[::2]
    mean = mine.mean(0)
    x = NEW[:2]
    got = audit.soup_distance(
        jnp.asarray(x @ mean), squared(x), jnp.broadcast_to(jnp.asarray((mean**2).sum()), (2,))
    )
    want = np.linalg.norm(x - mean, axis=1) / np.linalg.norm(mean)
    np.testing.assert_allclose(got, want, rtol=1e-3)

    gram, cross = inner(mine), inner(x, mine)
    basis = (mine[1:] - mine[0]).astype("f8")
    beta = np.linalg.lstsq(basis.T, (x - mean).T, rcond=None)[0]
    hull = np.linalg.norm(x - mean - beta.T @ basis, axis=1)
    weights = span.affine_weights(gram, cross)
    got = audit.affine_residual(weights, gram, cross, squared(x))
    np.testing.assert_allclose(got, hull / np.linalg.norm(x - mean, axis=1), atol=5e-3)


def test_effective_rank_counts_directions():
    np.testing.assert_allclose(audit.effective_rank(jnp.eye(5), centred=False), 5, rtol=1e-4)
    np.testing.assert_allclose(audit.effective_rank(jnp.eye(5)), 4, rtol=1e-2)
    line = np.outer(np.arange(5.0), np.ones(3)).astype("f4")
    np.testing.assert_allclose(audit.effective_rank(inner(line)), 1, atol=0.02)
    singular = np.linalg.svd(REAL - REAL.mean(0), compute_uv=False)
    p = singular[singular > 1e-4] / singular.sum()
    np.testing.assert_allclose(
        audit.effective_rank(inner(REAL)), np.exp(-(p * np.log(p)).sum()), rtol=2e-2
    )


def test_wrong_iou_by_hand():
    x = jnp.asarray([[1, 1, 0, 0], [0, 0, 0, 0]], bool)
    y = jnp.asarray([[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(audit.wrong_iou(x, y), [[1 / 3, 1, 0], [0, 0, 1]])
