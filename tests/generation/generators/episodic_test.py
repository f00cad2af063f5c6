"""The episodic discriminant against float64 NumPy; Fisher's limit; order, classes, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.contracts import generator, tiny
from jlora.generation.generators import discriminant, episodic
from jlora.generation.generators.episodic import EpisodicConfig

KEY = jax.random.key(0)
CONFIG = EpisodicConfig(site="layers", shrinkage=0.7, ridge=0.4, gain=2.0)
C, K = 3, 4
LABELS = np.repeat(np.arange(C), K)
ONES = np.ones(C * K, "f4")


def texts(seed=0, n=60):
    """Features of texts around a mean that is not zero, and their classes."""
    rng = np.random.default_rng(seed)
    groups = np.arange(n) % 5
    centres = 2 * rng.normal(size=(5, 6))
    rows = 1.0 + centres[groups] + rng.normal(size=(n, 6)) @ rng.normal(size=(6, 6)) / 2
    return rows.astype("f4"), groups


@functools.cache
def fitted():
    """A state with a shared adapter of rank 2, and the examples of one task."""
    at = generator.world(jl.LoRA(2 + C, alpha=6.0), width=6 * C * K)
    heads = np.linalg.qr(np.random.default_rng(1).normal(size=(6, C)))[0].T.astype("f4")
    state = episodic.fit(
        KEY, at.conditions, at.groups, at.bank, jnp.asarray(heads), CONFIG, at.bank[0],
        episodic.statistics(*texts()),
    )  # fmt: skip
    rng = np.random.default_rng(2)
    x = (1 + rng.normal(size=(C, 1, 6)) + 0.5 * rng.normal(size=(C, K, 6))).reshape(-1, 6)
    return state, x.astype("f4"), heads


def scores(x, y, heads, ridge=0.4):
    """(W, x-bar, what is added per feature) in float64, straight from the primal equations."""
    rows, groups = texts()
    rest = np.concatenate([rows[groups == g] - rows[groups == g].mean(0) for g in range(5)])
    within = rest.astype("f8").T @ rest / len(rest)
    metric = np.linalg.inv(within + 0.7 * np.trace(within) / 6 * np.eye(6))
    centre = np.mean([x[y == c].astype("f8").mean(0) for c in range(C)], 0)
    z, target = x - centre, np.eye(C)[y] - 1 / C
    tau = np.trace(z @ metric @ z.T) / len(z)
    # (X^T X + lambda tau P^-1)^-1 X^T Y is the dual solution written with features.
    w = np.linalg.solve(z.T @ z + ridge * tau * np.linalg.inv(metric), z.T @ target)
    nu = np.sqrt(np.trace(w.T @ within @ w) / (C - 1))
    return 2.0 / nu * w, centre, metric


def added(adapter, theta, f):
    """What the ranks of the task add to the outputs of the last matrix, in float64."""

    def product(one):
        own, _ = one.arrays(next(s for s, _ in one.sites if s.path == "layers"))
        a, b, scale = (np.asarray(own[k], "f8")[-1] for k in ("a", "b", "scale"))
        return a, b * scale

    (a, b), (old_a, old_b) = product(adapter), product(theta)
    np.testing.assert_array_equal(a[:, :-C], old_a[:, :-C])  # theta's ranks are left as they are
    np.testing.assert_array_equal(b[:-C], old_b[:-C])
    return f @ a[:, -C:] @ b[-C:]


def on_the_plane(x):
    """Features at which the constant column is exactly one."""
    mu = texts()[0].astype("f8").mean(0)
    return x * (mu @ mu / (x @ mu))[:, None]


def make(state, x, y=LABELS, used=ONES, heads=None):
    """The adapter of examples in any order."""
    heads = state.heads if heads is None else jnp.asarray(heads)
    a, b = SOLVE(state.learned, state.statistics, jnp.asarray(x), jnp.asarray(y), used, heads)
    return episodic.appended(state.template, state.learned.shared, "layers", a, b)


SOLVE = jax.jit(episodic.solution)


def test_the_solution_among_examples_is_the_ridge_regression_of_features_as_an_adapter():
    state, x, heads = fitted()
    f = on_the_plane(texts(3)[0].astype("f8"))
    w, centre, _ = scores(x, LABELS, heads)
    want = (f - centre) @ w
    made = jax.jit(episodic.generate)(KEY, state, jnp.asarray(x).reshape(-1))
    got = added(made, state.template, f) @ heads.T.astype("f8")
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
    assert len(np.unique(want.argmax(1))) == C
    # Mutations: a mean that is not taken off, and a ridge that is forgotten, would be seen.
    assert np.abs(got - f @ w).max() > 0.1
    assert np.abs(got - (f - centre) @ scores(x, LABELS, heads, 1e-6)[0]).max() > 0.1


def test_a_large_ridge_is_fishers_discriminant():
    state, x, heads = fitted()
    learned = dataclasses.replace(state.learned, log_ridge=jnp.float32(np.log(1e5)))
    a, _ = SOLVE(learned, state.statistics, jnp.asarray(x), jnp.asarray(LABELS), ONES, state.heads)
    _, _, metric = scores(x, LABELS, heads)
    means = np.stack([x[LABELS == c].mean(0) for c in range(C)]).astype("f8")
    want = metric @ (means - means.mean(0)).T @ discriminant.contrasts(C)
    got = np.asarray(a[:, : C - 1], "f8")
    np.testing.assert_allclose(got / np.linalg.norm(got), want / np.linalg.norm(want), atol=1e-4)
    near, _ = SOLVE(
        state.learned, state.statistics, jnp.asarray(x), jnp.asarray(LABELS), ONES, state.heads
    )
    near = np.asarray(near[:, : C - 1], "f8")
    assert np.abs(near / np.linalg.norm(near) - want / np.linalg.norm(want)).max() > 1e-2


def test_order_does_not_matter_classes_are_exchangeable_and_rows_can_be_left_out():
    state, x, heads = fitted()
    f, turn = texts(4)[0], np.random.default_rng(3).permutation(len(x))
    want = added(make(state, x), state.template, f)
    other = added(make(state, x[turn], LABELS[turn]), state.template, f)
    np.testing.assert_allclose(other, want, atol=1e-4)
    renamed = (LABELS + 1) % C
    same = make(state, x, renamed, heads=np.roll(heads, 1, axis=0))
    np.testing.assert_allclose(added(same, state.template, f), want, rtol=1e-3, atol=1e-3)
    assert np.abs(added(make(state, x, renamed), state.template, f) - want).max() > 0.1
    junk, kept = x.copy(), (np.arange(len(x)) % K < 2).astype("f4")
    junk[kept == 0] = 7.0
    fewer = added(make(state, junk, used=kept), state.template, f)
    np.testing.assert_allclose(
        fewer, added(make(state, x, used=kept), state.template, f), rtol=1e-4, atol=1e-4
    )
    assert np.abs(fewer - want).max() > 0.1


def test_without_examples_and_with_equal_classes_theta_is_left():
    state, x, _ = fitted()
    none = make(state, x, used=np.zeros(len(x), "f4"))
    assert np.abs(added(none, state.template, texts()[0])).max() == 0
    same = make(state, np.tile(x[:K], (C, 1)))
    assert np.abs(added(same, state.template, texts()[0])).max() == 0


def test_shuffled_labels_say_nothing_of_the_classes():
    """A control: scores of the classes' own texts are right with labels and not without."""
    state, x, heads = fitted()
    x = x + 3 * np.repeat(np.eye(6, dtype="f4")[:C], K, axis=0)
    f = x.astype("f8")
    right = added(make(state, x), state.template, f) @ heads.T
    assert (right.argmax(1) == LABELS).mean() > 0.9
    moved = np.tile(np.arange(C), K)  # as many examples of every class in every group
    wrong = added(make(state, x, moved), state.template, f) @ heads.T
    assert (wrong.argmax(1) == LABELS).mean() < 0.7


def features(theta, z):
    """f of a model whose first matrix feeds the adapted ones."""
    return jl.lift(lambda p, t: jnp.tanh(t @ p["first"]), unread="allow")(tiny.params(), theta, z)


def test_the_gradient_reaches_theta_through_the_examples_alone():
    """Query logits that do not read theta leave the path through the solution."""
    at = generator.world(jl.LoRA(2 + 2, alpha=4.0), width=24)
    rng = np.random.default_rng(5)
    rows = tiny.params()["first"].shape
    one, m = at.bank[0], rows[1]
    heads = jnp.asarray(rng.normal(size=(2, tiny.params()["layers"].shape[-1])), jnp.float32)
    inputs = jnp.asarray(rng.normal(size=(8, rows[0])), jnp.float32)
    f = np.asarray(features(one, inputs))
    stats = episodic.statistics(f + rng.normal(size=f.shape).astype("f4"), np.arange(8) % 2)
    conditions = jnp.zeros((8, 2 * m), jnp.float32)
    state = episodic.fit(KEY, conditions, at.groups, at.bank, heads, CONFIG, one, stats)
    episode = episodic.Episode(
        inputs, jnp.arange(8) % 2, jnp.ones(8), jnp.asarray(f[::-1].copy()), jnp.arange(8) % 2,
        heads,
    )  # fmt: skip

    def logits(made, queries, heads):
        own, _ = made.arrays(next(s for s, _ in made.sites if s.path == "layers"))
        return queries @ own["a"][-1][:, -2:] @ own["b"][-1][-2:] @ heads.T

    value = jax.jit(
        jax.value_and_grad(lambda t: episodic.loss(t, state, episode, features, logits))
    )
    before, slope = value(state.learned)
    for name in ("log_shrinkage", "log_ridge", "log_gain"):
        assert np.isfinite(getattr(slope, name)) and float(getattr(slope, name)) != 0
    leaf = slope.shared["first"]["b"]
    assert float(jnp.abs(leaf).max()) > 1e-6
    # The slope is that of a finite difference along itself.
    size = 1e-2 / float(jnp.linalg.norm(leaf))
    moved = jax.tree.map(lambda x: x, state.learned.shared)
    moved["first"]["b"] = moved["first"]["b"] - size * leaf
    after, _ = value(dataclasses.replace(state.learned, shared=moved))
    want = -size * float(jnp.sum(leaf**2))
    assert float(after - before) == pytest.approx(want, rel=0.2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"config": EpisodicConfig(site="up")}, "site: got 'up', expected one of"),
        ({"heads": jnp.ones((4, 6))}, r"heads: got shape \(4, 6\), expected .* rank 3"),
        ({"heads": jnp.ones((3, 6))}, r"conditions: got width 12, expected C K m = 3 K 6"),
    ],
)
def test_what_it_cannot_be_fitted_on_is_an_error(change, match):
    at = generator.world(jl.LoRA(3, freeze_a=True), width=12)
    given = {"heads": jnp.ones((2, 6)), "config": CONFIG} | change
    with pytest.raises(ValueError, match=match):
        episodic.fit(KEY, at.conditions, at.groups, at.bank, **given)


@pytest.mark.parametrize("rows", [np.ones((3, 2)) * np.nan, np.ones(3), np.ones((2, 2))])
def test_statistics_of_something_else_are_an_error(rows):
    with pytest.raises(ValueError, match="features: got shapes"):
        episodic.statistics(rows, np.zeros(3, int))
