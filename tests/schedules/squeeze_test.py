"""LoRA-Squeeze: spectra by numpy, moments by gradients, annealing in training."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora.schedules import squeeze as file
from jlora.schedules.squeeze import anneal, project, schedule, squeeze


def leaf(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"w": leaf(7, 5), "wide": leaf(3, 9, seed=1)}


def apply(p, x):
    return x @ p["w"], x[..., :3] @ p["wide"]


def adapter(rank=4, seed=0, **options):
    a = jl.init(jax.random.key(seed), apply, PARAMS, leaf(2, 7), methods={
        "w|wide": jl.LoRA(rank, 2.0 * rank, **options)})  # fmt: skip
    return a.replace(trainable=jax.tree.map(lambda t: t + leaf(*t.shape, seed=9), a.trainable))


def product(a, path="w"):
    t = a.trainable[path]
    return np.asarray(t["a"], "f8") @ np.asarray(t["b"], "f8")


@pytest.mark.parametrize("path", ["w", "wide"])
def test_error_is_the_tail_of_the_spectrum(path):
    """Eckart and Young by numpy's dense SVD, also where R is larger than d_in."""
    before = adapter()
    for rank in (1, 2, 4):
        after, maps, errors = squeeze(before, rank)
        u, s, v = np.linalg.svd(product(before, path), full_matrices=False)
        best = u[:, :rank] * s[:rank] @ v[:rank]
        np.testing.assert_allclose(product(after, path), best, atol=1e-4)
        tail = 2.0 * np.sqrt((s[rank:] ** 2).sum())
        np.testing.assert_allclose(errors[path], tail, rtol=1e-4, atol=1e-4)
        made = jl.delta(PARAMS, after)[path] - jl.delta(PARAMS, before)[path]
        np.testing.assert_allclose(np.linalg.norm(made), tail, rtol=1e-3, atol=1e-4)
        t, now = before.trainable[path], after.trainable[path]
        np.testing.assert_allclose(t["a"] @ maps[path].into, now["a"], atol=1e-4)
        np.testing.assert_allclose(maps[path].onto @ t["b"], now["b"], atol=1e-4)


def test_scale_is_kept_and_alpha_moves():
    after = squeeze(adapter(), 2).adapter
    assert float(after.frozen["w"]["scale"]) == 2.0
    assert after.sites[0][1].rank == 2 and after.sites[0][1].alpha == 4.0
    plain = squeeze(adapter(rslora=True), 1).adapter.sites[0][1]
    np.testing.assert_allclose(plain.alpha / np.sqrt(plain.rank), 8.0 / np.sqrt(4))


def test_the_error_of_a_negative_scale_is_positive():
    a = adapter()
    turned = a.replace(frozen=jax.tree.map(lambda t: -t, a.frozen))
    chex.assert_trees_all_equal(squeeze(turned, 2).errors, squeeze(a, 2).errors)


def test_first_moments_follow_exactly_where_nothing_is_lost():
    """The gradient after a lossless compression is the projected gradient before."""
    before = adapter()
    low = jax.tree.map(
        lambda t: t.at[..., 2:].set(0.0) if t.shape[-1] == 4 else t, before.trainable
    )
    mixing = leaf(4, 4, seed=3)
    low = {k: {"a": t["a"] @ mixing, "b": jnp.linalg.inv(mixing) @ t["b"]} for k, t in low.items()}
    before = before.replace(trainable=low)
    after, maps, errors = squeeze(before, 2)
    assert all(float(e) < 1e-3 for e in errors.values())

    def loss(t, a):
        return sum(
            jnp.sum(jnp.sin(y)) for y in jl.lift(apply)(PARAMS, a.replace(trainable=t), leaf(6, 7))
        )

    slopes = [jax.grad(loss)(a.trainable, a) for a in (before, after)]
    state = optax.trace(0.9).init(before.trainable)._replace(trace=slopes[0])
    moved = project(state, maps, before.trainable).trace
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-3), moved, slopes[1]
    )


def test_second_moments_are_those_of_independent_entries():
    """E[(g P'^T)^2] for g with independent entries of variance n, by simulation."""
    before = adapter()
    _, maps, _ = squeeze(before, 2)
    var = jax.tree.map(lambda t: jnp.abs(leaf(*t.shape, seed=4)), before.trainable)
    state = optax.scale_by_adam().init(before.trainable)._replace(nu=var)
    moved = project((optax.EmptyState(), [state]), maps, before.trainable)[1][0]
    rng = np.random.default_rng(0)
    for name, shape in (("a", (7, 4)), ("b", (4, 5))):
        g = rng.normal(size=(20000, *shape)) * np.sqrt(np.asarray(var["w"][name]))
        m = maps["w"]
        seen = g @ np.asarray(m.onto).T if name == "a" else np.asarray(m.into).T @ g
        np.testing.assert_allclose(moved.nu["w"][name], (seen**2).mean(0), rtol=0.1)
        assert np.asarray(moved.nu["w"][name]).min() >= 0


@pytest.mark.parametrize("wrong", [{"mu": 1, "trace": 1, "nu": 1}, {"mu": 2, "trace": 1, "nu": 2}])
def test_mutation_of_the_moments(monkeypatch, wrong):
    monkeypatch.setattr(file, "MOMENTS", wrong)
    before = adapter()
    _, maps, _ = squeeze(before, 2)
    adam = optax.scale_by_adam().init(before.trainable)
    state = adam._replace(nu=jax.tree.map(jnp.ones_like, before.trainable), mu=before.trainable)
    moved = project(state, maps, before.trainable)
    t, m = before.trainable["w"]["a"], maps["w"]
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(moved.mu["w"]["a"], t @ m.onto.T, atol=1e-4)
        np.testing.assert_allclose(
            moved.nu["w"]["a"], jnp.ones((7, 4)) @ (m.onto.T) ** 2, atol=1e-4
        )


def test_annealing_is_squeezing_with_zeros_and_compiles_once():
    before, run = adapter(), jax.jit(lambda a, r: anneal(a, r))
    for rank in (3, 1):
        padded, maps, errors = run(before, rank)
        cut = squeeze(before, rank)
        np.testing.assert_allclose(product(padded), product(cut.adapter), atol=1e-4)
        np.testing.assert_allclose(errors["w"], cut.errors["w"], rtol=1e-4)
        assert np.all(np.asarray(padded.trainable["w"]["a"][:, rank:]) == 0)
        assert np.all(np.asarray(maps["w"].onto[rank:]) == 0)
    assert run._cache_size() == 1


def test_stacks_and_banks_are_squeezed_slice_by_slice():
    bank = jl.stack([adapter(seed=0), adapter(seed=1)])
    both = squeeze(bank, 2)
    for k in range(2):
        one = squeeze(bank[k], 2)
        np.testing.assert_allclose(product(both.adapter[k]), product(one.adapter), atol=1e-4)
        np.testing.assert_allclose(both.errors["w"][k], one.errors["w"], rtol=1e-4)


def test_schedule():
    ranks = [int(schedule(t, start=10, stop=20, source=8, target=2)) for t in range(31)]
    assert ranks[:11] == [8] * 11 and ranks[20:] == [2] * 11 and ranks[15] == 5
    assert all(x >= y for x, y in itertools.pairwise(ranks))
    with pytest.raises(ValueError, match="schedule: got start 3, stop 3"):
        schedule(0, start=3, stop=3, source=8, target=2)


def test_refusals():
    for rank in (0, 5):
        with pytest.raises(ValueError, match=rf"w: rank: got {rank}, expected in 1..4"):
            squeeze(adapter(), rank)
    with pytest.raises(ValueError, match="both factors"):
        squeeze(adapter(freeze_a=True), 2)
    a = adapter()
    with pytest.raises(ValueError, match="odd: got moments"):
        from collections import namedtuple

        project(namedtuple("State", "odd")(a.trainable), {}, a.trainable)


def trained(rank, moments, steps=200):
    """Loss at rank 2 of a regression on a slowly decaying spectrum, annealed or not, by Adam."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 8)))[0] for n in (12, 10))
    target = jnp.asarray(left * (2.0 * 0.7 ** np.arange(8)) @ right.T, jnp.float32)
    x, opt = leaf(128, 12, seed=5), optax.adam(1e-2)
    params = {"w": jnp.zeros((12, 10))}
    a = jl.init(jax.random.key(0), lambda p, x: x @ p["w"], params, x, methods={
        "w": jl.LoRA(rank, 2.0 * rank)})  # fmt: skip

    def loss(t):
        return jnp.mean((2.0 * (x @ t["w"]["a"]) @ t["w"]["b"] - x @ target) ** 2)

    def shrink(args):
        t, state, now = args
        cut = anneal(a.replace(trainable=t), now)
        return cut.adapter.trainable, moments(state, cut.maps, t)

    def step(carry, at):
        t, state, last = carry
        now = schedule(at, start=50, stop=150, source=rank, target=2) if moments else last
        if moments:
            t, state = jax.lax.cond(now != last, shrink, lambda z: z[:2], (t, state, now))
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = opt.update(jax.grad(loss)(t), state)
        return (optax.apply_updates(t, updates), state, now), None

    start = (a.trainable, opt.init(a.trainable), jnp.int32(rank))
    (t, _, _), _ = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(steps)))(start)
    return float(loss(squeeze(a.replace(trainable=t), 2).adapter.trainable))


def test_annealing_in_training_beats_compressing_after_it():
    """The paper's claim in small; moments that are not projected lose the gain."""
    after = trained(8, None)
    projected = trained(8, project)
    stale = trained(8, lambda state, maps, t: state)
    assert projected < 0.99 * after and projected < 0.99 * stale
    assert projected < 1.005 * trained(2, None)  # no worse than training at the low rank at once


def thin(rank, source=4):
    """An adapter whose deltas have less rank than its factors: the other rows of b are zero."""
    a = adapter(source)
    cut = {p: {"a": t["a"], "b": t["b"].at[rank:].set(0.0)} for p, t in a.trainable.items()}
    return a.replace(trainable=cut)


def check_alive(squeezed, before, ranks):
    """The value is that of before; gradients reach a factor of every rank, and so the other."""
    for path in PARAMS:
        np.testing.assert_allclose(product(squeezed, path), product(before, path), atol=1e-5)
        a = np.asarray(squeezed.trainable[path]["a"])
        assert (np.linalg.norm(a, axis=0)[:ranks] > 0.1).all(), path

    def loss(t):
        y = jl.lift(apply)(PARAMS, squeezed.replace(trainable=t), leaf(6, 7))
        return sum(jnp.sum(jnp.sin(v)) for v in y)

    slopes = jax.grad(loss)(squeezed.trainable)
    for path in PARAMS:
        assert (np.linalg.norm(slopes[path]["b"], axis=1)[:ranks] > 1e-4).all(), path


@pytest.mark.parametrize("rank", [0, 1], ids=["fresh", "of rank 1"])
def test_ranks_that_a_delta_does_not_need_can_learn(rank):
    before = thin(rank)
    check_alive(squeeze(before, 3).adapter, before, 3)
    annealed = jax.jit(lambda r: anneal(before, r).adapter)(3)
    check_alive(annealed, before, 3)
    for t in annealed.trainable.values():
        assert float(jnp.abs(t["a"][:, 3:]).max()) == float(jnp.abs(t["b"][3:]).max()) == 0


def test_mutation_surplus_ranks_of_zero_are_seen(monkeypatch):
    monkeypatch.setattr(file, "FRESH", 0.0)
    with pytest.raises(AssertionError):
        check_alive(squeeze(thin(1), 3).adapter, thin(1), 3)


def test_moments_of_ranks_that_are_not_needed():
    """Of b they are those of the new gradient, exactly; of a zero, as its gradient is."""
    before = thin(1)
    after, maps, _ = squeeze(before, 3)
    cotangent = leaf(7, 5, seed=2)

    def slopes(t):
        return {"a": cotangent @ t["b"].T, "b": t["a"].T @ cotangent}

    zeros = jax.tree.map(jnp.zeros_like, before.trainable)
    state = optax.trace(0.9).init(before.trainable)
    state = state._replace(trace={**zeros, "w": slopes(before.trainable["w"])})
    moved = project(state, maps, before.trainable).trace["w"]
    for name, want in slopes(after.trainable["w"]).items():
        np.testing.assert_allclose(moved[name], want, rtol=1e-3, atol=1e-3)
