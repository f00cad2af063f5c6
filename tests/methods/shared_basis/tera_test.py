"""TeRA: the tensor network mode by mode, its rank, factors that sites share."""

import jax
import numpy as np
import pytest

import jlora as jl
from jlora.core.init import initialise
from jlora.methods import TeRA
from jlora.methods.shared_basis.tera import modes

METHOD = TeRA(rank=2, alpha=0.5)


def delta(p, shape, alpha):
    """The Tucker sum, one mode after the other, in float64."""
    out = p["core"]
    for axis, name in enumerate(("i1", "i2", "o1", "o2")):
        u = p[f"u_{name}"][p[f"rows_{name}"].astype(int)] @ np.diag(p[f"d_{name}"])
        out = np.moveaxis(np.tensordot(u, out, (1, axis)), 0, axis)
    return alpha * out.reshape(shape)


def check_value(bench):
    adapter = bench.noisy(METHOD)
    bench.agree(adapter, bench.w + delta(bench.numbers(adapter), (12, 8), 0.5), 5e-5)


def test_value(bench):
    check_value(bench)


def test_rank_is_that_of_the_square_from_four_vectors(bench):
    adapter = bench.noisy(METHOD)
    assert sum(x.size for x in jax.tree.leaves(adapter.trainable)) == 8  # LoRA of rank 1 has 20
    assert np.linalg.matrix_rank(bench.merged(adapter) - bench.w, tol=1e-4) == 4


def test_modes_are_as_even_as_divisors_allow():
    assert [modes(n) for n in (384, 12, 7, 1, 1536)] == [(16, 24), (3, 4), (1, 7), (1, 1), (32, 48)]


def test_sites_share_factors_and_take_their_first_rows():
    shapes = {"w": (12, 8), "x": (8, 12)}
    sites = [(jl.Site(n, s, "io", np.dtype("float32"), ("dot",), group="*0"), METHOD)
             for n, s in shapes.items()]  # fmt: skip
    params = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
    made = initialise(jax.random.key(0), sites, params)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda t: t + rng.normal(size=t.shape).astype("f4"), made.trainable)
    shared = {k: np.asarray(v, np.float64) for k, v in made.frozen["*0"].items()}
    assert shared["u_i1"].shape == (3, 2) and shared["u_i2"].shape == (4, 2)
    merged = jl.merge(params, made.replace(trainable=moved))
    for n, shape in shapes.items():
        own = {k: np.asarray(v, np.float64) for k, v in {**made.frozen[n], **moved[n]}.items()}
        np.testing.assert_allclose(merged[n], delta(shared | own, shape, 0.5), atol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match=r"TeRA\.rank: got 0, expected an integer of at least 1"):
        TeRA(rank=0)
    with pytest.raises(ValueError, match=r"TeRA\.zero: got 'x', expected one of"):
        TeRA(zero="x")


def test_mutation_a_core_with_two_modes_exchanged_is_seen(bench, monkeypatch):
    good = TeRA.factors
    turned = lambda self, p: good(self, p | {"core": p["core"].transpose(0, 2, 1, 3)})  # noqa: E731
    monkeypatch.setattr(TeRA, "factors", turned)
    with pytest.raises(AssertionError):
        check_value(bench)
