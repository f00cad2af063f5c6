"""PSEC: composition in the weight by context, against merged weights row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora.compose import psec as file
from jlora.compose.psec import compose, context, init_context, penalty


def leaf(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, jnp.float32)


PARAMS = {"in": leaf(6, 8), "deep": leaf(2, 8, 8, seed=1)}
X = leaf(4, 3, 6, seed=2)  # batch, time, features


def model(p, x):
    h = jnp.tanh(x @ p["in"])
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["deep"])[0]


TUNED = jl.lift(model)


def skill(seed, rank=2):
    a = jl.init(jax.random.key(seed), model, PARAMS, X, methods={"in|deep": jl.LoRA(rank)})
    new = jax.tree.map(lambda t: leaf(*t.shape, seed=seed + 10) * 0.7, a.trainable)
    return a.replace(trainable=new)


SKILLS = [skill(0), skill(1, 3), skill(2)]


def merged(alpha):
    deltas = [jl.delta(PARAMS, a) for a in SKILLS]
    return {k: w + sum(a * d[k] for a, d in zip(alpha, deltas, strict=True))
            for k, w in PARAMS.items()}  # fmt: skip


def test_every_row_has_its_own_merged_weight():
    alpha = leaf(4, 3, seed=5)
    got = TUNED(PARAMS, compose(SKILLS), X, ctx={"alpha": alpha})
    for row in range(4):
        np.testing.assert_allclose(got[row], model(merged(alpha[row]), X[row]), atol=1e-5)
    rows = jax.vmap(lambda a, x: TUNED(PARAMS, compose(SKILLS), x, ctx={"alpha": a}))(alpha, X)
    np.testing.assert_allclose(rows, got, atol=1e-5)


def test_constant_alpha_is_the_exact_weighted_sum():
    alpha = jnp.asarray([0.5, -0.3, 0.8])
    got = TUNED(PARAMS, compose(SKILLS), X, ctx={"alpha": alpha})
    total = jl.merging.merge("concat", SKILLS, alpha)
    np.testing.assert_allclose(got, model(jl.merge(PARAMS, total), X), atol=1e-5)
    for k, one in enumerate(jnp.eye(3)):
        alone = TUNED(PARAMS, compose(SKILLS), X, ctx={"alpha": one})
        np.testing.assert_allclose(alone, TUNED(PARAMS, SKILLS[k], X), atol=1e-5)


def test_adding_a_skill_leaves_the_others_as_they_were():
    before, after = compose(SKILLS[:2]), compose(SKILLS)
    for path in ("in", "deep"):
        axis = 1 if path == "deep" else 0
        old = before.frozen[path]["u"]
        new = jnp.take(after.frozen[path]["u"], jnp.arange(2), axis=axis)
        np.testing.assert_array_equal(new[..., : old.shape[-1]], old)
    assert not after.trainable


def test_context_and_penalty():
    params = init_context(jax.random.key(0), 5, 3)
    obs = leaf(7, 5, seed=3)
    np.testing.assert_array_equal(context(params, obs), np.tile([0.0, 0.0, 1.0], (7, 1)))
    np.testing.assert_allclose(np.std(params["w1"]) * np.sqrt(5), 1.0, atol=0.15)
    params = {k: leaf(*t.shape, seed=4) for k, t in params.items()}
    n = {k: np.asarray(t) for k, t in params.items()}
    hidden = np.maximum(np.asarray(obs) @ n["w1"] + n["b1"], 0)
    np.testing.assert_allclose(context(params, obs), hidden @ n["w2"] + n["b2"], atol=1e-4)
    alpha = leaf(7, 2, seed=6)
    a = np.asarray(alpha)
    expected = (a.mean() - 0.35) ** 2 + (a[:, 1].mean() - 0.7) ** 2
    np.testing.assert_allclose(penalty(alpha, 0.7), expected, rtol=1e-5)
    assert float(penalty(jnp.tile(jnp.asarray([[0.0, 0.7]]), (4, 1)), 0.7)) < 1e-12


def test_parameters_compose_what_outputs_cannot():
    """The paper's claim in small: a target in the space of weights, by context from few examples.

    The best combination of the outputs of the skills, fitted by least squares, stays far off.
    """
    goals = jnp.asarray([[0.5, 0.4, 0.6], [-0.4, 0.3, 1.2]])[jnp.asarray([0, 0, 1, 1])]
    obs = jnp.where(jnp.arange(4)[:, None] < 2, 1.0, -1.0)  # two contexts
    wanted = jnp.stack([model(merged(g), x) for g, x in zip(goals, X, strict=True)])
    adapter, adam = compose(SKILLS), optax.adam(2e-2)

    def loss(params):
        got = TUNED(PARAMS, adapter, X, ctx={"alpha": context(params, obs)})
        return jnp.mean((got - wanted) ** 2)

    def step(carry, _):
        params, state = carry
        value, g = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = adam.update(g, state)
        return (optax.apply_updates(params, updates), state), value

    start = init_context(jax.random.key(0), 1, 3, hidden=8)
    run = jax.jit(lambda p: jax.lax.scan(step, (p, adam.init(p)), None, length=400))
    (params, _), values = run(start)
    outputs = jnp.stack([TUNED(PARAMS, a, X) for a in SKILLS] + [model(PARAMS, X)], axis=-1)
    best = 0.0
    for part in (slice(0, 2), slice(2, 4)):  # even with weights of its own for each context
        a, b = np.asarray(outputs[part]).reshape(-1, 4), np.asarray(wanted[part]).reshape(-1)
        best += ((a @ np.linalg.lstsq(a, b, rcond=None)[0] - b) ** 2).sum() / wanted.size
    assert float(loss(params)) < 0.2 * best
    assert float(values[-1]) < 0.05 * float(values[0])


def test_mutation_one_alpha_for_all_rows(monkeypatch):
    plain = file.PSEC.apply

    def shared(self, x, w, p, ctx):
        return plain(self, x, w, p, {"alpha": jnp.mean(jnp.atleast_2d(ctx["alpha"]), axis=0)})

    monkeypatch.setattr(file.PSEC, "apply", shared)
    with pytest.raises(AssertionError):
        test_every_row_has_its_own_merged_weight()


def test_refusals():
    a = compose(SKILLS)
    with pytest.raises(ValueError, match="ctx has no 'alpha'"):
        TUNED(PARAMS, a, X)
    for shape in ((2,), (3, 3), (4, 3, 8, 3)):
        with pytest.raises(ValueError, match="PSEC: ctx"):
            TUNED(PARAMS, a, X, ctx={"alpha": jnp.ones(shape)})
    with pytest.raises(NotImplementedError, match="depends on x"):
        jl.merge(PARAMS, a)
