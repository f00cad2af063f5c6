"""DiffoRA: gradients by central differences under each reading; a planted module is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora.schedules import diffora, flexora, ranks

RNG = np.random.default_rng(0)
X, V = (jnp.asarray(RNG.normal(size=(16, 4)), jnp.float32) for _ in range(2))
draw = lambda *shape: jnp.asarray(RNG.normal(size=shape) / 2, jnp.float32)  # noqa: E731
PARAMS = {"layers": {"p": draw(2, 4, 4), "q": draw(2, 4, 4)}, "top": draw(4, 4)}
RATE, GAMMA = 0.3, np.asarray([0.3, -0.2, 0.5, 0.1, -0.4])
PLACES = {"layers/p": (0, 1), "layers/q": (2, 3), "top": 4}


def apply(p, x):
    def step(h, w):
        return jnp.tanh(h @ w["p"]) @ w["q"] + h, None

    return jax.lax.scan(step, x, p["layers"])[0] @ p["top"]


# only the second layer's q has to change
WANT = PARAMS | {"layers": PARAMS["layers"] | {
    "q": PARAMS["layers"]["q"].at[1].add(jnp.outer(X[0], X[1]))}}  # fmt: skip


def loss(adapter, x):
    as_x = lambda tree: jax.tree.map(lambda t: t.astype(x.dtype), tree)  # noqa: E731
    return jnp.mean((jl.lift(apply)(as_x(PARAMS), adapter, x) - apply(as_x(WANT), x)) ** 2)


def training(a):
    return loss(a, X.astype(a.trainable["top"]["a"].dtype))


def validation(a):
    return loss(a, V.astype(a.trainable["top"]["a"].dtype))


@pytest.fixture(scope="module")
def fresh():
    return jl.init(jax.random.key(0), apply, PARAMS, X, methods={".*": jl.LoRA(2, 2.0)})


@pytest.fixture(scope="module")
def adapter(fresh):
    return fresh.replace(trainable=jax.tree.map(lambda t: draw(*t.shape), fresh.trainable))


def by_differences(adapter, relaxation, rate, step=1e-5):
    """The gradient of gamma by central differences of a step written out."""

    @jax.jit
    def after(gamma):
        if relaxation == "sigmoid":
            w = 1 / (1 + jnp.exp(-gamma))
        else:
            w = 5 * jnp.exp(gamma) / jnp.exp(gamma).sum()
        own = {"layers/p": w[:2], "layers/q": w[2:4], "top": w[4]}
        frozen = {p: {"scale": adapter.frozen[p]["scale"] * own[p]} for p in own}
        shown = adapter.replace(frozen=frozen)
        slopes = jax.grad(lambda t: training(shown.replace(trainable=t)))(adapter.trainable)
        moved = jax.tree.map(lambda t, g: t - rate * g, adapter.trainable, slopes)
        return validation(shown.replace(trainable=moved))

    return [float(after(GAMMA + e) - after(GAMMA - e)) / (2 * step) for e in step * np.eye(5)]


def check(adapter, relaxation, unrolled, slope=diffora.slope):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda t: jnp.asarray(np.asarray(t, "f8")), adapter)
        inner = {"training": training, "rate": RATE} if unrolled else {}
        run = jax.jit(lambda g: slope(g, wide, PLACES, validation, relaxation=relaxation, **inner))
        want = by_differences(wide, relaxation, RATE if unrolled else 0.0)
        np.testing.assert_allclose(run(jnp.asarray(GAMMA)), want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("relaxation", "unrolled"), [("sigmoid", True), ("softmax", False)])
def test_gradients(adapter, relaxation, unrolled):
    assert diffora.modules(adapter) == PLACES
    check(adapter, relaxation, unrolled)


def test_mutation_one_relaxation_is_not_the_other(adapter):
    def other(gamma, adapter, places, validation, relaxation):
        del relaxation
        return diffora.slope(gamma, adapter, places, validation, relaxation="sigmoid")

    with pytest.raises(AssertionError):
        check(adapter, "softmax", False, other)


def test_ones_are_lora_and_zeros_are_the_base(adapter):
    same = diffora.weighted(adapter, jnp.ones(5), PLACES)
    jax.tree.map(np.testing.assert_array_equal, same.frozen, adapter.frozen)
    np.testing.assert_allclose(diffora.matrix(jnp.full(5, 30.0)), 1.0)
    np.testing.assert_allclose(diffora.matrix(jnp.zeros(5), "softmax"), 1.0)
    none = jl.delta(PARAMS, diffora.weighted(adapter, jnp.zeros(5), PLACES))
    assert not any(np.asarray(d).any() for d in none.values())
    one = jl.delta(PARAMS, diffora.weighted(adapter, jnp.eye(5)[3], PLACES))
    want = jl.delta(PARAMS, adapter)["layers/q"]
    np.testing.assert_allclose(one["layers/q"], want.at[0].set(0.0), atol=1e-6)
    assert not np.asarray(one["layers/p"]).any() and not np.asarray(one["top"]).any()


@pytest.fixture(scope="module")
def searched(fresh):
    """Alternating steps, first order, both relaxations: (adapter, gamma) of each."""
    rule = optax.adam(0.03)

    def run(relaxation):
        def step(carry, _):
            t, moments, state = carry
            a = fresh.replace(trainable=t)
            g = diffora.slope(state.alpha, a, PLACES, validation, relaxation=relaxation)
            state = flexora.advance(state, g, 0.1)
            w = diffora.matrix(state.alpha, relaxation)

            def seen(t):
                return training(diffora.weighted(a.replace(trainable=t), w, PLACES))

            with jax.numpy_dtype_promotion("standard"):  # adam: float to an integer power
                updates, moments = rule.update(jax.grad(seen)(t), moments)
            return (optax.apply_updates(t, updates), moments, state), None

        start = fresh.trainable, rule.init(fresh.trainable), diffora.begin(PLACES)
        t, _, state = jax.lax.scan(step, start, None, length=60)[0]
        return t, state.alpha

    return {r: jax.jit(run, static_argnums=0)(r) for r in ("sigmoid", "softmax")}


@pytest.mark.parametrize(("relaxation", "k"), [("sigmoid", 2), ("softmax", 1)])
def test_a_planted_module_is_kept(searched, fresh, relaxation, k):
    """Of those that compete it is the first; weights on their own also serve `top` after it."""
    trained, gamma = searched[relaxation]
    assert bool(flexora.select(gamma, k)[3]), gamma
    a = fresh.replace(trainable=trained)
    small = diffora.discretised(a, gamma, k, PLACES)
    assert [s.path for s, _ in small.sites] == ["layers/q", "top"][:k]
    shared = jl.delta(PARAMS, a)["layers/q"]
    np.testing.assert_allclose(
        jl.delta(PARAMS, small)["layers/q"], shared.at[0].set(0.0), atol=1e-5
    )
    restarted = diffora.discretised(a, gamma, k, PLACES, fresh)
    assert not np.asarray(jl.delta(PARAMS, restarted)["layers/q"]).any()
    kept = ranks.kept(flexora.masks(fresh, flexora.select(gamma, 3), PLACES))
    assert int(kept) == 3 * 2


def test_refusals(adapter):
    with pytest.raises(ValueError, match="relaxation: got 'hard', expected 'sigmoid' or 'softmax'"):
        diffora.matrix(jnp.zeros(3), "hard")
    with pytest.raises(ValueError, match=r"k: got 6, expected in 1\.\.5"):
        diffora.discretised(adapter, jnp.zeros(5), 6, PLACES)
    with pytest.raises(ValueError, match=r"places: got \[0, 2\], expected 0 to 1"):
        diffora.begin({"a": 0, "b": 2})
    (site, method), *_ = adapter.sites
    deep = jl.Site("w", (2, 2, 4, 4), "ssio", site.dtype)
    with pytest.raises(ValueError, match=r"w: got the stack \(2, 2\), expected at most one axis"):
        diffora.modules(adapter.replace(sites=((deep, method),)))
