"""Merged deltas by blocks: numpy in float64, coverage, memory, masks of `merge`, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.algebra import LowRank
from jlora.merging import METHODS, merge, to_adapter
from jlora.merging.engine import dense
from jlora.merging.engine.dense import merged_delta

D_IN, D_OUT, R, N = 18, 14, 2, 3
RNG = np.random.default_rng(0)
KINDS = {"flat": (), "stacked": (2,)}
SITES = [
    jl.Site(path, (*stack, D_IN, D_OUT), "s" * len(stack) + "io", jnp.dtype("float32"), ("dot",))
    for path, stack in KINDS.items()
]
FACTORS = {
    path: (RNG.normal(size=(N, *stack, D_IN, R)), RNG.normal(size=(N, *stack, R, D_OUT)))
    for path, stack in KINDS.items()
}
ADAPTERS = [
    to_adapter({p: LowRank(*(jnp.asarray(t[k], jnp.float32) for t in uv))
                for p, uv in FACTORS.items()}, SITES)
    for k in range(N)
]  # fmt: skip
W = np.array([0.5, 0.3, 0.2])


def joined(name, path, weights=W, **more):
    """The blocks put together; each element is written once."""
    out = np.full((*KINDS[path], D_IN, D_OUT), np.nan)
    for block in merged_delta(name, ADAPTERS, weights, path, **more):
        part = out[block.index][block.rows, block.columns]
        assert part.shape == block.values.shape and np.isnan(part).all()
        part[...] = block.values
    assert not np.isnan(out).any()
    return out


def ties_by_numpy(dense, w, density):
    """mergekit's formulas: trim, elect, disjoint mean; no `jlora`."""
    x = np.zeros_like(dense)
    for n, d in enumerate(dense):
        order = np.argsort(-np.abs(d).ravel())[: int(density * d.size)]
        x[n].ravel()[order] = d.ravel()[order]
    y = w[:, None, None] * x
    agree = np.sign(y) == np.where(y.sum(0) >= 0, 1, -1)
    share = (w[:, None, None] * agree).sum(0)
    return (y * agree).sum(0) / np.where(share == 0, 1, share)


def check_ties(row_block):
    got = joined("ties", "stacked", row_block=row_block, options={"density": 0.4})
    u, v = FACTORS["stacked"]
    for s in range(2):
        want = ties_by_numpy(u[:, s] @ v[:, s], W, 0.4)
        np.testing.assert_allclose(got[s], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row_block", [5, 256])
def test_ties_is_exact_at_any_block(row_block):
    check_ties(row_block)


def test_mutation_rows_taken_from_the_start_again_fail(monkeypatch):
    """What is computed of the first block only cannot pass for the whole."""
    real, seen = dense._block, []

    def first(rule, u, v, start):
        seen.append(u)
        return real(rule, seen[0], v, start)

    monkeypatch.setattr(dense, "_block", first)
    with pytest.raises(AssertionError):
        check_ties(5)


def test_what_an_adapter_is_cut_of():
    """The reason for it: at rank N R of ties a tenth of the delta is lost, here nothing."""
    options = {"density": 0.4}
    cut = jl.algebra.deltas(merge("ties", ADAPTERS, W, options=options))["flat"]
    whole = joined("ties", "flat", options=options)
    gap = np.linalg.norm(whole - np.asarray(cut.u @ cut.v)) / np.linalg.norm(whole)
    assert gap > 0.1
    kept = joined("ties", "flat", options={**options, "rank": N * R})
    np.testing.assert_allclose(kept, cut.u @ cut.v, atol=1e-4)


@pytest.mark.parametrize("name", ["dare_linear", "della", "concat"])
def test_others_are_what_merge_gives_at_full_rank(name):
    """Masks by key and row or output, columns where outputs are streamed, plain factors."""
    row = METHODS[name]
    more = {"key": jax.random.key(3), "ids": [4, 0, 7]} if row.randomised else {}
    options = dict(row.options)
    full = {"rank": D_OUT} if row.rule else {}
    want = jl.algebra.deltas(merge(name, ADAPTERS, W, options=options | full, **more))
    for path in ("flat", "stacked")[: 2 if name == "dare_linear" else 1]:
        got = joined(name, path, row_block=5, options=options, **more)
        np.testing.assert_allclose(got, want[path].u @ want[path].v, rtol=1e-3, atol=1e-3)


def test_weights_of_slices_and_a_bank():
    by_slice = np.stack([W, W[::-1]], axis=1)
    given = {"flat": W, "stacked": by_slice}
    got = joined("task_arithmetic", "stacked", given)
    u, v = FACTORS["stacked"]
    np.testing.assert_allclose(got, np.einsum("ns,nsir,nsro->sio", by_slice, u, v), atol=1e-4)
    bank = jl.stack(ADAPTERS)
    (block,) = merged_delta("concat", bank, W, "flat")
    np.testing.assert_allclose(block.values, np.einsum("n,nir,nro->io", W, *FACTORS["flat"]),
                               atol=1e-4)  # fmt: skip


def test_memory_is_that_of_a_block():
    """At 2048 x 2048 no array of any program is as large as a quarter of the delta."""
    size, b = 2048, 64
    u, v = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((N, size, R), (N, R, size)))
    low, w = LowRank(u, v), jax.ShapeDtypeStruct((N,), jnp.float32)  # type: ignore[arg-type]
    static = (METHODS["ties"].rule, (("density", 0.4),))
    first = dense._prepared.lower(low, w, None, {}, *static).compile().memory_analysis()
    rule = jax.eval_shape(lambda *a: dense._prepared(*a, *static), low, w, None, {})
    part = jax.ShapeDtypeStruct((N, b, R), jnp.float32)
    start = jax.ShapeDtypeStruct((), jnp.int32)
    block = dense._block.lower(rule, part, v, start).compile().memory_analysis()
    assert first.temp_size_in_bytes < 4 * size * size / 4
    assert block.temp_size_in_bytes <= 4 * 4 * N * b * size
    assert block.output_size_in_bytes == 4 * b * size


@pytest.mark.parametrize(
    "name, path, more, text",
    [
        ("ties", "other", {}, r"site: got 'other', expected one of \['flat', 'stacked'\]"),
        ("ties", "flat", {"row_block": 0}, "row_block: got 0, expected at least 1"),
        ("ties", "flat", {"options": {"normalise": True}}, "options: got 'normalise'.*normalize"),
        ("dare_ties", "flat", {}, "dare_ties: got no key"),
    ],
)
def test_refusals_come_before_the_first_block(name, path, more, text):
    with pytest.raises(ValueError, match=text):
        merged_delta(name, ADAPTERS, W, path, **more)
