"""DyLoRA: forward, gradients and the frozen mode by numpy; one training serves every rank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora.schedules import dylora, ranks

RANK, ALPHA = 4, 2.0
RNG = np.random.default_rng(0)
X, W, TARGET = RNG.normal(size=(6, 5)), RNG.normal(size=(5, 3)), RNG.normal(size=(6, 3))
PARAMS = {"w": jnp.asarray(W, jnp.float32)}
A, B = RNG.normal(size=(5, RANK)), RNG.normal(size=(RANK, 3))


def apply(p, x):
    return x @ p["w"]


def adapter(a=A, b=B, **options):
    fresh = jl.init(jax.random.key(0), apply, PARAMS, jnp.asarray(X, jnp.float32),
                    methods={"w": jl.LoRA(RANK, ALPHA, **options)})  # fmt: skip
    arrays = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    return fresh.replace(trainable={"w": arrays})


@jax.jit
def outputs(made):
    return jl.lift(apply)(PARAMS, made, jnp.asarray(X, jnp.float32))


def by_numpy(a, b, rank, power=1.0):
    """y, and the gradients of half its squared distance from the target."""
    scale = ALPHA / rank**power
    a, b = a[:, :rank], b[:rank]
    y = X @ W + scale * X @ a @ b
    g = X.T @ (y - TARGET)
    more = ((0, 0), (0, RANK - rank))
    return y, np.pad(scale * g @ b.T, more), np.pad(scale * a.T @ g, more[::-1])


def slopes(made, rank, frozen):
    def loss(t, rank):
        y = outputs(dylora.truncate(made.replace(trainable=t), rank, frozen))
        return 0.5 * jnp.sum((y - jnp.asarray(TARGET, jnp.float32)) ** 2)

    return jax.jit(jax.grad(loss))(made.trainable, rank)["w"]


def check(made, rank, frozen=False):
    _, want_a, want_b = by_numpy(A, B, rank)
    alone = np.arange(RANK) == rank - 1 if frozen else np.ones(RANK)
    found = slopes(made, jnp.int32(rank), frozen)
    np.testing.assert_allclose(found["a"], want_a * alone, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["b"], want_b * alone[:, None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_forward_of_a_rank_is_that_of_the_adapter_cut_to_it(rslora):
    made = adapter(rslora=rslora)
    for rank in (1, 3, 4):
        want = by_numpy(A, B, rank, 0.5 if rslora else 1.0)[0]
        small, _ = dylora.cut(made, (), rank)
        for found in (dylora.truncate(made, jnp.int32(rank)), small):
            np.testing.assert_allclose(outputs(found), want, rtol=1e-4, atol=1e-4)
        method = small.sites[0][1]
        assert method == jl.LoRA(rank, rslora=rslora) and method.alpha == ALPHA


def test_gradients():
    for rank in (1, 3):
        check(adapter(), rank)


def test_the_frozen_mode_trains_one_rank():
    for rank in (1, 3):
        check(adapter(), rank, frozen=True)
        masks = dylora.trained(adapter(), rank, frozen=True)["w"]
        np.testing.assert_array_equal(masks, np.arange(RANK) == rank - 1)


def test_mutation_the_scale_of_the_whole_rank_is_seen(monkeypatch):
    monkeypatch.setattr(dylora, "truncate", lambda made, rank, frozen: ranks.zeroed(
        made, dylora.first(made, rank)))  # fmt: skip
    with pytest.raises(AssertionError):
        check(adapter(), 3)


def test_draws():
    draw = jax.vmap(lambda key: dylora.sample(key, 2, 5))(jax.random.split(jax.random.key(0), 2000))
    shares = np.bincount(np.asarray(draw), minlength=7) / 2000
    np.testing.assert_allclose(shares, [0, 0, 0.25, 0.25, 0.25, 0.25, 0], atol=0.04)
    skewed = jax.vmap(lambda key: dylora.sample(key, 2, 3, (3.0, 1.0)))(
        jax.random.split(jax.random.key(0), 2000)
    )
    assert abs(float(jnp.mean(skewed == 2)) - 0.75) < 0.04


def test_one_training_serves_every_rank():
    """At every rank nearer to the target than LoRA of full rank cut to it; as near at full rank."""
    rng = np.random.default_rng(1)
    target = jnp.asarray(X @ W + 2 * RNG.normal(size=(6, 3)), jnp.float32)
    start = adapter(rng.uniform(-1, 1, size=(5, RANK)) / 2, np.zeros((RANK, 3)))
    rule = optax.adam(0.02)

    def loss(t, rank):
        y = jl.lift(apply)(PARAMS, dylora.truncate(start.replace(trainable=t), rank),
                           jnp.asarray(X, jnp.float32))  # fmt: skip
        return jnp.mean((y - target) ** 2)

    @jax.jit
    def run(low):
        def step(carry, key):
            t, state = carry
            rank = jnp.maximum(dylora.sample(key, 1, RANK), low)
            with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
                updates, state = rule.update(jax.grad(loss)(t, rank), state)
            return (optax.apply_updates(t, updates), state), None

        begin = start.trainable, rule.init(start.trainable)
        t = jax.lax.scan(step, begin, jax.random.split(jax.random.key(2), 400))[0][0]
        return jax.vmap(lambda rank: loss(t, rank))(jnp.arange(1, RANK + 1))

    whole, nested = run(RANK), run(1)
    assert (nested[:2] < 0.8 * whole[:2]).all(), (nested, whole)
    assert nested[-1] < 1.5 * whole[-1] + 0.05, (nested, whole)


def test_refusals():
    for low, high in ((0, 2), (3, 2)):
        with pytest.raises(ValueError, match=f"sample: got low {low}, high {high}"):
            dylora.sample(jax.random.key(0), low, high)
    with pytest.raises(ValueError, match=r"probabilities: got .*, expected 2 numbers >= 0"):
        dylora.sample(jax.random.key(0), 1, 2, (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match=r"w: rank: got 5, expected in 1..4"):
        dylora.truncate(adapter(), 5)
    other = jl.init(jax.random.key(0), apply, PARAMS, jnp.ones((1, 5)), methods={"w": jl.HiRA(2)})
    with pytest.raises(ValueError, match=r"w: got HiRA.*, expected LoRA"):
        dylora.truncate(other, 1)
