"""AdaLN-LoRA: its sum by NumPy, what full rank holds, how many numbers it has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models.dit.modulation import (
    PARTS,
    approximated,
    init_own,
    init_shared,
    modulation,
    size,
)

D, L = 6, 3
RANDOM = np.random.default_rng(0)


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def dense(d_in, d_out):
    return {"kernel": normal(d_in, d_out), "bias": normal(d_out)}


CONDITION = normal(D)
SHARED = dense(D, PARTS * D)
OWN = {"down": dense(D, 2), "up": dense(2, PARTS * D)}
FULL = {"kernel": normal(L, D, PARTS * D), "bias": normal(L, PARTS * D)}


def by_numpy(c, shared, down, up):
    x = c / (1 + np.exp(-c))
    return (
        x @ shared["kernel"] + shared["bias"]
        + (x @ down["kernel"] + down["bias"]) @ up["kernel"] + up["bias"]
    )  # fmt: skip


def test_the_sum_by_numpy():
    got = np.asarray(modulation(jnp.asarray(CONDITION), OWN, SHARED))
    want = by_numpy(CONDITION, SHARED, OWN["down"], OWN["up"]).reshape(PARTS, D)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    without = by_numpy(CONDITION, SHARED, OWN["down"], {"kernel": 0 * OWN["up"]["kernel"],
                                                        "bias": OWN["up"]["bias"]})  # fmt: skip
    assert np.abs(got.reshape(-1) - without).max() > 0.1  # the blocks' part is not left out


def whole(own, shared):
    """W_l and b_l of every block, from what the modulation returns for unit vectors."""
    shared, own = jax.tree.map(np.asarray, (shared, own))
    kernel = shared["kernel"] + own["down"]["kernel"] @ own["up"]["kernel"]
    return kernel, shared["bias"] + own["up"]["bias"]


def test_full_rank_holds_every_adaln():
    shared, own = approximated(FULL["kernel"], FULL["bias"], D)
    for n in range(L):
        at = lambda tree, n=n: jax.tree.map(lambda x: x[n], tree)  # noqa: E731
        got = modulation(jnp.asarray(CONDITION), at(own), shared)
        want = modulation(jnp.asarray(CONDITION), at(FULL))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_lower_rank_leaves_the_remaining_singular_values(rank):
    shared, own = approximated(FULL["kernel"], FULL["bias"], rank)
    kernel, bias = whole(own, shared)
    np.testing.assert_allclose(bias, FULL["bias"], atol=1e-5)
    rest = FULL["kernel"] - FULL["kernel"].mean(0)
    for n in range(L):
        left = np.linalg.svd(rest[n], compute_uv=False)[rank:]
        error = np.linalg.norm(kernel[n] - FULL["kernel"][n])
        np.testing.assert_allclose(error, np.linalg.norm(left), rtol=1e-4)
        assert error > 0.1


def test_equal_blocks_need_no_blocks_part():
    same = np.broadcast_to(FULL["kernel"][:1], FULL["kernel"].shape)
    shared, own = approximated(same, FULL["bias"], 1)
    np.testing.assert_allclose(shared["kernel"], FULL["kernel"][0], rtol=1e-6)
    np.testing.assert_allclose(own["up"]["kernel"], 0.0, atol=1e-6)


def test_fresh_modulation_is_zero_and_learns():
    own, shared = init_own(jax.random.key(0), D, 2), init_shared(D)
    np.testing.assert_array_equal(modulation(jnp.asarray(CONDITION), own, shared), 0.0)
    grads = jax.grad(lambda own: modulation(jnp.asarray(CONDITION), own, shared).sum())(own)
    assert np.abs(grads["up"]["kernel"]).min() > 0


@pytest.mark.parametrize("rank", [0, 2, D])
def test_numbers_are_counted(rank):
    own = [init_own(jax.random.key(n), D, rank) for n in range(L)]
    trees = own if rank == 0 else [own, init_shared(D)]
    assert size(D, L, rank) == sum(x.size for x in jax.tree.leaves(trees))


def test_the_paper_s_saving():
    full, low = size(1152, 28, 0), size(1152, 28, 288)  # the XL model
    assert 0.3 < low / full < 0.35


@pytest.mark.parametrize(
    ("kernel", "bias", "rank"),
    [((L, D, 5 * D), (L, 6 * D), 1), ((L, D, 6 * D), (6 * D,), 1), ((D, 6 * D), (6 * D,), 1),
     ((L, D, 6 * D), (L, 6 * D), 0), ((L, D, 6 * D), (L, 6 * D), D + 1)],
)  # fmt: skip
def test_bad_input_is_refused(kernel, bias, rank):
    with pytest.raises(ValueError, match="got"):
        approximated(np.zeros(kernel, np.float32), np.zeros(bias, np.float32), rank)
    with pytest.raises(ValueError, match="rank: got -1"):
        init_own(jax.random.key(0), D, -1)
