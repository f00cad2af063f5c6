"""Conversion to LoRA by every budget, and adapters of different types merged through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.algebra import LowRank
from jlora.merging import to_lora

METHODS = {
    "lora": jl.LoRA(3, 6.0),
    "loha": jl.LoHa(2),
    "lokr": jl.LoKr(rank=1, factor=4),
    "dora": jl.DoRA(2),
    "oft": jl.OFT(block=4),
    "ia3": jl.IA3("out"),
    "hira": jl.HiRA(2),
    "stacked": jl.DoRA(2),
}
X = jnp.ones((2, 8))


def model(p, x):
    for name in METHODS:
        if name != "stacked":
            x = (x @ p[name])[:, :8]
    return jax.lax.scan(lambda c, w: ((c @ w)[:, :8], None), x, p["stacked"])[0]


def weights():
    rng = np.random.default_rng(0)
    return {
        k: jnp.asarray(rng.normal(size=(2, 8, 12) if k == "stacked" else (8, 12)), jnp.float32)
        for k in METHODS
    }


@pytest.fixture(scope="module")
def base():
    return weights()


def random(base, methods, seed=0):
    a = jl.init(jax.random.key(seed), model, base, X, methods=methods)
    rng = np.random.default_rng(seed)
    move = lambda t: t + jnp.asarray(0.3 * rng.normal(size=t.shape), t.dtype)  # noqa: E731
    return a.replace(trainable=jax.tree.map(move, a.trainable))


@pytest.fixture(scope="module")
def adapter(base):
    return random(base, {f"^{k}$": m for k, m in METHODS.items()})


def check(made, base, adapter):
    """Errors, norms and total are those of the dense deltas."""
    want, got = jl.delta(base, adapter), jl.delta(base, made.adapter)
    total = 0.0
    for path in want:
        gap = np.linalg.norm(np.asarray(want[path], np.float64) - got[path], axis=(-2, -1))
        size = np.linalg.norm(want[path], axis=(-2, -1))
        np.testing.assert_allclose(made.errors[path], gap, atol=2e-5 * size.max(), rtol=1e-4)
        np.testing.assert_allclose(made.norms[path], size, rtol=1e-4)
        total += (gap**2).sum()
    np.testing.assert_allclose(made.total, np.sqrt(total), rtol=1e-4, atol=1e-4)
    assert all(isinstance(m, jl.LoRA) for _, m in made.adapter.sites)


def test_exact(base, adapter):
    made = to_lora(adapter, base)
    check(made, base, adapter)
    assert float(made.total) == 0
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8)), jnp.float32)
    tuned = jl.lift(model)
    want = tuned(base, adapter, x)
    np.testing.assert_allclose(tuned(base, made.adapter, x), want, rtol=1e-3)


def test_by_rank_and_under_jit(base, adapter):
    made = to_lora(adapter, base, rank=2)
    check(made, base, adapter)
    assert {m.rank for _, m in made.adapter.sites} == {2}
    jitted = jax.jit(lambda a, p: to_lora(a, p, rank=2).total)(adapter, base)
    np.testing.assert_allclose(jitted, made.total, rtol=1e-4)


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_by_energy(energy, base, adapter):
    """Each site keeps the share, and one rank less would not."""
    made = to_lora(adapter, base, energy=energy)
    check(made, base, adapter)
    spectra = {p: np.linalg.svd(d, compute_uv=False) for p, d in jl.delta(base, adapter).items()}
    for site, method in made.adapter.sites:
        s2 = spectra[site.path].reshape(-1, 8).astype(np.float64) ** 2
        share = s2[:, : method.rank].sum(1) / s2.sum(1)
        assert (share >= energy - 1e-6).all()
        if method.rank > 1 and energy < 1:
            less = s2[:, : method.rank - 1].sum(1) / s2.sum(1)
            assert less.min() < energy


def spectra(**values):
    """An adapter of diagonal deltas with these singular values."""
    params = {k: jnp.zeros((4, 4)) for k in values}
    a = jl.init(jax.random.key(0), lambda p, x: sum(x @ w for w in p.values()), params,
                jnp.ones((1, 4)), methods={".*": jl.LoRA(4, 4.0)})  # fmt: skip
    new = {k: {"a": jnp.diag(jnp.asarray(s)), "b": jnp.eye(4)} for k, s in values.items()}
    return a.replace(trainable=new)


def test_ranks_by_energy_and_error_by_hand():
    """Squares 16 4 1 0 (sum 21) and 9 4 4 1 (sum 18): 90 % and 85 % of each, 30 % of all 39."""
    a = spectra(x=[4.0, 2.0, 1.0, 0.0], y=[3.0, 2.0, 2.0, 1.0])

    def ranks(**budget):
        made = to_lora(a, **budget)
        return {s.path: m.rank for s, m in made.adapter.sites}, float(made.total)

    assert ranks(energy=0.9)[0] == {"x": 2, "y": 3} and ranks(energy=0.7)[0] == {"x": 1, "y": 2}
    assert ranks(energy=0.96)[0] == {"x": 3, "y": 4} and ranks(energy=1.0)[0] == {"x": 3, "y": 4}
    for error, want, lost in ((0.3, {"x": 2, "y": 3}, 2), (0.2, {"x": 3, "y": 4}, 0)):
        got, total = ranks(error=error)
        np.testing.assert_allclose(total, np.sqrt(lost), atol=1e-5)
        assert got == want
    assert ranks(error=0.99)[0] == {"x": 1, "y": 1}


def test_the_slices_of_a_stack_have_the_rank_that_one_of_them_needs():
    s = jnp.asarray([[4.0, 0.1, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    low = LowRank(jax.vmap(jnp.diag)(s), jnp.stack([jnp.eye(4)] * 2))
    site = jl.Site("s", (2, 4, 4), "sio", jnp.dtype("float32"), ("dot",))
    a = jl.merging.to_adapter({"s": low}, [site])
    for budget, want in (({"energy": 0.9}, 3), ({"energy": 0.5}, 2), ({"error": 0.3}, 3)):
        made = to_lora(a, **budget)
        assert made.adapter.sites[0][1].rank == want
    np.testing.assert_allclose(to_lora(a, rank=1).errors["s"], [0.1, np.sqrt(2)], rtol=1e-5)


def test_by_error_is_the_least_total_rank(base, adapter):
    made = to_lora(adapter, base, error=0.3)
    check(made, base, adapter)
    size = np.sqrt(sum((np.asarray(n) ** 2).sum() for n in made.norms.values()))
    assert float(made.total) <= 0.3 * size
    # greedy over all singular values, by numpy
    every = [
        (v**2, p)
        for p, d in jl.delta(base, adapter).items()
        for s in np.linalg.svd(d, compute_uv=False).reshape(-1, 8)
        for v in s
    ]
    spent, cut = 0.0, {}
    for v, p in sorted(every):
        if spent + v > (0.3 * size) ** 2:
            break
        spent, cut[p] = spent + v, cut.get(p, 0) + 1
    for site, method in made.adapter.sites:
        if not site.stack:
            assert method.rank == max(1, 8 - cut.get(site.path, 0)), site.path


def test_mutation_a_wrong_error_is_seen(base, adapter):
    made = to_lora(adapter, base, rank=2)
    wrong = {p: 1.1 * e + 0.1 for p, e in made.errors.items()}
    with pytest.raises(AssertionError):
        check(made._replace(errors=wrong), base, adapter)


def test_different_types_merge_together(base):
    """LoRA + LoHa + LoKr through factors, with OFT + IA3 + DoRA through the weights."""
    kinds = [jl.LoRA(2), jl.LoHa(2), jl.LoKr(rank=1, factor=4), jl.OFT(block=4), jl.IA3("out"),
             jl.DoRA(2)]  # fmt: skip
    many = [random(base, {"^(lora|loha|stacked)$": m}, k) for k, m in enumerate(kinds)]
    w = np.array([0.3, 0.2, 0.1, 0.2, 0.15, 0.05], np.float32)
    merged = jl.merging.merge("concat", many, w, params=base)
    got = jl.delta(base, merged)
    deltas = [jl.delta(base, a) for a in many]
    for path in got:
        want = sum(c * np.asarray(d[path], np.float64) for c, d in zip(w, deltas, strict=True))
        np.testing.assert_allclose(got[path], want, atol=1e-4)
    cut = jl.merging.merge("truncated", many, w, options={"rank": 4}, params=base)
    best = {p: np.linalg.svd(d, compute_uv=False) for p, d in got.items()}
    for path, d in jl.delta(base, cut).items():
        error = np.linalg.norm(np.asarray(d) - got[path], axis=(-2, -1))
        np.testing.assert_allclose(error, np.sqrt((best[path][..., 4:] ** 2).sum(-1)), rtol=1e-3)


def test_a_bank_of_unfactored_adapters(base):
    bank = jl.stack([random(base, {"^dora$": jl.DoRA(2)}, k) for k in range(2)])
    got = jl.delta(base, jl.merging.merge("concat", bank, params=base))["dora"]
    want = sum(jl.delta(base, bank[k])["dora"] for k in range(2)) / 2
    np.testing.assert_allclose(got, want, atol=1e-5)


def whole_stacks(jaxpr):
    """Primitives that make an array as large as the deltas of the whole stack [2, 8, 12]."""
    for e in jaxpr.eqns:
        inner = [v.jaxpr if hasattr(v, "jaxpr") else v for v in e.params.values()]
        inner = [v for v in inner if hasattr(v, "eqns")]
        for v in inner:
            yield from whole_stacks(v)
        if not inner and any(getattr(v.aval, "size", 0) >= 2 * 8 * 12 for v in e.outvars):
            yield e.primitive.name


def test_one_slice_at_a_time(base):
    """The weight is reshaped; no other array is as large as the dense deltas of a stack."""
    only = random(base, {"^stacked$": jl.DoRA(2)})
    run = lambda a, p: to_lora(a, p, rank=2).total  # noqa: E731
    assert set(whole_stacks(jax.make_jaxpr(run)(only, base).jaxpr)) <= {"reshape", "transpose"}
    dense = jax.make_jaxpr(lambda a, p: jl.delta(p, a))(only, base).jaxpr
    assert "sub" in set(whole_stacks(dense))  # the check can fail


REFUSALS = {
    "params": (lambda a, p: to_lora(a), "dora: got DoRA and no params"),
    "two budgets": (lambda a, p: to_lora(a, p, rank=2, energy=0.5), "at most one"),
    "rank": (lambda a, p: to_lora(a, p, rank=0), "rank: got 0"),
    "energy": (lambda a, p: to_lora(a, p, energy=1.5), "energy: got 1.5"),
    "error": (lambda a, p: to_lora(a, p, error=1.0), "error: got 1.0"),
    "site": (
        lambda a, p: to_lora(a, {k: v for k, v in p.items() if k != "oft"}),
        "site oft is not in params",
    ),
    "merge of an unknown site": (
        lambda a, p: jl.merging.merge("concat", [a], params={"x": p["oft"]}),
        "is not in params",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name, base, adapter):
    call, text = REFUSALS[name]
    with pytest.raises(ValueError, match=text):
        call(adapter, base)


def test_a_delta_of_the_activation_is_refused(base):
    a = random(base, {"^lora$": jl.TokenMask(jl.LoRA(2))})
    with pytest.raises(ValueError, match="lora: got TokenMask, whose delta depends"):
        to_lora(a, base)


def test_adapters_in_bfloat16_are_converted_and_merged_exactly():
    """The scale 2 / 3 is no bfloat16; a certificate of no error says the truth."""
    params, x = {"w": jnp.asarray(np.eye(8, 6), jnp.float32)}, jnp.ones((1, 8))
    a = jl.init(
        jax.random.key(0), lambda p, x: x @ p["w"], params, x, methods={"w": jl.LoRA(3, alpha=2.0)}
    )
    a = a.replace(trainable=jax.tree.map(lambda t: (t + 0.3).astype(jnp.bfloat16), a.trainable))
    t = {k: np.asarray(v, np.float64) for k, v in a.trainable["w"].items()}
    want = np.asarray(a.frozen["w"]["scale"], np.float64) * t["a"] @ t["b"]
    got = jl.merging.to_lora(a)
    merged = jl.merging.merge("concat", [a, a])
    for one in (a, got.adapter, merged):
        np.testing.assert_allclose(jl.delta(params, one)["w"], want, rtol=1e-5, atol=1e-6)
    assert got.total == 0
