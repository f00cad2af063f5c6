"""SoRA: the threshold by search, a proximal step by numpy, pruning without a change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora.schedules import sora

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
PARAMS = {"w": jnp.zeros((6, 5)), "v": jnp.zeros((6, 5))}


def apply(p, x):
    return x @ p["w"], x @ p["v"]


@pytest.fixture(scope="module")
def start():
    lora = jl.init(jax.random.key(0), apply, PARAMS, X, methods={"w|v": jl.LoRA(4, 2.0)})
    return sora.gated(jax.random.key(1), lora)


def moved(adapter, seed=2):
    rng = np.random.default_rng(seed)
    draw = lambda t: jnp.asarray(rng.normal(size=t.shape), t.dtype)  # noqa: E731
    return adapter.replace(trainable=jax.tree.map(draw, adapter.trainable))


def check_threshold(threshold):
    """Against the smallest value of the objective on a fine grid."""
    z = np.linspace(-2, 2, 40001)
    for x in (-1.3, -0.45, -0.2, 0.0, 0.35, 0.45, 0.9):
        best = z[np.argmin(0.5 * (z - x) ** 2 + 0.3 * np.abs(z))]
        assert abs(float(threshold(jnp.float32(x), 0.3)) - best) < 2e-4, x


def test_the_threshold_is_the_minimiser():
    check_threshold(sora.soft_threshold)


def test_mutation_the_dead_zone_of_the_official_code_is_seen():
    def official(x, xi):
        once = sora.soft_threshold(x, xi)
        return jnp.where(jnp.abs(once) < xi, 0.0, once)

    with pytest.raises(AssertionError):
        check_threshold(official)


def test_the_start_is_the_identity_with_normal_gates(start):
    assert all(not d.any() for d in jl.delta(PARAMS, start).values())
    big = jl.init(jax.random.key(0), lambda p, x: x @ p, jnp.zeros((3, 2)), jnp.ones((1, 3)),
                  methods={"": jl.LoRA(4000)})  # fmt: skip
    gates = np.asarray(sora.gated(jax.random.key(1), big).trainable[""]["e"])
    assert abs(gates.mean()) < 0.05 and abs(gates.std() - 1) < 0.05


def test_a_step_by_numpy(start):
    """Descent at 0.1, then the threshold of the step; the factors just descend."""
    adapter, g = moved(start), moved(start, 3).trainable
    rule = optax.chain(optax.sgd(0.1), sora.proximal(lambda n: 0.2 + 0.1 * n.astype(jnp.float32)))
    t, state = adapter.trainable, rule.init(adapter.trainable)
    want = {k: np.asarray(v, "f8") for k, v in t["w"].items()}
    for xi in (0.2, 0.3):
        updates, state = rule.update(g, state, t)
        t = optax.apply_updates(t, updates)
        want = {k: v - 0.1 * np.asarray(g["w"][k], "f8") for k, v in want.items()}
        want["e"] = np.sign(want["e"]) * np.maximum(np.abs(want["e"]) - xi, 0)
    for name, value in want.items():
        np.testing.assert_allclose(t["w"][name], value, rtol=1e-5, atol=1e-6)


def fitted(start, xi, steps=150):
    """Adam with a threshold, on a target of rank 1 per site."""
    rng = np.random.default_rng(5)
    target = {p: jnp.asarray(np.outer(rng.normal(size=6), rng.normal(size=5)) * size, jnp.float32)
              for p, size in (("w", 1.0), ("v", 0.1))}  # fmt: skip
    rule = optax.chain(optax.adam(0.03), sora.proximal(lambda n: xi))

    def loss(t):
        found = jl.delta(PARAMS, start.replace(trainable=t))
        return sum(jnp.sum((found[p] - target[p]) ** 2) for p in target)

    def step(carry, _):
        t, state = carry
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = rule.update(jax.grad(loss)(t), state, t)
        return (optax.apply_updates(t, updates), state), None

    begin = start.trainable, rule.init(start.trainable)
    return jax.lax.scan(step, begin, None, length=steps)[0]


def test_zeros_grow_with_the_threshold_and_pruning_changes_nothing(start):
    run = jax.jit(jax.vmap(lambda xi: fitted(start, xi)))
    many, states = run(jnp.asarray([0.0, 0.012, 0.02]))
    left = [int(sum((t["e"][k] != 0).sum() for t in many.values())) for k in range(3)]
    assert left[0] == 8 and 8 > left[1] > left[2] > 0, left
    trained, state = jax.tree.map(lambda t: t[1], (many, states))
    adapter = start.replace(trainable=trained)
    pruned, cut = sora.prune(adapter, state)
    assert sum(t["e"].size for t in pruned.trainable.values()) == left[1]
    assert jax.tree.structure(cut[0][0].mu) == jax.tree.structure(pruned.trainable)
    lora = sora.fold(pruned)
    assert all(isinstance(m, jl.LoRA) for _, m in lora.sites)
    want = jl.lift(apply)(PARAMS, adapter, X)
    for found in (pruned, lora):
        for y, z in zip(jl.lift(apply)(PARAMS, found, X), want, strict=True):
            np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)


def test_the_penalty_of_the_code_and_the_grid(start):
    adapter = moved(start)
    gates = np.concatenate([np.asarray(t["e"]) for t in adapter.trainable.values()])
    np.testing.assert_allclose(sora.sparsity(adapter, 10.0), 10 * np.abs(gates).mean(), rtol=1e-5)
    np.testing.assert_allclose(sora.grid(1e-4, 7e-4), np.arange(1, 8) * 1e-4)


def test_refusals(start):
    with pytest.raises(ValueError, match=r"threshold: got -1.0, expected a number >= 0"):
        sora.proximal(-1.0)
    with pytest.raises(ValueError, match=r"name: got 'e', expected the name of an array"):
        sora.proximal(0.1).init({"w": {"a": X}})
    rule = sora.proximal(0.1)
    with pytest.raises(ValueError, match=r"proximal: got no params"):
        rule.update(start.trainable, rule.init(start.trainable))
    with pytest.raises(ValueError, match=r"grid: got start 0.1, stop -1.0"):
        sora.grid(0.1, -1.0)
    with pytest.raises(ValueError, match=r"[vw]: got AdaLoRA\(.*, expected LoRA"):
        sora.gated(jax.random.key(0), start)
    with pytest.raises(ValueError, match=r"[vw]: got LoRA\(.*, expected AdaLoRA"):
        sora.fold(sora.fold(start))
