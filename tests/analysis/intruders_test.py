"""Intruders: cosines and counts by numpy, planted directions, thresholds, both sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.analysis import intruders as lib

D_IN, D_OUT, TOP = 48, 40, 5
RNG = np.random.default_rng(0)
BASE = RNG.normal(size=(2, D_IN, D_OUT)).astype("f4")
SPIKE = np.outer(RNG.normal(size=D_IN), RNG.normal(size=D_OUT)).astype("f4") * 2
NOISE = RNG.normal(size=BASE.shape).astype("f4") * 0.01
AFTER = BASE + NOISE
AFTER[1] += SPIKE  # layer 1 gets a strong direction of its own


def by_numpy(before, after, side="out"):
    """c_j in the algorithm's own layout: weights [out, in], left vectors."""
    w0, w1 = np.asarray(before, "f8"), np.asarray(after, "f8")
    if side == "out":
        w0, w1 = w0.T, w1.T
    old = np.linalg.svd(w0, full_matrices=False)[0]
    new = np.linalg.svd(w1, full_matrices=False)[0][:, :TOP]
    return np.asarray([max(abs(float(old[:, i] @ new[:, j])) for i in range(old.shape[1]))
                       for j in range(TOP)])  # fmt: skip


def check(measure):
    for side in ("out", "in"):
        seen = measure(jnp.asarray(BASE), jnp.asarray(AFTER), TOP, 0.5, side)
        want = np.stack([by_numpy(b, a, side) for b, a in zip(BASE, AFTER, strict=True)])
        np.testing.assert_allclose(seen.cosine, want, atol=1e-4)
        np.testing.assert_array_equal(seen.flags, want < 0.5)
    return seen


@pytest.fixture(scope="module")
def measured():
    return jax.jit(lib.intruders, static_argnums=(2, 3, 4))


def test_cosines_are_those_of_the_algorithm(measured):
    seen = check(measured)
    assert not seen.flags[0].any(), "dense noise turns vectors a little"
    assert int(seen.flags[1].sum()) == 1 and bool(seen.flags[1, 0])
    parts = np.einsum("lij,lj,ljo->lio", seen.u, seen.s, seen.v)
    want = [np.linalg.svd(a.astype("f8"), compute_uv=False)[TOP:] for a in AFTER]
    rest = [np.linalg.norm(a - p) for a, p in zip(AFTER, parts, strict=True)]
    np.testing.assert_allclose(rest, np.linalg.norm(want, axis=1), rtol=1e-4)


def test_mutation_signs_of_singular_vectors_are_arbitrary(measured):
    def signed(before, after, top, epsilon, side):
        seen = measured(before, after, top, epsilon, side)
        u0, _, v0 = jnp.linalg.svd(before, full_matrices=False)
        dots = v0 @ seen.v.mT if side == "out" else u0.mT @ seen.u
        cosine = (-dots).max(-2)  # the same decomposition, with other signs
        return seen._replace(cosine=cosine, flags=cosine < epsilon)

    with pytest.raises(AssertionError):
        check(signed)


def test_nothing_changed_and_one_threshold_or_many(measured):
    same = measured(jnp.asarray(BASE), jnp.asarray(BASE), TOP, 0.5, "out")
    np.testing.assert_allclose(same.cosine, 1.0, atol=1e-4)
    assert float(lib.per_matrix({"w": same})) == 0.0
    cosine = jnp.asarray([[0.2, 0.4, 0.95], [0.6, 0.99, 1.0]], jnp.float32)
    np.testing.assert_array_equal(lib.counts(cosine), [[1, 0], [2, 0], [2, 1], [2, 1]])


def test_wide_matrices_have_no_vectors_of_value_zero(measured):
    """An arbitrary basis of the null space is no part of the base."""
    wide = jnp.asarray(RNG.normal(size=(1, 4, D_OUT)), jnp.float32)
    null = np.linalg.svd(np.asarray(wide[0]))[2][-1]
    strong = wide + jnp.asarray(np.outer([9.0, 0, 0, 0], null)[None], jnp.float32) * 3
    assert bool(measured(wide, strong, TOP, 0.5, "out").flags[0, 0])


def test_an_adapter_and_its_merged_parameters(measured):
    params = {"w": jnp.asarray(BASE)}
    x = jnp.ones((3, D_IN))
    sites = jl.sites(lambda p, x: jax.lax.scan(lambda h, w: (h, h @ w), x, p["w"])[1], params, x)
    seen = lib.survey(params, {"w": jnp.asarray(AFTER)}, sites, TOP)["w"]
    want = measured(jnp.asarray(BASE), jnp.asarray(AFTER), TOP, 0.5, "out")
    np.testing.assert_allclose(seen.cosine, want.cosine, atol=1e-5)
    assert float(lib.per_matrix({"w": seen})) == 0.5


def test_refusals():
    w = jnp.ones((4, 4))
    with pytest.raises(ValueError, match=r"after: got shape \(4, 3\), expected \(4, 4\)"):
        lib.intruders(w, w[:, :3])
    with pytest.raises(ValueError, match="top: got 0, expected at least 1"):
        lib.intruders(w, w, top=0)
    with pytest.raises(ValueError, match=r"epsilon: got 1.5, expected in \(0, 1\]"):
        lib.intruders(w, w, epsilon=1.5)
    with pytest.raises(ValueError, match="side: got 'left', expected 'out' or 'in'"):
        lib.intruders(w, w, side="left")
    with pytest.raises(ValueError, match="sites: got none"):
        lib.survey({}, {}, [])
    site = jl.Site("w", (4, 4), "io", np.dtype("float32"))
    with pytest.raises(ValueError, match=r"after: w: got none, expected \(4, 4\)"):
        lib.survey({"w": w}, {}, [site])
