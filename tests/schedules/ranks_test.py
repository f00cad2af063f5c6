"""Masks of ranks: arrays and updates masked by numpy, stacks and sites that shrink."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora.schedules import ranks

PARAMS = {"w": jnp.ones((5, 4)), "layers": jnp.ones((2, 4, 4)) / 9}


def apply(p, x):
    return jax.lax.scan(lambda h, w: (h @ w, None), x @ p["w"], p["layers"])[0]


@pytest.fixture(scope="module")
def adapter():
    a = jl.init(jax.random.key(0), apply, PARAMS, jnp.ones((2, 5)), methods={".*": jl.LoRA(3, 6.0)})
    rng = np.random.default_rng(0)
    draw = lambda t: jnp.asarray(rng.normal(size=t.shape), t.dtype)  # noqa: E731
    return a.replace(trainable=jax.tree.map(draw, a.trainable))


MASKS = {"w": jnp.asarray([True, False, True]),
         "layers": jnp.asarray([[False, True, True], [False, False, True]])}  # fmt: skip


def test_full_masks_have_the_form_of_the_stack(adapter):
    whole = ranks.full(adapter)
    assert {p: m.shape for p, m in whole.items()} == {"w": (3,), "layers": (2, 3)}
    assert int(ranks.kept(whole)) == 9 and int(ranks.kept(MASKS)) == 5


def test_a_method_without_ranks_is_refused():
    plain = jl.init(jax.random.key(0), apply, PARAMS, jnp.ones((2, 5)), methods={"w": jl.IA3()})
    with pytest.raises(ValueError, match=r"w: got IA3\(.*, expected a method with ranks"):
        ranks.full(plain)


def test_zeroed_rows(adapter):
    found = ranks.zeroed(adapter, MASKS)
    for p, m in MASKS.items():
        t = adapter.trainable[p]
        np.testing.assert_array_equal(
            found.trainable[p]["b"], np.where(np.asarray(m)[..., None], t["b"], 0)
        )
        chex.assert_trees_all_equal(found.trainable[p]["a"], t["a"])


def stepped(rule, adapter, gradients, **extra):
    t, state = adapter.trainable, rule.init(adapter.trainable)
    with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
        for g in gradients:
            updates, state = rule.update(g, state, t, **extra)
            t = optax.apply_updates(t, updates)
    return t, state


def still(t, adapter):
    """Whether dropped ranks are bitwise what they were, and kept ones are not."""
    for p, m in MASKS.items():
        for name, t_now in t[p].items():
            same = np.asarray(t_now == adapter.trainable[p][name])
            same = np.moveaxis(same, -1, -2) if name == "a" else same
            assert same[~np.asarray(m)].all() and not same[np.asarray(m)].any()


def test_dropped_ranks_stand_still_under_momentum_and_weight_decay(adapter):
    ones = jax.tree.map(jnp.ones_like, adapter.trainable)
    rule = optax.chain(optax.adamw(0.1, weight_decay=0.1), ranks.masked_updates(adapter.sites))
    still(stepped(rule, adapter, [ones] * 2, masks=MASKS)[0], adapter)


def test_mutation_masked_gradients_are_not_enough(adapter):
    ones = jax.tree.map(jnp.ones_like, adapter.trainable)
    cut = {p: {"a": jnp.where(MASKS[p][..., None, :], 1.0, jnp.zeros_like(t["a"])),
               "b": jnp.where(MASKS[p][..., None], 1.0, jnp.zeros_like(t["b"]))}
           for p, t in ones.items()}  # fmt: skip
    for decay, gradients in ((0.1, [cut]), (0.0, [ones, cut])):
        moved = stepped(optax.adamw(0.1, weight_decay=decay), adapter, gradients)[0]
        with pytest.raises(AssertionError):
            still(moved, adapter)


def test_a_stack_shrinks_to_its_widest_layer(adapter):
    state = optax.adam(0.1).init(adapter.trainable)
    state = (state[0]._replace(mu=adapter.trainable), *state[1:])
    small, moved = ranks.shrink(adapter, state, MASKS)
    before = ranks.zeroed(adapter, MASKS)
    want, found = jl.delta(PARAMS, before), jl.delta(PARAMS, small)
    for p in PARAMS:
        np.testing.assert_allclose(found[p], want[p], atol=1e-5)
        method = dict((s.path, m) for s, m in small.sites)[p]
        assert method.rank == 2 and method.alpha == 4.0  # the scale is still 2
    b = np.asarray(adapter.trainable["layers"]["b"])
    np.testing.assert_array_equal(small.trainable["layers"]["b"][0], b[0, [1, 2]])
    np.testing.assert_array_equal(
        small.trainable["layers"]["b"][1], np.stack([b[1, 2], np.zeros(4)])
    )
    chex.assert_trees_all_equal(moved[0].mu, small.trainable)
    assert jax.tree.structure(moved) == jax.tree.structure(optax.adam(0.1).init(small.trainable))


def test_a_site_without_ranks_is_gone(adapter):
    masks = {**MASKS, "w": jnp.zeros(3, bool)}
    small, state = ranks.shrink(adapter, optax.adam(0.1).init(adapter.trainable), masks)
    assert [s.path for s, _ in small.sites] == ["layers"]
    assert small.trainable.keys() == small.frozen.keys() == state[0].mu.keys() == {"layers"}
    found = jl.lift(apply)(PARAMS, small, jnp.ones((2, 5)))
    want = jl.lift(apply)(PARAMS, ranks.zeroed(adapter, masks), jnp.ones((2, 5)))
    np.testing.assert_allclose(found, want, rtol=1e-5)
