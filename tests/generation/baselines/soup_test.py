"""Soups: delta-space identities against dense matrices, shared factors, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.algebra import LowRank
from jlora.generation.baselines import soup


def factors(n=5, d_in=6, rank=2, d_out=4, shared=False, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(1 if shared else n, d_in, rank)).repeat(n if shared else 1, 0)
    b = rng.normal(size=(n, rank, d_out))
    return a.astype("f4"), b.astype("f4")


def test_factor_mean_is_the_delta_mean_when_a_is_shared_and_only_then():
    w = np.asarray(soup.mean_weights(5))[0]
    for shared in (True, False):
        a, b = factors(shared=shared)
        dense = np.einsum("n,nir,nro->io", w, a, b)
        mean_a, mean_b = soup.combine(jnp.asarray(w)[None], (jnp.asarray(a), jnp.asarray(b)))
        error = np.abs(np.asarray(mean_a[0]) @ np.asarray(mean_b[0]) - dense).max()
        assert (error < 1e-5) == shared


def test_delta_soups_are_exact_at_full_rank_and_certify_their_error():
    a, b = factors()
    weights = np.random.default_rng(1).normal(size=(3, 5)).astype("f4")
    dense = np.einsum("mn,nir,nro->mio", weights, a, b)
    bank = {"site": LowRank(jnp.asarray(a), jnp.asarray(b))}
    full = soup.delta_soups(bank, jnp.asarray(weights), 4)
    np.testing.assert_allclose(full.deltas["site"].u @ full.deltas["site"].v, dense, atol=1e-4)
    np.testing.assert_allclose(full.total, 0, atol=1e-4)
    cut = soup.delta_soups(bank, jnp.asarray(weights), 1)
    missing = np.linalg.norm(cut.deltas["site"].u @ cut.deltas["site"].v - dense, axis=(1, 2))
    np.testing.assert_allclose(cut.total, missing, rtol=1e-4)
    singular = np.linalg.svd(dense, compute_uv=False)
    np.testing.assert_allclose(cut.total, np.sqrt((singular[:, 1:] ** 2).sum(1)), rtol=1e-4)


def test_task_weights_average_each_task():
    x = jnp.arange(10.0).reshape(5, 2)
    groups = jnp.asarray([1, 0, 1, 0, 1])
    out = soup.combine(soup.task_weights(groups, 2), {"x": x})["x"]
    np.testing.assert_allclose(out, [[4, 5], [4, 5]])
    assert np.isnan(np.asarray(soup.task_weights(groups, 3))[2]).all()


def test_combine_keeps_dtypes_and_one_hot_picks_bitwise():
    tree = {"f": jnp.ones((3, 2), jnp.bfloat16), "g": jax.random.normal(jax.random.key(0), (3,))}
    out = soup.combine(jnp.eye(3)[1:2], tree)
    assert out["f"].dtype == jnp.bfloat16 and out["f"].shape == (1, 2)
    np.testing.assert_array_equal(out["g"], tree["g"][1:2])


def test_combine_names_the_leaf_of_the_wrong_length():
    with pytest.raises(ValueError, match=r"\['b'\].*\(4, 2\).*\(3"):
        soup.combine(jnp.ones((1, 3)), {"a": jnp.ones((3,)), "b": jnp.ones((4, 2))})


def test_require_shared_names_what_differs():
    same = jnp.ones((3, 2, 2))
    soup.require_shared({"q": {"a": same, "scale": jnp.ones(3)}})
    with pytest.raises(ValueError, match=r"\['q'\]\['a'\] of adapter 2"):
        soup.require_shared({"q": {"a": same.at[2, 0, 1].set(0.5)}})


def test_squared_error_matches_dense_and_sees_a_wrong_gram():
    rng = np.random.default_rng(2)
    y, t, w = rng.normal(size=(5, 7)), rng.normal(size=(3, 7)), rng.normal(size=(3, 5))
    want = ((t - w @ y) ** 2).sum(1)
    arrays = [jnp.asarray(z, jnp.float32) for z in (w, y @ y.T, t @ y.T, (t**2).sum(1))]
    np.testing.assert_allclose(soup.squared_error(*arrays), want, rtol=1e-4)
    arrays[1] = arrays[1] * 1.1
    assert not np.allclose(soup.squared_error(*arrays), want, rtol=1e-2)


def bank_of_tasks():
    """Four adapters of two tasks that share `a`, and their `b` in float64."""

    def model(p, x):
        return x @ p["w"]

    w = {"w": jnp.ones((4, 3))}
    fresh = jl.init(
        jax.random.key(0), model, w, jnp.ones((1, 4)), methods={"w": jl.LoRA(2, freeze_a=True)}
    )
    b = np.random.default_rng(1).normal(size=(4, 2, 3)).astype("f4")
    return jl.stack([fresh.replace(trainable={"w": {"b": jnp.asarray(t)}}) for t in b]), b


def test_examples_are_one_soup_and_condition_per_task():
    bank, b = bank_of_tasks()
    conditions = jnp.asarray([[1.0, 0.0], [0.0, 4.0], [3.0, 0.0], [0.0, 6.0]])
    found = soup.examples(conditions, jnp.asarray([7, 2, 7, 2]), bank)
    np.testing.assert_allclose(found.conditions, [[0, 5], [2, 0]], atol=1e-6)
    want = [(b[1] + b[3]) / 2, (b[0] + b[2]) / 2]
    np.testing.assert_allclose(found.soups.trainable["w"]["b"], want, atol=1e-6)
    mean = soup.generate(jax.random.key(0), found, jnp.ones(2))
    np.testing.assert_allclose(mean.trainable["w"]["b"], b.mean(0), atol=1e-6)
    assert mean.frozen["w"]["a"].shape == (4, 2)
    with pytest.raises(ValueError, match="conditions: got numbers that are not finite"):
        soup.examples(conditions.at[0, 0].set(jnp.nan), jnp.zeros(4, jnp.int32), bank)
