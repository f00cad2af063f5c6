"""LoKr against np.kron, and what the mixed product saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import algebra
from jlora.methods.kronecker.lokr import LoKr, split

FORMS = {
    "full": (LoKr(rank=8, alpha=4.0, factor=2), {"w1", "w2"}),
    "second": (LoKr(rank=2, alpha=4.0, factor=2), {"w1", "a2", "b2"}),
    "sizes": (LoKr(rank=8, alpha=4.0, sizes=(6, 2)), {"w1", "w2"}),
    "both": (LoKr(rank=1, alpha=4.0, decompose_both=True), {"a1", "b1", "a2", "b2"}),
}


def dense(p):
    w1 = p["w1"] if "w1" in p else p["a1"] @ p["b1"]
    w2 = p["w2"] if "w2" in p else p["a2"] @ p["b2"]
    return p["scale"] * np.kron(w1, w2)


def check_value(bench, method, names):
    adapter = bench.noisy(method)
    assert adapter.trainable["w"].keys() == names
    bench.agree(adapter, bench.w + dense(bench.numbers(adapter)))


@pytest.mark.parametrize("form", FORMS)
def test_value(bench, form):
    check_value(bench, *FORMS[form])


@pytest.mark.parametrize("form", FORMS)
def test_factors_and_algebra_are_exact(bench, form):
    method, _ = FORMS[form]
    adapter = bench.noisy(method)
    delta = dense(bench.numbers(adapter))
    u, v = method.factors({**adapter.trainable["w"], **adapter.frozen["w"]})
    np.testing.assert_allclose(u @ v, delta, atol=1e-5)
    np.testing.assert_allclose(algebra.norm(adapter), np.linalg.norm(delta), rtol=1e-5)


def test_chosen_sizes(bench):
    """DiffuseKronA: any divisors, of both sides separately; `factor` would give (6, 4)."""
    p = bench.fresh(FORMS["sizes"][0]).trainable["w"]
    assert {name: t.shape for name, t in p.items()} == {"w1": (6, 2), "w2": (2, 4)}
    with pytest.raises(
        ValueError, match=r"w: LoKr sizes: got \(5, 2\), expected divisors of 12 an"
    ):
        bench.fresh(LoKr(sizes=(5, 2)))
    with pytest.raises(ValueError, match=r"LoKr\.sizes: got \(6, 2\) and the factor 2, expected"):
        LoKr(sizes=(6, 2), factor=2)
    with pytest.raises(ValueError, match=r"LoKr\.sizes: got 0, expected an integer of at least 1"):
        LoKr(sizes=(0, 2))


def test_rank_is_the_product_of_the_ranks(bench):
    delta = dense(bench.numbers(bench.noisy(FORMS["second"][0])))
    assert np.linalg.matrix_rank(delta) == 4  # 2 (w1) times 2 (a2 b2)


def check_swapped(i1, o1, window):
    """W2 ⊗ W1 at each place of the window, by np.kron."""
    rng, (before, after) = np.random.default_rng(0), window
    p = {"w1": rng.normal(size=(i1, o1)), "w2": rng.normal(size=(before, 2, after, 5))}
    p = {"scale": np.asarray(0.5), **p}
    places = [np.kron(p["w2"][k, :, m], p["w1"]) for k, m in np.ndindex(before, after)]
    want = 0.5 * np.stack(places).reshape(before, after, 2 * i1, -1).swapaxes(1, 2)
    want = want.reshape(-1, 5 * o1)
    arrays = {name: jnp.asarray(t, jnp.float32) for name, t in p.items()}
    method = LoKr(rank=8, swapped=True)
    w, x = jnp.ones(want.shape), jnp.asarray(rng.normal(size=(7, len(want))), jnp.float32)
    np.testing.assert_allclose(method.merge(w, arrays) - 1, want, atol=1e-5)
    u, v = method.factors(arrays)
    assert u.shape[1] == 5 * min(i1, o1) and method.kron(arrays) is None
    np.testing.assert_allclose(u @ v, want, atol=1e-5)
    y = method.apply(x, w, arrays, {})
    np.testing.assert_allclose(y, np.asarray(x) @ (1 + want), atol=1e-4)
    assert np.abs(np.kron(p["w1"], p["w2"][0, :, 0]) - places[0]).max() > 0.1


@pytest.mark.parametrize(("i1", "o1"), [(2, 3), (3, 2)])
@pytest.mark.parametrize("window", [(4, 1), (1, 4)])
def test_swapped_factors_are_their_product_in_the_other_order(i1, o1, window):
    check_swapped(i1, o1, window)


def test_mutation_factors_of_the_usual_order_are_seen(monkeypatch):
    def usual(self, w, p):
        return w + jnp.einsum("bcas,io->bicaos", p["w2"], p["scale"] * p["w1"]).reshape(w.shape)

    monkeypatch.setattr(LoKr, "merge", usual)
    with pytest.raises(AssertionError):
        check_swapped(2, 3, (4, 1))


def test_split():
    dims = [(12,), (12, 2), (12, 6), (12, 5), (384, 8), (7,), (7, 3), (128, 4)]
    want = [(3, 4), (2, 6), (6, 2), (3, 4), (8, 48), (1, 7), (1, 7), (4, 32)]
    assert [split(*d) for d in dims] == want


def test_the_fast_path_costs_less_than_a_dense_delta():
    x, w = jnp.zeros((64, 256)), jnp.zeros((256, 256))
    method = LoKr(rank=4)
    shapes = {"w1": (16, 16), "a2": (16, 4), "b2": (4, 16), "scale": ()}
    p = {k: jnp.ones(s) for k, s in shapes.items()}

    def flops(fn):
        (cost,) = [jax.jit(fn).lower(x, w, p).compile().cost_analysis()]
        return cost["flops"] - 2 * 64 * 256 * 256

    fast = flops(lambda x, w, p: method.apply(x, w, p, {}))
    assert fast < 0.2 * flops(lambda x, w, p: x @ method.merge(w, p) + x @ w)


def test_refusals():
    with pytest.raises(ValueError, match=r"LoKr\.factor: got 0, expected an integer"):
        LoKr(factor=0)


def test_mutation_swapped_factors_are_seen(bench, monkeypatch):
    good = LoKr.parts
    method, names = FORMS["full"]

    def swapped(self, p):
        a, u, v = good(self, p)
        return a.at[0].set(a[1]).at[1].set(a[0]), u, v

    monkeypatch.setattr(LoKr, "parts", swapped)
    with pytest.raises(AssertionError):
        check_value(bench, method, names)
