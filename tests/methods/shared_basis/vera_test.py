"""VeRA: the equation, and bases that come from the seed alone."""

import dataclasses
import re

import jax
import numpy as np
import pytest

import jlora as jl
from jlora.core.init import initialise
from jlora.methods.shared_basis.vera import VeRA


def check_value(bench):
    adapter = bench.noisy(VeRA(rank=6))
    p = bench.numbers(adapter)
    delta = p["basis_a"] @ np.diag(p["d"]) @ p["basis_b"] @ np.diag(p["b"])
    bench.agree(adapter, bench.w + delta)


def test_value(bench):
    check_value(bench)


def test_trainables_are_two_vectors(bench):
    fresh = bench.fresh(VeRA(rank=6, d_initial=0.25)).trainable
    assert {k: v.shape for k, v in fresh["w"].items()} == {"d": (6,), "b": (8,)}
    assert float(fresh["w"]["d"][0]) == 0.25 and list(fresh) == ["w"]


def test_bases_come_from_the_seed_not_from_the_key(bench):
    a, b = (bench.fresh(VeRA(rank=4), seed=s).frozen for s in (0, 1))
    other = bench.fresh(VeRA(rank=4, seed=7)).frozen
    for name in ("basis_a", "basis_b"):
        assert np.array_equal(a["*0"][name], b["*0"][name])
        assert not np.array_equal(a["*0"][name], other["*0"][name])
    _, again = VeRA(rank=4).shared(jax.random.key(5), (bench.site,))
    assert np.array_equal(again["basis_a"], a["*0"]["basis_a"])


def test_sites_of_other_shapes_slice_one_pair_of_bases(bench):
    narrow = dataclasses.replace(bench.site, path="n", shape=(5, 9), group="*0")
    sites = [(dataclasses.replace(bench.site, group="*0"), VeRA(rank=3)), (narrow, VeRA(rank=3))]
    params = bench.params | {"n": np.zeros((5, 9), np.float32)}
    adapter = initialise(jax.random.key(0), sites, params)
    shared = adapter.frozen["*0"]
    assert shared["basis_a"].shape == (12, 3) and shared["basis_b"].shape == (3, 9)
    p = adapter.trainable["n"] | {"b": np.linspace(-1, 1, 9, dtype=np.float32)}
    tuned = adapter.replace(trainable=adapter.trainable | {"n": p})
    a, b = (np.asarray(shared[k], np.float64) for k in ("basis_a", "basis_b"))
    want = 0.1 * (a[:5] @ b) * np.linspace(-1, 1, 9)
    np.testing.assert_allclose(jl.merge(params, tuned)["n"], want, atol=1e-5)


def test_limit_zero_d_is_the_base(bench):
    adapter = bench.noisy(VeRA(rank=4))
    off = adapter.trainable["w"] | {"d": adapter.trainable["w"]["d"] * 0}
    bench.agree(adapter.replace(trainable={"w": off}), bench.w)


def test_refusals():
    with pytest.raises(ValueError, match=r"VeRA\.rank: got 0, expected an integer of at least 1"):
        VeRA(rank=0)


def test_mutation_a_wrong_row_is_seen(bench, monkeypatch):
    good = VeRA.factors

    def shifted(self, p):
        return good(self, p | {"rows": (p["rows"] + 1) % 12})

    monkeypatch.setattr(VeRA, "factors", shifted)
    with pytest.raises(AssertionError):
        check_value(bench)


def products(bench, adapter, model):
    """Shapes of all products of matrices in a gradient."""
    loss = lambda t: model(bench.params, adapter.replace(trainable=t), bench.x).sum()  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(loss))(adapter.trainable))
    return set(re.findall(r"f32\[([\d,]+)\](?:<[^>]*>)? = dot_general", text))


def test_the_bases_have_no_gradient(bench):
    adapter, of_bases = bench.noisy(VeRA(rank=6)), {"12,6", "6,12", "6,8", "8,6"}
    assert not products(bench, adapter, jl.lift(bench.model)) & of_bases
    merged = lambda params, adapter, x: bench.model(jl.merge(params, adapter), x)  # noqa: E731
    assert products(bench, adapter, merged) & of_bases
