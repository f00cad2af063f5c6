"""Distillation: its loss and a step by numpy, and that the labels are what is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora.transfer.distill import distill, distillation_loss, soft_labels

N, D, C = 12, 4, 3


def model(params, x):
    return x @ params["w"]


@pytest.fixture(scope="module")
def toy():
    """A linear student, its texts and a teacher's logits."""
    rng = np.random.default_rng(0)
    f32 = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params, x, teacher = {"w": f32(D, C)}, f32(N, D), 2 * f32(N, C)
    adapter = jl.init(jax.random.key(1), model, params, x, methods={"w": jl.LoRA(3, alpha=3.0)})
    return params, adapter, x, teacher


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_labels_and_loss_are_those_of_the_equation(toy):
    params, _, x, teacher = toy
    z, t = np.asarray(model(params, x), "f8"), np.asarray(teacher, "f8")
    for tau in (1.0, 4.0):
        np.testing.assert_allclose(soft_labels(teacher, tau), softmax(t / tau), rtol=1e-5)
        want = -(softmax(t / tau) * np.log(softmax(z))).sum(-1).mean()
        got = distillation_loss(model(params, x), soft_labels(teacher, tau))
        assert float(got) == pytest.approx(want, rel=1e-5)
    hard = np.asarray(soft_labels(teacher, 0.0))
    assert (hard == np.eye(C)[t.argmax(-1)]).all()
    np.testing.assert_allclose(soft_labels(teacher, 1e-3), hard, atol=1e-6)  # its limit


def test_a_class_that_does_not_exist_adds_nothing(toy):
    params, _, x, teacher = toy
    none = jnp.full((N, 1), -jnp.inf)
    wide = lambda z: jnp.concatenate([z, none], axis=1)  # noqa: E731
    labels = soft_labels(wide(teacher))
    loss = lambda z: distillation_loss(wide(z), labels)  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss))(model(params, x))
    want = distillation_loss(model(params, x), soft_labels(teacher))
    assert float(value) == pytest.approx(float(want), rel=1e-6)
    assert np.isfinite(np.asarray(grads)).all()


def test_a_step_is_that_of_the_gradient(toy):
    """All rows are one text: whatever is drawn, the step is known."""
    params, adapter, x, teacher = toy
    one, label = jnp.tile(x[:1], (N, 1)), jnp.tile(soft_labels(teacher[:1]), (N, 1))
    run = jax.jit(lambda labels: distill(
        jax.random.key(0), model, params, adapter, (one,), labels,
        solver=optax.sgd(0.5), steps=1, batch=4))  # fmt: skip
    done = run(label)
    a, z = np.asarray(adapter.trainable["w"]["a"], "f8"), np.asarray(x[0] @ params["w"], "f8")
    out = softmax(z) - np.asarray(label[0], "f8")
    want = -0.5 * np.outer(np.asarray(x[0], "f8") @ a, out)  # scale 1, b starts at zero
    np.testing.assert_allclose(done.adapter.trainable["w"]["b"], want, rtol=1e-4, atol=1e-6)
    assert done.losses.shape == (1,)
    fit = distillation_loss(model(params, one), label)
    assert float(done.losses[0]) == pytest.approx(float(fit), rel=1e-5)


def test_mutation_labels_of_other_texts_are_learned_instead(toy):
    params, adapter, x, _ = toy
    teacher = x @ jax.random.normal(jax.random.key(5), (D, C)) * 2
    right = teacher.argmax(-1)
    run = jax.jit(lambda labels: distill(
        jax.random.key(0), model, params, adapter, (x,), labels,
        solver=optax.adam(0.05), steps=150, batch=6).adapter)  # fmt: skip

    def agreement(labels):
        return float((jl.lift(model)(params, run(labels), x).argmax(-1) == right).mean())

    labels = soft_labels(teacher)
    assert agreement(labels) > 0.9
    assert agreement(jnp.roll(labels, 1, axis=1)) < 0.3  # each class named as the next one


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "got 0 steps of 4 rows"),
        ({"batch": 0}, "got 1 steps of 0 rows"),
        ({"inputs": (jnp.ones((N - 1, D)),)}, r"inputs: got shape \(11, 4\), expected 12 rows"),
    ],
)
def test_what_cannot_be_is_an_error(toy, change, said):
    params, adapter, x, teacher = toy
    given = {"inputs": (x,), "targets": teacher, "solver": optax.sgd(1.0), "steps": 1, "batch": 4}
    with pytest.raises(ValueError, match=said):
        distill(jax.random.key(0), model, params, adapter, **(given | change))


def test_a_negative_temperature_is_an_error(toy):
    with pytest.raises(ValueError, match=r"temperature: got -1\.0, expected >= 0"):
        soft_labels(toy[3], -1.0)
