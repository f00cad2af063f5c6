"""Early exits: weights of losses, the oracle, confidence, and counts of block runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.pruning import early_exit as lib

LOGITS = np.random.default_rng(0).normal(size=(4, 30, 3)).astype(np.float32) * 1.5


@pytest.mark.parametrize(
    ("weighting", "alpha"),
    [("weighted", [1, 2, 3, 4]), ("aggressive", [0.1, 0.1, 0.1, 1]), ("last", [0, 0, 0, 1])],
)
def test_the_loss_is_the_weighted_mean(weighting, alpha):
    losses = np.asarray([4.0, 3.0, 2.5, 2.0], np.float32)
    want = np.dot(alpha, losses) / np.sum(alpha)
    np.testing.assert_allclose(lib.exit_loss(jnp.asarray(losses), weighting), want, rtol=1e-6)
    turned = lib.exit_loss(jnp.asarray(losses[::-1]), weighting)
    assert abs(float(turned) - want) > 0.1, "mutation: the runs in the other order"
    grad = jax.grad(lambda x: lib.exit_loss(x, weighting))(jnp.asarray(losses))
    np.testing.assert_allclose(grad, np.divide(alpha, np.sum(alpha)), rtol=1e-6)
    assert lib.loss_weights(1, weighting) == [1.0]


def test_the_oracle_leaves_at_the_first_run_that_says_what_the_last_says():
    found = np.asarray(lib.oracle_exits(jnp.asarray(LOGITS)))
    for k in range(LOGITS.shape[1]):
        says = [int(np.argmax(x)) for x in LOGITS[:, k]]
        assert found[k] == says.index(says[-1])
    assert set(found) == {0, 1, 2, 3}
    wrong = np.asarray(lib.oracle_exits(jnp.asarray(LOGITS[::-1])))
    assert (wrong != found).any(), "mutation: the first run decides"
    assert not np.asarray(lib.oracle_exits(jnp.asarray(LOGITS[:1]))).any()


def test_confidence_leaves_by_the_largest_probability():
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    sure = p.max(-1) > 0.7
    sure[-1] = True
    found = np.asarray(lib.confident_exits(jnp.asarray(LOGITS), 0.7))
    np.testing.assert_array_equal(found, sure.argmax(0))
    assert set(found) == {0, 1, 2, 3}
    assert not np.asarray(lib.confident_exits(jnp.asarray(LOGITS), 0.0)).any()
    assert (np.asarray(lib.confident_exits(jnp.asarray(LOGITS), 1.0)) == 3).all()


def test_runs_of_a_batch_by_hand_and_by_stepping():
    # rows of [1 + 3, 2] and [1 + 1 + 1] runs; side by side the first waits for the second
    assert lib.block_runs([[0, 2], [0, 0, 0], [1]], rows=2, loops=3) == (9, 1 + 3 + 2, 5)
    draw = np.random.default_rng(1)
    exits = [draw.integers(0, 3, draw.integers(1, 9)).tolist() for _ in range(12)]
    queue, running, steps = [list(e) for e in exits], [], 0
    while queue or running:
        while queue and len(running) < 4:
            running.append([e + 1 for e in queue.pop(0)])
        for row in running:
            row[0] -= 1
            if not row[0]:
                del row[0]
        running, steps = [row for row in running if row], steps + 1
    found = lib.block_runs(exits, rows=4, loops=3)
    assert found.depth_wise == steps < found.waiting < found.full
    alone = lib.block_runs(exits, rows=1, loops=3)
    assert alone.waiting == alone.depth_wise == sum(e + 1 for request in exits for e in request)
    late = [[2] * len(e) for e in exits]
    assert len(set(lib.block_runs(late, rows=4, loops=3))) == 1, "without exits nothing is saved"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: lib.loss_weights(2, "even"), "weighting: got 'even'"),
        (lambda: lib.loss_weights(0), "loops: got 0"),
        (lambda: lib.block_runs([[0]], 0, 2), "rows: got 0"),
        (lambda: lib.block_runs([[0], [2]], 1, 2), "request 1: got \\[2\\]"),
    ],
)
def test_what_cannot_work_is_an_error(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()
