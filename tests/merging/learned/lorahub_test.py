"""LoraHub and its search: values, the flat start, what few examples find; CMA-ES on quadratics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.algebra import LowRank
from jlora.merging import gather
from jlora.merging.learned import cma
from jlora.merging.learned.coefficients import mixed, penalised
from jlora.merging.learned.lorahub import factor_mix, lorahub, lorahub_gradient


def leaf(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, jnp.float32)


PARAMS, X = {"w": leaf(6, 5)}, leaf(5, 6, seed=2)
TRUE = jnp.asarray([0.9, -0.6, 0.0, 0.0])


def model(p, x):
    return jnp.tanh(x @ p["w"])


TUNED = jl.lift(model)


def adapter(seed):
    a = jl.init(jax.random.key(seed), model, PARAMS, X, methods={"w": jl.LoRA(2)})
    new = jax.tree.map(lambda t: leaf(*t.shape, seed=seed + 10), a.trainable)
    return a.replace(trainable=new)


ADAPTERS = [adapter(k) for k in range(4)]


def loss(adapter, batch):
    x, y = batch
    return jnp.mean((TUNED(PARAMS, adapter, x) - y) ** 2)


def test_factor_mix_by_numpy_and_its_cross_terms():
    bank = gather(ADAPTERS).bank["w"]
    w = np.asarray(TRUE)
    u, v = (np.einsum("n,n...->...", w, np.asarray(t)) for t in bank)
    got = factor_mix(LowRank(*bank), TRUE)
    np.testing.assert_allclose(got.u @ got.v, u @ v, atol=1e-5)
    exact = np.einsum("n,nir,nro->io", w, *map(np.asarray, bank))
    assert np.abs(u @ v - exact).max() > 0.1


def test_objective_by_numpy():
    gathered = gather(ADAPTERS)
    value = penalised(loss, gathered, 0.05, factor_mix)(TRUE, (X, jnp.zeros((5, 5))))
    bank = gathered.bank["w"]
    u, v = (np.einsum("n,n...->...", np.asarray(TRUE), np.asarray(t)) for t in bank)
    y = np.tanh(np.asarray(X) @ (np.asarray(PARAMS["w"]) + u @ v))
    np.testing.assert_allclose(value, (y**2).mean() + 0.05 * 1.5 / 4, rtol=1e-5)


def test_factor_space_is_flat_where_the_paper_starts():
    gathered, data = gather(ADAPTERS), (X, leaf(5, 5, seed=4))
    slope = jax.grad(penalised(loss, gathered, 0.0, factor_mix))(jnp.zeros(4), data)
    assert np.all(np.asarray(slope) == 0)
    assert (
        np.abs(np.asarray(jax.grad(penalised(loss, gathered, 0.0))(jnp.zeros(4), data))).max() > 0
    )


@pytest.mark.parametrize("space", ["factors", "deltas"])
def test_five_examples_of_a_composed_task(space):
    """The paper's claim in small: better than the base, any one adapter, and their average."""
    fn = factor_mix if space == "factors" else jl.merging.exact.concat.concat
    gathered = gather(ADAPTERS)
    truth = jl.merge(PARAMS, mixed(gathered, TRUE, fn))
    unseen = leaf(200, 6, seed=7)
    data, held_out = ((x, model(truth, x)) for x in (X, unseen))
    search = jax.jit(lambda d, k: lorahub(loss, ADAPTERS, d, k, budget=480, space=space, l1=1e-4))
    found = search(data, jax.random.key(0))
    steps = jax.tree.map(lambda t: jnp.broadcast_to(t, (300, *t.shape)), data)
    descent = jax.jit(lambda b: lorahub_gradient(loss, ADAPTERS, b, space=space, l1=1e-4))(steps)
    rivals = [mixed(gathered, c, fn) for c in [jnp.zeros(4), jnp.full(4, 0.25), *jnp.eye(4)]]
    best = min(float(loss(a, held_out)) for a in rivals)
    assert float(loss(found.adapter, held_out)) < 0.3 * best
    assert float(loss(descent.adapter, held_out)) < 0.3 * best
    assert np.abs(np.asarray(found.coefficients)).max() <= 1.5
    assert found.adapter.sites[0][1].rank == (2 if space == "factors" else 8)


def test_search_keeps_the_best_it_has_seen():
    data = (X, leaf(5, 5, seed=4))
    out = lorahub(loss, ADAPTERS, data, jax.random.key(1))
    assert out.values.shape == (40 // cma.population(4),)
    objective = penalised(loss, gather(ADAPTERS), 0.05, factor_mix)
    value = float(objective(out.coefficients, data))
    assert value < 0.95 * float(objective(jnp.zeros(4), data))
    np.testing.assert_allclose(value, float(out.values.min()), rtol=1e-5)


def test_descent_by_numpy():
    """One step of Adam is the rate against the sign of the slope, cut to the bound; then the value.

    The slope is that of differences of the objective in float64, by dense matrices.
    """
    bank, y = gather(ADAPTERS).bank["w"], np.asarray(leaf(5, 5, seed=4), "f8")
    x, w, deltas = (np.asarray(t, "f8") for t in (X, PARAMS["w"], bank.u @ bank.v))

    def objective(c):
        out = np.tanh(x @ (w + np.einsum("n,nio->io", c, deltas)))
        return ((out - y) ** 2).mean() + 0.7 * np.abs(c).mean()

    c = np.full(4, 0.25)
    slope = [(objective(c + h) - objective(c - h)) / 2e-5 for h in 1e-5 * np.eye(4)]
    data = jax.tree.map(lambda t: jnp.broadcast_to(t, (2, *t.shape)), (X, leaf(5, 5, seed=4)))
    one = jax.tree.map(lambda t: t[:1], data)
    options = {"l1": 0.7, "rate": 0.1}
    got = lorahub_gradient(loss, ADAPTERS, one, **options).coefficients
    np.testing.assert_allclose(got, c - 0.1 * np.sign(slope), atol=1e-4)
    assert len(set(np.sign(slope))) == 2  # one grows, one falls
    np.testing.assert_allclose(
        lorahub_gradient(loss, ADAPTERS, data, **options).values,
        [objective(c), objective(c - 0.1 * np.sign(slope))], rtol=1e-4)  # fmt: skip
    bounded = lorahub_gradient(loss, ADAPTERS, one, bound=0.3, **options).coefficients
    np.testing.assert_allclose(bounded, np.clip(c - 0.1 * np.sign(slope), -0.3, 0.3), atol=1e-4)


def rotated(n=5, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    h = jnp.asarray(q @ np.diag(np.logspace(0, 3, n)) @ q.T, jnp.float32)
    centre = jnp.linspace(-0.5, 0.5, n)
    return lambda x: jnp.sum((x - centre) * (h @ (x - centre))), centre


def test_cma_finds_the_bottom_of_a_narrow_valley():
    f, centre = rotated()
    run = jax.jit(lambda k: cma.minimise(f, jnp.ones(5), k, generations=250))
    found = run(jax.random.key(0))
    np.testing.assert_allclose(found.best, centre, atol=1e-2)
    assert float(found.value) < 1e-3 and np.isfinite(np.asarray(found.values)).all()
    again = run(jax.random.key(0))
    np.testing.assert_array_equal(found.best, again.best)


def test_cma_by_numpy_in_one_dimension():
    """Six generations of the tutorial's algorithm, without negative weights; draws from the key."""
    key, n, size, mu = jax.random.key(3), 1, 4, 2
    w = np.log(mu + 0.5) - np.log([1, 2])
    w = w / w.sum()
    eff = 1 / (w**2).sum()
    cc, cs = (4 + eff / n) / (n + 4 + 2 * eff / n), (eff + 2) / (n + eff + 5)
    c1 = 2 / ((n + 1.3) ** 2 + eff)
    cmu = min(1 - c1, 2 * (eff - 2 + 1 / eff) / ((n + 2) ** 2 + eff))
    damp = 1 + 2 * max(0, np.sqrt((eff - 1) / (n + 1)) - 1) + cs
    chi = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
    mean, s, c, ps, pc, values = 0.3, 0.5, 1.0, 0.0, 0.0, []

    def score(x):
        inside = np.clip(x, -1, 1)
        return (inside - 3) ** 2 + np.sin(4 * inside) + (x - inside) ** 2

    for at in range(6):
        z = np.asarray(jax.random.normal(jax.random.fold_in(key, at), (size, 1)), "f8")[:, 0]
        y = np.sqrt(c) * z
        order = np.argsort(score(mean + s * y))
        values.append(score(mean + s * y)[order[0]])
        y = y[order[:mu]]
        move = w @ y
        ps = (1 - cs) * ps + np.sqrt(cs * (2 - cs) * eff) * move / np.sqrt(c)
        going = abs(ps) / np.sqrt(1 - (1 - cs) ** (2 * (at + 1))) < (1.4 + 2 / (n + 1)) * chi
        pc = (1 - cc) * pc + going * np.sqrt(cc * (2 - cc) * eff) * move
        lost = c1 * (1 - going) * cc * (2 - cc)
        c = (1 - c1 - cmu + lost) * c + c1 * pc**2 + cmu * w @ y**2
        mean, s = mean + s * move, s * np.exp(min(1, cs / damp * (abs(ps) / chi - 1)))

    def f(x):
        return jnp.sum((x - 3) ** 2 + jnp.sin(4 * x))

    run = jax.jit(lambda x: cma.minimise(f, x, key, generations=6, bound=1.0))
    found = run(jnp.asarray([0.3]))
    np.testing.assert_allclose(found.values, values, rtol=1e-4)
    np.testing.assert_allclose(found.value, min(values), rtol=1e-4)


def test_cma_judges_what_is_outside_by_its_squared_distance():
    """Of a flat function, the first generation's best is the sample closest to the box."""
    key = jax.random.key(1)
    x = np.asarray(jax.random.normal(jax.random.fold_in(key, 0), (cma.population(3), 3)))
    far = (np.maximum(np.abs(x) - 0.1, 0) ** 2).sum(1)
    found = cma.minimise(lambda x: 0 * x[0], jnp.zeros(3), key, generations=1, sigma=1.0, bound=0.1)
    np.testing.assert_allclose(found.values, [far.min()], rtol=1e-4)
    assert np.abs(np.asarray(found.best)).max() <= 0.1 and float(found.value) == 0


def test_cma_stays_inside_and_finds_the_corner():
    def f(x):
        return jnp.sum((x - 3.0) ** 2)

    found = jax.jit(lambda k: cma.minimise(f, jnp.zeros(3), k, generations=80, bound=1.5))(
        jax.random.key(0)
    )
    np.testing.assert_allclose(found.best, 1.5, atol=2e-2)
    np.testing.assert_allclose(found.value, 3 * 1.5**2, rtol=5e-2)


def test_mutation_a_search_that_prefers_the_worst():
    f, centre = rotated()
    found = jax.jit(lambda k: cma.minimise(lambda x: -f(x), jnp.ones(5), k, generations=60))(
        jax.random.key(0)
    )
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found.best, centre, atol=1e-2)


def test_refusals():
    data = (X, leaf(5, 5, seed=4))
    with pytest.raises(ValueError, match="space: got 'rows'"):
        lorahub(loss, ADAPTERS, data, jax.random.key(0), space="rows")
    with pytest.raises(ValueError, match="generations, sigma, bound: got 0"):
        cma.minimise(jnp.sum, jnp.zeros(2), jax.random.key(0), generations=0)
