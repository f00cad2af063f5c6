"""IncreLoRA: scores by numpy, growth to the budget, late ranks against an Adam of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora.schedules import increlora, ranks
from jlora.schedules.increlora import Growth

X = jnp.ones((2, 6))
PARAMS = {"v": jnp.zeros((6, 4)), "w": jnp.zeros((6, 4))}
PLAN = Growth(target=5, top=1, warmup=1, interval=2)


def apply(p, x):
    return x @ p["v"] + x @ p["w"]


@pytest.fixture(scope="module")
def adapter():
    a = jl.init(jax.random.key(0), apply, PARAMS, X, methods={"w|v": jl.AdaLoRA(4, 2.0)})
    return a.replace(trainable=draw(a.trainable, 1))


def draw(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda t: jnp.asarray(rng.normal(size=t.shape), t.dtype), tree)


def numbers(adapter, path):
    return {n: np.asarray(t, "f8") for n, t in adapter.trainable[path].items()}


def delta(p, n, reserve=0):
    """2 / n A diag(e) B of the first n ranks, and of a reserve at 1e-5."""
    e = np.where(np.arange(4) < n, p["e"], np.where(np.arange(4) < n + reserve, 1e-5, 0))
    return 2.0 / (n + 1e-5) * p["a"] @ np.diag(e) @ p["b"]


def check_scores(adapter, grow):
    """Two steps of both scores, by numpy."""
    for dense in (None, {p: draw(PARAMS["w"], 7) for p in PARAMS}):
        state, sens, unc = increlora.start(adapter, PLAN), 0.0, 0.0
        for seed in (2, 3):
            g = draw(adapter.trainable, seed)
            state, _ = grow(state, adapter, g, PLAN, dense)
            p = numbers(adapter, "w")
            score = abs(p["e"][0] * float(g["w"]["e"][0]))
            if dense:
                score = np.abs(delta(p, 1) * np.asarray(dense["w"], "f8")).sum()
            sens = 0.85 * sens + 0.15 * score / np.sqrt(24)
            unc = 0.85 * unc + 0.15 * abs(score / np.sqrt(24) - sens)
        np.testing.assert_allclose(state.sensitivity["w"], sens, rtol=1e-4)
        np.testing.assert_allclose(state.uncertainty["w"], unc, rtol=1e-4)


def test_scores(adapter):
    check_scores(adapter, increlora.grow)


def test_mutation_other_smoothing_is_seen(adapter):
    other = Growth(target=5, top=1, warmup=1, interval=2, beta1=0.5)
    with pytest.raises(AssertionError):
        check_scores(adapter, lambda s, a, g, plan, dense: increlora.grow(s, a, g, other, dense))


@functools.partial(jax.jit, static_argnums=3)
def grown(state, adapter, g, plan):
    return increlora.grow(state, adapter, g, plan)


def test_growth_goes_where_it_is_needed_and_stops_at_the_budget(adapter):
    state, counts = increlora.start(adapter, PLAN), []
    for number in range(12):
        g = draw(adapter.trainable, number)
        g = {"v": jax.tree.map(lambda t: 0.01 * t, g["v"]), "w": g["w"]}
        state, adapter = grown(state, adapter, g, PLAN)
        counts.append((int(state.active["v"]), int(state.active["w"])))
    assert counts[:7] == [(1, 1), (1, 1), (1, 2), (1, 2), (1, 3), (1, 3), (1, 4)]
    assert counts[7:] == [(1, 4)] * 5 and int(increlora.total(state)) == 5
    near, live = increlora.trained(state, PLAN), increlora.masks(state)
    assert all((near[p] == live[p]).all() for p in PARAMS)  # no reserve any more
    small, _ = ranks.shrink(increlora.mask(adapter, live, PLAN), (), live)
    found, want = jl.delta(PARAMS, small), jl.delta(PARAMS, increlora.shown(adapter, state, PLAN))
    for p in PARAMS:
        np.testing.assert_allclose(found[p], want[p], atol=1e-5)


def test_what_is_shown_and_that_a_reserve_changes_nearly_nothing(adapter):
    state = increlora.start(adapter, PLAN)
    found = jl.delta(PARAMS, increlora.shown(adapter, state, PLAN))
    p = numbers(adapter, "w")
    np.testing.assert_allclose(found["w"], delta(p, 1, reserve=1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["w"], delta(p, 1), atol=1e-3)
    plan = Growth(target=8, top=2, warmup=0, interval=1, rescale=False)
    state = increlora.start(adapter, plan)._replace(step=jnp.int32(0))
    before = jl.delta(PARAMS, increlora.shown(adapter, state, plan))
    state, after = increlora.grow(state, adapter, draw(adapter.trainable, 2), plan)
    assert int(increlora.total(state)) == 4 and float(
        after.trainable["w"]["e"][1]
    ) == pytest.approx(1e-5)
    found = jl.delta(PARAMS, increlora.shown(after, state, plan))
    np.testing.assert_allclose(found["w"], before["w"], atol=1e-3)

    def loss(t):
        shown = increlora.shown(after.replace(trainable=t), state, plan)
        return sum(jnp.sum(jnp.sin(d)) for d in jl.delta(PARAMS, shown).values())

    g = jax.grad(loss)(after.trainable)["w"]
    assert (np.asarray(g["e"]) != 0).tolist() == [True, True, False, False]
    assert (np.abs(np.asarray(g["a"])).sum(0) > 0).tolist() == [True, True, True, False]


def late(adapter, plan, count=6):
    """Updates of `late_adam`, and gradients, with growth at steps 2 and 4."""
    rule, state = increlora.late_adam(0.1, plan), increlora.start(adapter, plan)
    moments, out = rule.init(adapter.trainable), []
    for number in range(count):
        g = draw(adapter.trainable, number)
        near = increlora.trained(state, plan)
        g = {p: {n: jnp.where(ranks.along(near[p], t, -2 if n == "b" else -1), t, 0)
                 for n, t in own.items()} for p, own in g.items()}  # fmt: skip
        u, moments = rule.update(g, moments, adapter.trainable, growth=state)
        out.append((u, g))
        state, adapter = grown(state, adapter, g, plan)
    return out, state


def check_late(adapter, plan, by_age):
    """Column of a late rank against an Adam that begins when it does, its rate rising."""
    out, state = late(adapter, plan)
    path = "w" if int(state.active["w"]) > 1 else "v"
    rank = 2  # the reserve of the first growth, trained from step 3 on
    rule, own = optax.scale_by_adam(), None
    for number, (u, g) in enumerate(out):
        column = g[path]["a"][:, rank]
        if number < 3:
            assert not np.asarray(u[path]["a"][:, rank]).any()
            continue
        own = rule.init(column) if own is None else own
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            want, own = rule.update(column, own)
        rise = min(1.0, (number - 2) / plan.late) if by_age else 1.0
        np.testing.assert_allclose(u[path]["a"][:, rank], -0.1 * rise * want, rtol=1e-4, atol=1e-6)


def test_late_ranks_are_moved_by_an_adam_of_their_own(adapter):
    plan = Growth(target=6, top=1, warmup=1, interval=2, late=2)
    check_late(adapter, plan, by_age=True)
    with pytest.raises(AssertionError):  # mutation: a rate that does not rise
        check_late(adapter, plan, by_age=False)


def test_refusals(adapter):
    with pytest.raises(ValueError, match=r"Growth: got .*expected positive numbers"):
        Growth(target=5, by=0)
    for target in (1, 9):
        with pytest.raises(ValueError, match=rf"target: got {target}, expected 2 plus"):
            increlora.start(adapter, Growth(target=target))
    with pytest.raises(ValueError, match=r"[vw]: got AdaLoRA\(.*, expected AdaLoRA of rank >= 5"):
        increlora.start(adapter, Growth(target=8, first=4))
