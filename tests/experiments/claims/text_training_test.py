"""All tasks trained at once: each by its own gradient; accuracy on rows that are not padding."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from experiments.claims import text_training
from tests.experiments.claims.federated_rounds_test import D, linear

NAMES = ("query", "key", "value", "out")


@pytest.fixture
def found():
    """Three tasks on a linear model; every training row of a task is the same text."""
    rng = np.random.default_rng(0)
    f32 = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    base = {"layers": {"attention": {s: {"kernel": 0.1 * f32(1, D, D)} for s in NAMES}}}
    hidden, mask, heads = f32(3, 2, D), jnp.ones((3, 2), bool), f32(3, 2, D)
    inputs = (hidden[:, None], mask[:, None], heads[:, None])
    test = tuple(jnp.repeat(x, 4, axis=1) for x in inputs)
    logits = np.stack([linear(base, *(x[t] for x in test))[0] for t in range(3)])
    label = np.repeat(logits.argmax(-1)[:, None], 4, axis=1)
    label[:, 0] = 1 - label[:, 0]  # the first row of four is wrong
    return text_training.Tasks(
        linear, base, ("a", "b", "c"), jnp.arange(3)[:, None] * jnp.ones((1, 5), jnp.int32),
        jnp.asarray([[0] * 5, [1] * 5, [1] * 5]), heads, hidden, mask,
        (test, jnp.asarray(label), (4, 2, 1)),
    )  # fmt: skip


def test_a_step_of_every_task_is_by_its_own_gradient(found):
    solver, adapter = optax.sgd(1.0), text_training.fresh(found, jl.LoRA(rank=2, alpha=2.0), 0)
    state = solver.init(adapter.trainable)
    after, _, loss = text_training.fit(found, adapter, state, 0, solver=solver, start=0, stop=1)
    kernels = [np.asarray(found.base["layers"]["attention"][s]["kernel"][0], "f8") for s in NAMES]
    losses = []
    for t, label in enumerate((0, 1, 1)):
        x = np.asarray(found.hidden[t], "f8").sum(0)
        head = np.asarray(found.heads[t], "f8")
        z = head @ (sum(kernels).T @ x)
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        losses.append(-np.log(p[label]))
        out = head.T @ (p - np.eye(2)[label])  # dL / d(output)
        for s, path in zip(NAMES, text_training.SITES, strict=True):
            assert s in path
            a = np.asarray(adapter.trainable[path]["a"][t, 0], "f8")
            moved = np.asarray(after.trainable[path]["b"][t, 0])
            np.testing.assert_allclose(moved, -np.outer(a.T @ x, out), rtol=1e-4, atol=1e-5)
    assert loss == pytest.approx(np.mean(losses), rel=1e-4)


def test_padding_is_not_judged(found):
    adapter = text_training.fresh(found, jl.LoRA(rank=2, alpha=2.0), 0)
    assert text_training.accuracy(found, adapter) == pytest.approx((3 / 4, 1 / 2, 0.0))


def test_shuffled_labels_are_the_same_labels_in_another_order(found):
    label = jnp.asarray(np.tile([0, 1], (3, 30)))
    lost = text_training.shuffled(found._replace(label=label), 0).label
    assert (jnp.sort(lost, axis=1) == jnp.sort(label, axis=1)).all()
    assert 0.2 < float((lost == label).mean()) < 0.8
    assert (lost[0] != lost[1]).any()
