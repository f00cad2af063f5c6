"""AdaMerging: entropy by numpy, and accuracy from unlabelled examples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora.merging import gather
from jlora.merging.learned import adamerging as file
from jlora.merging.learned.adamerging import adamerging, entropy
from jlora.merging.learned.coefficients import mixed


def test_entropy_by_numpy():
    logits = np.random.default_rng(0).normal(size=(4, 3, 5)).astype("f4") * 3
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(entropy(logits), -(p * np.log(p)).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(entropy(jnp.zeros((2, 7))), np.log(7), rtol=1e-6)
    certain = jnp.asarray([[300.0, 0.0, -300.0]])
    assert float(entropy(certain)) == 0.0
    assert np.isfinite(np.asarray(jax.grad(entropy)(certain))).all()


D, H, C = 24, 64, 3


class World:
    """Three classification tasks on one random network, an adapter trained for each."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.params = {"up": self.draw(D, H) / D**0.5, "down": self.draw(H, H) / H**0.5}
        heads = [self.draw(H, C) / 2 for _ in range(3)]
        tuned = jl.lift(lambda p, x: jnp.tanh(jnp.tanh(x @ p["up"]) @ p["down"]))
        self.tuned = tuned
        self.centres = [self.draw(C, D) * 0.9 for _ in range(3)]
        self.shift = [self.draw(1, D) for _ in range(3)]
        self.tasks = [lambda a, x, h=h: tuned(self.params, a, x) @ h for h in heads]
        self.adapters = [self.train(k) for k in range(3)]
        self.test = [self.data(k, 400, 99 + k) for k in range(3)]

    def draw(self, *shape):
        return jnp.asarray(self.rng.normal(size=shape), jnp.float32)

    def data(self, k, n, seed):
        rng = np.random.default_rng(seed)
        y = rng.integers(0, C, n).astype("i4")
        noise = jnp.asarray(rng.normal(size=(n, D)), jnp.float32)
        return self.centres[k][y] + self.shift[k] + 0.8 * noise, jnp.asarray(y)

    def train(self, k):
        a = jl.init(jax.random.key(k), lambda p, x: (x @ p["up"]) @ p["down"], self.params,
                    jnp.ones((2, D)), methods={"up|down": jl.LoRA(2, 4.0)})  # fmt: skip
        (x, y), adam = self.data(k, 96, 10 + k), optax.adam(2e-2)

        def loss(t):
            logits = self.tasks[k](a.replace(trainable=t), x)
            return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(y, C), -1))

        def step(carry, _):
            t, state = carry
            with jax.numpy_dtype_promotion("standard"):
                updates, state = adam.update(jax.grad(loss)(t), state)
            return (optax.apply_updates(t, updates), state), None

        start = (a.trainable, adam.init(a.trainable))
        run = jax.jit(lambda c: jax.lax.scan(step, c, None, length=80)[0][0])
        return a.replace(trainable=run(start))

    def accuracy(self, a):
        hits = [jnp.mean(f(a, x).argmax(1) == y) for f, (x, y) in zip(
            self.tasks, self.test, strict=True)]  # fmt: skip
        return float(sum(hits)) / 3

    def unlabelled(self, steps=60):
        return [
            jnp.stack([self.data(k, 32, 1000 * k + s + 1000)[0] for s in range(steps)])
            for k in range(3)
        ]


@pytest.fixture(scope="module")
def world():
    return World(3)


def gain(world):
    plain = world.accuracy(mixed(gather(world.adapters), jnp.full(3, 0.3)))
    run = jax.jit(lambda b: adamerging(world.tasks, world.adapters, b, rate=1e-2))
    out = run(world.unlabelled())
    return plain, world.accuracy(out.adapter), out


def test_certain_predictions_are_better_ones(world):
    """The paper's claim in small: no labels, layer-wise coefficients, accuracy of all tasks up."""
    plain, got, out = gain(world)
    assert got > plain + 0.02
    assert float(out.values[-5:].mean()) < 0.7 * float(out.values[0])
    assert {k: c.shape for k, c in out.coefficients.items()} == {"down": (3,), "up": (3,)}


def test_one_coefficient_a_task(world):
    batches = world.unlabelled(2)
    out = adamerging(world.tasks, world.adapters, batches, layerwise=False, rate=1e-2)
    assert out.coefficients.shape == (3,)
    assert np.all(np.abs(np.asarray(out.coefficients) - 0.3) < 0.03)  # two steps of Adam
    first = sum(
        float(entropy(f(mixed(gather(world.adapters), jnp.full(3, 0.3)), b[0])))
        for f, b in zip(world.tasks, batches, strict=True)
    )
    np.testing.assert_allclose(out.values[0], first, rtol=1e-4)


def test_mutation_seeking_uncertainty(world, monkeypatch):
    monkeypatch.setattr(file, "entropy", lambda logits: -entropy(logits))
    with pytest.raises(AssertionError):
        plain, got, _ = gain(world)
        assert got > plain + 0.02


def test_refusals(world):
    with pytest.raises(ValueError, match="batches: got 1, expected one for each of 3 tasks"):
        adamerging(world.tasks, world.adapters, world.unlabelled(1)[:1])
