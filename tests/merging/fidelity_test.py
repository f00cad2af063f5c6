"""Ranks and errors of a merged adapter, against dense numpy; ranks that sites are too small for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.algebra import LowRank
from jlora.merging import certified, fidelity, merge, to_adapter
from jlora.merging.engine.dense import merged_delta
from jlora.merging.engine.streamed import Solver

W, N, R = [0.6, -0.4], 2, 2
SHAPES = {"wide": (2, 12, 10), "small": (12, 6)}
RNG = np.random.default_rng(0)
SITES = [jl.Site(p, s, "sio"[-len(s) :], jnp.dtype("float32"), ("dot",)) for p, s in SHAPES.items()]


def one():
    factors = {}
    for p, (*stack, d_in, d_out) in SHAPES.items():
        u, v = RNG.normal(size=(*stack, d_in, R)), RNG.normal(size=(*stack, R, d_out))
        factors[p] = LowRank(jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32))
    return to_adapter(factors, SITES)


ADAPTERS = [one() for _ in range(N)]


def whole(name, path, **more):
    out = np.zeros(SHAPES[path])
    for block in merged_delta(name, ADAPTERS, W, path, **more):
        out[block.index][block.rows, block.columns] = block.values
    return out


def check(name, options, more):
    got = certified(name, ADAPTERS, W, options=options, **more)
    made, squares = jl.algebra.deltas(got.adapter), []
    for path in SHAPES:
        m = whole(name, path, options={k: v for k, v in options.items() if k != "rank"}, **more)
        gap = np.linalg.norm(m - np.asarray(made[path].u @ made[path].v), axis=(-2, -1))
        size = np.linalg.norm(m, axis=(-2, -1))
        np.testing.assert_allclose(got.errors[path], gap, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(got.norms[path], size, rtol=1e-4)
        np.testing.assert_allclose(got.relative[path], gap / size, rtol=1e-3, atol=1e-5)
        assert got.ranks[path] == made[path].u.shape[-1]
        squares.append([(gap**2).sum(), (size**2).sum()])
    total = np.sqrt(np.sum(squares, axis=0))
    np.testing.assert_allclose([got.total, got.norm], total, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(got.total_relative, total[0] / total[1], rtol=1e-3, atol=1e-5)
    return got


def test_what_ties_loses_as_an_adapter():
    got = check("ties", {"density": 0.5, "rank": 3, "solver": Solver(block=5)}, {})
    assert got.ranks == {"wide": 3, "small": 3} and got.total_relative > 0.1


def test_outputs_and_masks_are_those_of_the_merge():
    check("della", {"density": 0.5, "rank": 8}, {"key": jax.random.key(2)})


def test_exact_merges_lose_what_out_rank_cuts():
    assert float(certified("concat", ADAPTERS, W).total) == 0
    got = certified("concat", ADAPTERS, W, out_rank=3)
    for path in SHAPES:
        values = np.linalg.svd(whole("concat", path), compute_uv=False)
        want = np.linalg.norm(values[..., 3:], axis=-1)
        np.testing.assert_allclose(got.errors[path], want, rtol=1e-3, atol=1e-4)
    assert set(got.ranks.values()) == {3}


def test_mutation_the_error_of_another_adapter(monkeypatch):
    real = fidelity._measured

    def wrong(bank, factors, *args):
        return real(bank, LowRank(2 * factors.u, factors.v), *args)

    monkeypatch.setattr(fidelity, "_measured", wrong)
    with pytest.raises(AssertionError):
        check("ties", {"density": 0.5, "rank": 3, "solver": Solver(block=5)}, {})


def test_a_rank_beyond_a_site_is_full_there_and_reported():
    got = certified("truncated", ADAPTERS, W, options={"rank": 4})
    assert got.ranks == {"wide": 4, "small": 4}
    got = certified("truncated", ADAPTERS, W, options={"rank": 10})
    assert got.ranks == {"wide": 4, "small": 4}, "N R directions exist"
    low = jl.algebra.deltas(merge("magnitude", ADAPTERS, W, options={"density": 1.0, "rank": 10}))
    assert [low[p].u.shape[-1] for p in SHAPES] == [10, 6]


@pytest.mark.parametrize("rank", [11, 100000, 0, 4.5, True])
@pytest.mark.parametrize("name", ["ties", "truncated", "tsv", "cart", "peft_svd"])
def test_a_rank_beyond_every_site_is_refused(name, rank):
    with pytest.raises(ValueError, match=f"{name}: rank: got {rank}, expected 1 to 10"):
        merge(name, ADAPTERS, W, options={"rank": rank})


def test_an_out_rank_beyond_every_site_is_refused():
    with pytest.raises(ValueError, match="out_rank: got 100000, expected 1 to 10"):
        merge("concat", ADAPTERS, W, out_rank=100000)


@pytest.mark.parametrize(
    "name, options, text",
    [
        ("ties", {"densty": 0.5}, r"ties: options: got 'densty', expected one of \['density', 'no"),
        ("knots", {"strength": 1.0}, "'strength'.*strength is called scale here"),
        ("dare_ties", {"normalise": True}, "'normalise'.*normalise is called normalize here"),
        ("concat", {"rank": 2}, r"concat: options: got 'rank', expected one of \[\]"),
    ],
)
def test_unknown_options_are_refused_with_those_known(name, options, text):
    with pytest.raises(ValueError, match=text):
        merge(name, ADAPTERS, W, options=options, key=jax.random.key(0))


def test_factor_mix_cannot_subtract():
    with pytest.raises(ValueError, match=r"factor_mix: weights: got .*expected none below 0"):
        merge("factor_mix", ADAPTERS, W)
