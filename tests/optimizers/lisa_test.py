"""LISA: the drawn layers against optax's AdamW, the others bitwise still, draws, state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora.optimizers.lisa import draw, layer_norms, lisa

L, N, K = 5, 2, 3
OPTIONS = {"slots": N, "interval": K, "weight_decay": 0.1}


def tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"embed": (4, 3), "layers": {"w": (L, 3, 3), "bias": (L, 3)}}
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes,
                        is_leaf=lambda s: isinstance(s, tuple))  # fmt: skip


def run(rule, steps, seed=0):
    """(parameters, layers in the slots) after each step; gradients differ in every step."""
    params, out = tree(seed), []
    state, update = rule.init(params), jax.jit(rule.update)
    for n in range(steps):
        updates, state = update(tree(100 + n), state, params)
        params = optax.apply_updates(params, updates)
        out.append((params, np.asarray(state.index)))
    return out


@pytest.fixture(scope="module")
def trained():
    return run(lisa(0.01, "^layers/", **OPTIONS), 2 * K)


def check_windows(steps):
    """In each window the slots' layers move, the others are bitwise what they were."""
    before = tree(0)
    for number in range(2):
        window = steps[number * K : (number + 1) * K]
        drawn = window[0][1]
        assert len(set(drawn)) == N and all((i == drawn).all() for _, i in window)
        after = window[-1][0]
        for name in ("w", "bias"):
            same = np.asarray(before["layers"][name] == after["layers"][name]).reshape(L, -1)
            assert same[np.delete(np.arange(L), drawn)].all() and not same[drawn].any()
        assert not np.asarray(before["embed"] == after["embed"]).any()
        before = after


def test_only_the_drawn_layers_move(trained):
    check_windows(trained)


def test_mutation_masked_gradients_are_seen_by_weight_decay(trained):
    """AdamW on gradients that are zero outside of the slots moves the other layers."""
    rule, params, steps = optax.adamw(0.01, weight_decay=0.1), tree(0), []
    state = rule.init(params)
    for n, (_, index) in enumerate(trained):
        g = tree(100 + n)
        keep = lambda t, i=index: jnp.zeros_like(t).at[i].set(t[i])  # noqa: E731
        g = {**g, "layers": jax.tree.map(keep, g["layers"])}
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = rule.update(g, state, params)
        params = optax.apply_updates(params, updates)
        steps.append((params, index))
    with pytest.raises(AssertionError):
        check_windows(steps)


def test_the_drawn_layers_are_moved_by_adamw_from_moments_of_zero(trained):
    rule, before = optax.adamw(0.01, weight_decay=0.1), tree(0)
    whole = rule.init(before["embed"])
    embed = before["embed"]
    for number in range(2):
        drawn = trained[number * K][1]
        own = jax.tree.map(lambda t, i=drawn: t[i], before["layers"])
        state = rule.init(own)
        for n in range(number * K, (number + 1) * K):
            g = tree(100 + n)
            part = jax.tree.map(lambda t, i=drawn: t[i], g["layers"])
            with jax.numpy_dtype_promotion("standard"):
                updates, state = rule.update(part, state, own)
                more, whole = rule.update(g["embed"], whole, embed)
            own, embed = optax.apply_updates(own, updates), optax.apply_updates(embed, more)
        before = trained[(number + 1) * K - 1][0]
        for name, t in own.items():
            np.testing.assert_allclose(before["layers"][name][drawn], t, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(before["embed"], embed, rtol=1e-5, atol=1e-6)


def test_with_as_many_slots_as_layers_and_one_window_it_is_adamw():
    params, g = tree(0), tree(1)
    rule = lisa(lambda n: 0.01 / (1 + n), "layers", slots=L, interval=100)
    state = rule.init(params)
    other = optax.adam(lambda n: 0.01 / (1 + n))
    known = other.init(params)
    for _ in range(2):
        with jax.numpy_dtype_promotion("standard"):
            want, known = other.update(g, known)
        found, state = rule.update(g, state, params)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_the_state_holds_the_slots_alone():
    state = lisa(0.01, "^layers/", slots=N).init(tree(0))
    size = sum(t.size for t in jax.tree.leaves((state.mu, state.nu)))
    assert size == 2 * (12 + N * (9 + 3)) < 2 * (12 + L * (9 + 3))


def test_draws_are_even_or_as_given():
    key = jax.random.key_data(jax.random.key(0))
    many = jax.jit(jax.vmap(lambda n: draw(key, n, L, N)))(jnp.arange(2000))
    shares = np.bincount(np.asarray(many).ravel(), minlength=L) / 2000
    np.testing.assert_allclose(shares, N / L, atol=0.05)
    certain = draw(key, 0, L, 2, (0.0, 1.0, 0.0, 1.0, 0.0))
    assert sorted(np.asarray(certain).tolist()) == [1, 3]


def test_norms_of_layers():
    change = tree(3)
    parts = (change["layers"]["w"].reshape(L, -1), change["layers"]["bias"])
    want = np.sqrt(sum((np.asarray(t, "f8") ** 2).sum(1) for t in parts))
    np.testing.assert_allclose(layer_norms(change, "^layers/"), want, rtol=1e-5)


def test_refusals():
    for wrong in ({"slots": 0}, {"interval": 0}):
        with pytest.raises(ValueError, match=r"lisa: got slots"):
            lisa(0.1, "layers", **wrong)
    for pattern, options, message in (
        ("blocks", {}, r"layers: got 'blocks', which finds stacks of \[\] layers"),
        (".", {}, r"layers: got '.', which finds stacks of \[4, 5\] layers"),
        ("layers", {"slots": 6}, r"slots: got 6, expected at most 5"),
        ("layers", {"probabilities": (1.0,)}, r"probabilities: got 1, expected 5"),
    ):
        with pytest.raises(ValueError, match=message):
            lisa(0.1, pattern, **options).init(tree(0))
    rule = lisa(0.1, "layers")
    with pytest.raises(ValueError, match=r"lisa: got no params"):
        rule.update(tree(1), rule.init(tree(0)))
