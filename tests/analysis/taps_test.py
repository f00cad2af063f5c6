"""Taps of the inputs: sums in float64 by hand, other batches, masks, meshes, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlora as jl
from jlora.analysis import taps
from jlora.contracts import tiny

PARAMS = tiny.params()
TIME = jnp.asarray(0.5)
BATCHES = [(tiny.inputs(n, n), TIME) for n in (4, 2, 3)]
SITES = list(jl.sites(tiny.model, PARAMS, *BATCHES[0]))
PATHS = {"first", "layers", "last"}


def rows(batches, keep=lambda z: np.ones(z.shape[:2], bool)):
    """{path: input rows [*stack, n, d_in]} of the tiny model, in float64."""
    p = {k: np.asarray(v, "f8") for k, v in PARAMS.items()}
    seen = {path: [] for path in ("first", 0, 1, "last")}
    for z, t in batches:
        h, kept = np.asarray(z, "f8"), keep(np.asarray(z))
        seen["first"].append(h[kept])
        h = np.tanh(h @ p["first"] + float(t))
        for k in range(2):
            seen[k].append(h[kept])
            h = np.tanh(h @ p["layers"][k])
        seen["last"].append(h[kept])
    all_rows = {path: np.concatenate(x) for path, x in seen.items()}
    stack = np.stack([all_rows.pop(0), all_rows.pop(1)])
    return all_rows | {"layers": stack}


def check_moments(got, want):
    assert set(got) == set(want) == PATHS
    for path, x in want.items():
        np.testing.assert_allclose(got[path].second, np.swapaxes(x, -1, -2) @ x, atol=2e-5)
        np.testing.assert_allclose(got[path].first, x.sum(-2), atol=2e-5)
        np.testing.assert_array_equal(got[path].count, np.full(x.shape[:-2], x.shape[-2]))


@pytest.fixture(scope="module")
def moments():
    return taps.input_moments(tiny.model, PARAMS, BATCHES, SITES)


def test_moments_of_a_scanned_stack_are_those_of_all_rows(moments):
    check_moments(moments, rows(BATCHES))


def test_mutation_the_last_batch_alone_is_seen(moments):
    with pytest.raises(AssertionError):
        check_moments(moments, rows(BATCHES[-1:]))


def test_the_svd_of_the_inputs_batch_by_batch(moments):
    """All directions: exact. Fewer: those of rows that have no more, and the energy of all."""
    whole = taps.input_svd(tiny.model, PARAMS, BATCHES, SITES, 6)
    for path, found in whole.items():
        v, s = np.asarray(found.vectors, "f8"), np.asarray(found.values, "f8")
        second = np.swapaxes(v, -1, -2) @ (s[..., None] ** 2 * v)
        np.testing.assert_allclose(second, moments[path].second, atol=1e-4)
        np.testing.assert_allclose(found.energy, (s**2).sum(-1), rtol=1e-5)
        eye = np.broadcast_to(np.eye(v.shape[-2]), (*v.shape[:-1], v.shape[-2]))
        np.testing.assert_allclose(v @ np.swapaxes(v, -1, -2), eye, atol=1e-5)
    plane = [(z.at[..., 2:].set(0.0), t) for z, t in BATCHES]
    few = taps.input_svd(tiny.model, PARAMS, plane, SITES, 2)["first"]
    s = np.linalg.svd(rows(plane)["first"], compute_uv=False)
    np.testing.assert_allclose(few.values, s[:2], rtol=1e-5)
    np.testing.assert_allclose(few.vectors[:, 2:], 0, atol=1e-6)


def test_a_mask_leaves_rows_out():
    """A masked row that is not finite would show."""
    batches = [(z.at[:, 0].set(jnp.inf), t) for z, t in BATCHES]
    keep = lambda z: np.arange(3)[None].repeat(len(z), 0) > 0  # noqa: E731
    args = (tiny.model, PARAMS, batches, SITES)
    got = taps.input_moments(*args, mask=lambda batch: keep(batch[0]))
    with np.errstate(invalid="ignore"):
        want = rows(batches, keep)
    check_moments(got, want)
    with pytest.raises(ValueError, match=r"first: mask: got shape \(4,\), expected .* \(4, 3\)"):
        taps.input_moments(*args, mask=lambda batch: jnp.ones(len(batch[0])))
    with pytest.raises(ValueError, match="got no data: no input row"):
        taps.input_moments(*args, mask=lambda batch: keep(batch[0]) * 0)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch_gives_the_same(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    z, where = tiny.inputs(8, 1), NamedSharding(mesh, PartitionSpec("data"))
    want = rows([(z, TIME)])
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec()))
        got = taps.input_moments(tiny.model, params, [(jax.device_put(z, where), TIME)], SITES)
    check_moments(got, want)


def test_a_weight_that_is_used_twice_sees_both():
    def twice(params, x):
        return (x @ params["w"]) @ params["w"]

    w, x = np.random.default_rng(0).normal(size=(2, 4, 4)).astype("f4")
    sites = list(jl.sites(twice, {"w": w}, x))
    got = taps.input_moments(twice, {"w": jnp.asarray(w)}, [jnp.asarray(x)], sites)["w"]
    y = x @ w
    np.testing.assert_allclose(got.second, x.T @ x + y.T @ y, rtol=1e-4)
    assert got.count == 8
    full = taps.input_svd(twice, {"w": jnp.asarray(w)}, [jnp.asarray(x)], sites, 4)["w"]
    np.testing.assert_allclose(
        full.values**2, np.linalg.eigvalsh(x.T @ x + y.T @ y)[::-1], rtol=1e-3, atol=1e-4
    )


def test_a_lifted_function_is_tapped_where_its_adapter_leaves_it():
    adapter = tiny.moved(tiny.fresh(jl.LoRA(rank=2), PARAMS))
    tuned = jl.lift(tiny.model)
    got = taps.input_moments(
        lambda p, z, t: tuned(p, adapter, z, t), PARAMS, BATCHES[:1], SITES
    )["last"]  # fmt: skip
    merged = jl.merge(PARAMS, adapter)
    want = taps.input_moments(tiny.model, merged, BATCHES[:1], SITES)["last"]
    np.testing.assert_allclose(got.second, want.second, atol=1e-4)


def test_refusals():
    def table(params, ids):
        return params["w"][ids]

    w = {"w": jnp.ones((4, 3))}
    ids = jnp.arange(3)
    with pytest.raises(ValueError, match="w: got a lookup table, expected a matmul"):
        taps.input_moments(table, w, [ids], list(jl.sites(table, w, ids)))
    with pytest.raises(ValueError, match="first: got no data"):
        taps.input_moments(tiny.model, PARAMS, [], SITES)
    bad = [(BATCHES[0][0].at[0, 0, 0].set(jnp.nan), TIME)]
    with pytest.raises(ValueError, match="first: got inputs that are not finite"):
        taps.input_moments(tiny.model, PARAMS, bad, SITES)
    with pytest.raises(ValueError, match="rank: got 0, expected at least 1"):
        taps.input_svd(tiny.model, PARAMS, BATCHES, SITES, 0)
