"""Factored algebra against dense numpy in float64, on LoRA-like, LoHa-like and LoKr-like deltas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import algebra as al
from jlora.algebra import sums
from jlora.core.adapter import Adapter
from jlora.core.method import Method
from jlora.core.site import Site

STACK, D_IN, D_OUT = (2,), 12, 8


def f32(x):
    return jnp.asarray(x, jnp.float32)


def low(rng, r, stack=STACK, n=()):
    shapes = (*n, *stack, D_IN, r), (*n, *stack, r, D_OUT)
    return al.LowRank(*(f32(rng.normal(size=s)) for s in shapes))


def kro(rng, r, stack=STACK, n=()):
    shapes = (*n, *stack, 3, 2), (*n, *stack, 4, r), (*n, *stack, r, 4)
    return al.Kron(*(f32(rng.normal(size=s)) for s in shapes))


def dense(x):
    x = jax.tree.map(lambda t: np.asarray(t, np.float64), x)
    if isinstance(x, al.LowRank):
        return x.u @ x.v
    lead, b = x.a.shape[:-2], x.u @ x.v
    flat = [np.kron(p, q) for p, q in zip(x.a.reshape(-1, 3, 2), b.reshape(-1, 4, 4), strict=True)]
    return np.stack(flat).reshape(*lead, D_IN, D_OUT)


def full(ds):
    return {k: dense(d) for k, d in ds.items()}


def dot(x, y):
    return sum(np.sum(x[k] * y[k]) for k in x if k in y)


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    x = {"p": low(rng, 3), "q": kro(rng, 2), "only_x": low(rng, 2, ())}
    y = {"p": low(rng, 2), "q": kro(rng, 3), "only_y": low(rng, 2, ())}
    return x, y


@pytest.fixture(scope="module")
def bank():
    rng = np.random.default_rng(1)
    return {"p": low(rng, 3, n=(5,)), "q": kro(rng, 2, n=(5,))}


def test_add_scale_low_rank_are_exact(pair):
    x, y = pair
    both = al.add(x, al.scale(y, -0.5))
    want = full(x)
    for k, d in full(y).items():
        want[k] = want.get(k, 0) - 0.5 * d
    assert both.keys() == want.keys()
    for k in want:
        np.testing.assert_allclose(dense(both[k]), want[k], atol=2e-5)
    assert both["p"].u.shape == (2, D_IN, 5)
    wide = al.Kron(x["q"].a.mT, x["q"].v.mT, x["q"].u.mT)  # the other branch: i1 < o1
    flipped = np.swapaxes(dense(x["q"]), -1, -2)
    np.testing.assert_allclose(dense(al.low_rank(wide)), flipped, atol=1e-5)


def test_inner_norm_cosine_distance_match_dense(pair):
    x, y = pair
    fx, fy = full(x), full(y)
    np.testing.assert_allclose(al.inner(x, y), dot(fx, fy), rtol=1e-5)
    np.testing.assert_allclose(al.norm(x), np.sqrt(dot(fx, fx)), rtol=1e-5)
    cosine = dot(fx, fy) / np.sqrt(dot(fx, fx) * dot(fy, fy))
    np.testing.assert_allclose(al.cosine(x, y), cosine, rtol=1e-5, atol=1e-6)
    mixed = {"p": x["p"], "q": al.low_rank(x["q"])}
    want = dot(full(mixed), fy)
    np.testing.assert_allclose(al.inner(mixed, y), want, rtol=1e-5)  # LowRank against Kron
    far = np.sqrt(dot(fx, fx) + dot(fy, fy) - 2 * dot(fx, fy))
    np.testing.assert_allclose(al.distance(x, y), far, rtol=1e-5)
    zero = al.scale(x, 0.0)
    assert float(al.cosine(zero, y)) == 0.0


def test_distance_of_neighbours_does_not_cancel(pair):
    x = {"p": pair[0]["p"]}
    near = al.add(x, al.scale({"p": low(np.random.default_rng(3), 1)}, 1e-5))
    want = np.linalg.norm(full(near)["p"] - full(x)["p"])
    np.testing.assert_allclose(al.distance(x, near), want, rtol=0.05)
    by_gram = al.inner(x, x) + al.inner(near, near) - 2 * al.inner(x, near)
    naive = np.sqrt(abs(float(by_gram)))  # the shortcut this test is here to exclude
    assert abs(naive - want) > 0.5 * want


def test_gram_matches_dense_and_is_one_matmul_a_factor(bank):
    f = full(bank)
    want = sum(np.einsum("nlio,mlio->nm", d, d) for d in f.values())
    np.testing.assert_allclose(jax.jit(al.gram)(bank), want, rtol=1e-4, atol=1e-3)
    other = jax.tree.map(lambda t: t[:2] * 0.5, bank)
    cross = sum(np.einsum("nlio,mlio->nm", f[k], full(other)[k]) for k in f)
    np.testing.assert_allclose(al.gram(bank, other), cross, rtol=1e-4, atol=1e-3)
    norms = np.sqrt(np.diag(want))
    np.testing.assert_allclose(
        al.similarity(bank), want / norms[:, None] / norms[None], rtol=1e-4, atol=1e-5
    )
    text = str(jax.make_jaxpr(al.gram)({"p": bank["p"]}))
    assert text.count("dot_general") == 2
    assert f"[5,5,{D_IN},{D_OUT}]" not in text.replace(" ", "")


def test_combine_is_the_weighted_sum(bank):
    w = np.arange(1.0, 6.0)
    got = al.combine(bank, jnp.asarray(w, jnp.float32))
    for k, d in full(bank).items():
        np.testing.assert_allclose(dense(got[k]), np.einsum("n,nlio->lio", w, d), atol=2e-4)


def test_svd_is_exact_also_for_sums_wider_than_the_matrix(pair, bank):
    for x in (al.add(*pair), al.combine(bank, jnp.ones(5))):
        for k, (u, s, v) in al.svd(x).items():
            d = dense(x[k])
            want = np.linalg.svd(d, compute_uv=False)[..., : s.shape[-1]]
            np.testing.assert_allclose(s, want, atol=1e-4 * want.max())
            np.testing.assert_allclose((u * s[..., None, :]) @ v, d, atol=1e-4 * want.max())
            unit = np.broadcast_to(np.eye(s.shape[-1]), (*s.shape, s.shape[-1]))
            np.testing.assert_allclose(u.mT @ u, unit, atol=1e-5)
            np.testing.assert_allclose(al.singular_values(x)[k], s, atol=1e-4 * want.max())


def test_truncation_certificate_is_the_true_error_and_the_optimum(pair):
    x = al.add(*pair)
    kept, errors, total = al.truncate(x, 2)
    true = {k: np.linalg.norm(dense(x[k]) - dense(kept[k]), axis=(-2, -1)) for k in x}
    for k in x:
        np.testing.assert_allclose(errors[k], true[k], rtol=1e-4, atol=1e-4)
        s = np.linalg.svd(dense(x[k]), compute_uv=False)
        best = np.sqrt(np.sum(s[..., 2:] ** 2, -1))
        np.testing.assert_allclose(errors[k], best, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            np.linalg.norm(kept[k].u, axis=-2), np.linalg.norm(kept[k].v, axis=-1), rtol=1e-4
        )
    np.testing.assert_allclose(total, np.sqrt(sum(np.sum(e**2) for e in true.values())), rtol=1e-4)
    assert float(al.truncate(x, 8).total) < 1e-4 * float(al.norm(x))  # limit: nothing is cut
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        al.truncate(x, 0)


def test_principal_angles_known_by_construction():
    t = np.array([1e-4, 0.3, 1.2])
    rng = np.random.default_rng(5)
    q = np.linalg.qr(rng.normal(size=(D_IN, 6)))[0]
    u1, u2 = q[:, :3], q[:, :3] * np.cos(t) + q[:, 3:] * np.sin(t)
    mix = rng.normal(size=(3, 3)) + 3 * np.eye(3)
    v = rng.normal(size=(3, D_OUT))
    x = {"p": al.LowRank(f32(u1), f32(v))}
    y = {"p": al.LowRank(f32(u2 @ mix), f32(np.linalg.solve(mix, v)))}
    left, right = al.principal_angles(x, y)["p"]
    np.testing.assert_allclose(left, t, rtol=1e-2, atol=2e-6)
    np.testing.assert_allclose(right, np.zeros(3), atol=1e-5)
    padded = {"p": al.LowRank(jnp.pad(y["p"].u[:, :2], ((0, 0), (0, 1))), y["p"].v)}
    assert abs(float(al.principal_angles(x, padded)["p"][0][-1]) - np.pi / 2) < 1e-6


def test_gauge_invariance(pair):
    x, y = pair
    g = jnp.asarray(np.random.default_rng(7).normal(size=(3, 3)) + 2 * np.eye(3), jnp.float32)
    other = x | {"p": al.LowRank(x["p"].u @ g[None], jnp.linalg.solve(g[None], x["p"].v))}
    np.testing.assert_allclose(al.inner(x, y), al.inner(other, y), rtol=1e-4)
    assert float(al.distance(x, other)) < 1e-4 * float(al.norm(x))


def test_vmap_jit_and_gradient(bank):
    loop = [al.norm(jax.tree.map(lambda t: t[n], bank)) for n in range(5)]  # noqa: B023
    np.testing.assert_allclose(jax.jit(jax.vmap(al.norm))(bank), loop, rtol=1e-5)
    x, y = (jax.tree.map(lambda t: t[n], bank["p"]) for n in (0, 1))  # noqa: B023
    got = jax.grad(lambda u: al.inner({"p": x._replace(u=u)}, {"p": y}))(x.u)
    np.testing.assert_allclose(got, dense(y) @ np.swapaxes(x.v, -1, -2), rtol=1e-4, atol=1e-4)


@dataclasses.dataclass(frozen=True)
class Product(Method):
    def factors(self, p):
        return p["scale"] * p["a"] * p["d"][None, :], p["b"]


def test_deltas_reads_factors_over_stack_axes_and_names_what_has_none():
    leaf = low(np.random.default_rng(9), 2, (3, 2))
    site = Site("w", (3, 2, D_IN, D_OUT), "ssio", np.dtype("float32"), group="g")
    trainable = {"w": {"a": leaf.u, "b": leaf.v}}
    frozen = {"w": {"scale": jnp.full((3, 2), 2.0)}, "g": {"d": jnp.asarray([1.0, 3.0])}}
    adapter = Adapter(trainable, frozen, ((site, Product()),))
    want = 2 * np.asarray(leaf.u) * np.array([1, 3]) @ leaf.v
    np.testing.assert_allclose(dense(al.deltas(adapter)["w"]), want, rtol=1e-5)
    half = jax.tree.map(lambda t: t.astype(jnp.bfloat16), adapter)
    assert al.deltas(half)["w"].u.dtype == jnp.float32 == al.norm(half).dtype
    with pytest.raises(TypeError, match="w: Method has no factored delta"):
        al.deltas(adapter.replace(sites=((site, Method()),)))


def test_mutation_a_wrong_contraction_is_seen(bank, monkeypatch):
    good = sums.einsum
    monkeypatch.setattr(sums, "einsum", lambda s, x, y: good(s, x, y) * 1.01)
    with pytest.raises(AssertionError):
        test_gram_matches_dense_and_is_one_matmul_a_factor(bank)
