"""Row blocks and back to factors: values, the best rank, the certificate, memory, gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.algebra import LowRank
from jlora.merging.elementwise.ties import ties, ties_rule
from jlora.merging.engine import streamed
from jlora.merging.engine.election import weighted
from jlora.merging.engine.streamed import Solver
from jlora.merging.exact.concat import concat

N, D_IN, D_OUT, R = 3, 26, 20, 2
W = jnp.asarray([0.5, 0.3, 0.2], jnp.float32)


def make(n=N, d_in=D_IN, d_out=D_OUT, r=R, seed=0):
    rng = np.random.default_rng(seed)
    u, v = rng.normal(size=(n, d_in, r)), rng.normal(size=(n, r, d_out))
    return LowRank(jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32))


BANK = make()
DENSE = np.einsum("nir,nro->nio", np.asarray(BANK.u, float), np.asarray(BANK.v, float))


def bent(d, numbers):
    """A rule that is not linear, differs by row, and maps zero to zero."""
    return jnp.sum(jnp.sin(d), axis=0) * (1.0 + numbers.astype(d.dtype))[:, None]


BENT = np.sin(DENSE).sum(0) * (1.0 + np.arange(D_IN))[:, None]


@pytest.mark.parametrize("block", [1, 7, 26, 100, None])
def test_any_block_gives_the_same_matrix(block):
    got = streamed.dense(BANK, bent, block=block)
    np.testing.assert_allclose(got, BENT, rtol=1e-4, atol=1e-4)


BASE = np.random.default_rng(9).normal(size=(D_IN, D_OUT))


def check_into(block):
    got = streamed.into(BANK, bent, jnp.asarray(BASE, jnp.float32), block=block)
    np.testing.assert_allclose(got, BASE + BENT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [1, 7, 26, 100, None])
def test_into_a_base_by_any_block(block):
    check_into(block)


def test_into_a_base_of_another_dtype_or_shape():
    base = jnp.asarray(BASE, jnp.bfloat16)
    got = streamed.into(BANK, bent, base, block=7)
    want = (base.astype(jnp.float32) + jnp.asarray(BENT, jnp.float32)).astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(*(np.asarray(t, float) for t in (got, want)), rtol=1e-2, atol=1e-4)
    with pytest.raises(ValueError, match=r"base: got shape \(20, 26\), expected \(26, 20\)"):
        streamed.into(BANK, bent, base.T)


def test_into_takes_the_place_of_a_donated_base():
    bank = make(8, 256, 256, 4)
    merge = jax.jit(lambda bank, base: streamed.into(bank, bent, base, block=8), donate_argnums=1)
    memory = merge.lower(bank, jnp.zeros((256, 256))).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 4 * 256 * 256
    assert memory.temp_size_in_bytes < 4 * 256 * 256  # 8 x 8 x 256 deltas and a block's sum


def test_gradients_of_into_are_the_dense_ones():
    def loss(bank, base):
        return jnp.sum(jnp.sin(streamed.into(bank, bent, base, block=7)))

    def dense_loss(bank, base):
        deltas = jnp.einsum("nir,nro->nio", bank.u, bank.v)
        return jnp.sum(jnp.sin(base + bent(deltas, jnp.arange(D_IN))))

    bank = LowRank(BANK.u * 0.1, BANK.v)
    args = bank, jnp.asarray(BASE, jnp.float32)
    got, want = (jax.jit(jax.grad(f, argnums=(0, 1)))(*args) for f in (loss, dense_loss))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-3, atol=2e-3), got, want)


def test_mutation_rows_of_a_last_block_added_twice_fail(monkeypatch):
    monkeypatch.setattr(streamed.jnp, "where", lambda c, a, b: a)
    with pytest.raises(AssertionError):
        check_into(7)


def test_full_rank_is_exact():
    low = jax.jit(lambda bank: streamed.factor(bank, bent, D_OUT))(BANK)
    np.testing.assert_allclose(low.u @ low.v, BENT, rtol=1e-3, atol=1e-3)


def check_best(rank, solver):
    """The error is within 2 % of the best of that rank, and measured right."""
    low, error, norm = jax.jit(lambda bank: streamed.certified(bank, bent, rank, solver))(BANK)
    best = np.sqrt((np.linalg.svd(BENT, compute_uv=False)[rank:] ** 2).sum())
    true = np.linalg.norm(BENT - np.asarray(low.u, float) @ np.asarray(low.v, float))
    assert low.u.shape == (D_IN, rank) and low.v.shape == (rank, D_OUT)
    np.testing.assert_allclose(low.u.T @ low.u, np.eye(rank), atol=1e-5)
    assert best * (1 - 1e-5) <= true <= 1.02 * best
    np.testing.assert_allclose([error, norm], [true, np.linalg.norm(BENT)], rtol=1e-4)


@pytest.mark.parametrize(
    "solver", [Solver(oversample=4, block=7, store=False), Solver(oversample=4, store=True)]
)
@pytest.mark.parametrize("rank", [1, 6])
def test_rank_is_cut_at_its_best(rank, solver):
    check_best(rank, solver)


def test_mutation_powers_of_the_transposed_matrix_fail(monkeypatch):
    real = streamed._left
    monkeypatch.setattr(streamed, "_left", lambda *a: real(*a)[::-1])
    with pytest.raises(AssertionError):
        check_best(6, Solver(oversample=4, store=False))


def test_stored_or_not_the_answer_is_one():
    """Values, and slopes by weights and factors."""

    def run(store):
        def loss(bank, w):
            solver = Solver(power=1, store=store, block=7)
            low = ties(bank, w, density=0.5, rank=6, solver=solver)
            return jnp.sum(jnp.sin(low.u @ low.v)), low

        (_, low), slopes = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(BANK, W)
        return low.u @ low.v, slopes

    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
    jax.tree.map(close, run(False), run(True))


@pytest.mark.parametrize(
    "shape, dtype, stored",
    [
        ((1024, 1024), "float32", True),
        ((1024, 1025), "float32", False),
        ((2, 2**19), "float32", True),
        ((1024, 1024), "float64", False),
        ((1024, 2048), "bfloat16", True),
    ],
)
def test_what_is_stored_by_default(shape, dtype, stored):
    assert Solver().stores(*shape, jnp.dtype(dtype)) is stored
    assert Solver(store=True).stores(*shape, jnp.dtype(dtype))
    assert not Solver(store=False).stores(*shape, jnp.dtype(dtype))


def test_mutation_without_power_iterations_fails():
    with pytest.raises(AssertionError):
        check_best(6, Solver(power=0, oversample=0))


def test_a_linear_rule_is_the_exact_sum():
    """The limit: default rank N R loses nothing of a weighted sum, and the certificate says so."""
    run = jax.jit(lambda bank: streamed.certified(bank, lambda d, numbers: weighted(d, W)))
    low, error, norm = run(BANK)
    exact = concat(BANK, W)
    np.testing.assert_allclose(low.u @ low.v, exact.u @ exact.v, rtol=1e-4, atol=1e-5)
    assert low.u.shape[-1] == N * R and float(error) < 1e-5 * float(norm)


def test_zero_adapters_give_zero():
    zero = jax.tree.map(jnp.zeros_like, BANK)
    low = jax.jit(lambda bank: streamed.factor(bank, bent, 3))(zero)
    assert float(jnp.abs(low.u @ low.v).max()) == 0


def test_flip():
    low = streamed.flip(BANK)
    np.testing.assert_allclose(low.u @ low.v, DENSE.swapaxes(1, 2), rtol=1e-4, atol=1e-5)


def test_gradient_of_weights_is_the_dense_one():
    """Where the rank suffices, and at the same memory as the value."""
    probe = jnp.asarray(np.random.default_rng(5).normal(size=(D_IN, D_OUT)), jnp.float32)

    def loss(w):
        low = streamed.factor(BANK, lambda d, numbers: weighted(d, w) ** 1, N * R)
        return jnp.sum((low.u @ low.v) * probe)

    expected = np.einsum("nio,io->n", DENSE, np.asarray(probe))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(W), expected, rtol=1e-4)


def summed(d, numbers):
    """A linear rule: a matrix of rank N R."""
    return weighted(d, W)


def check_slopes(shape, rule, rank, store):
    """The gradient by the factors of the adapters is that of the dense matrix."""
    bank = make(d_in=shape[0], d_out=shape[1], r=1)
    probe = jnp.asarray(np.random.default_rng(5).normal(size=shape), jnp.float32)

    def loss(bank):
        low = streamed.factor(bank, rule, rank, Solver(power=1, store=store))
        return jnp.sum((low.u @ low.v) * probe)

    def plain(bank):
        return jnp.sum(rule(bank.u @ bank.v, jnp.arange(shape[0])) * probe)

    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, rtol=2e-3, atol=2e-3),
        jax.jit(jax.grad(loss))(bank),
        jax.grad(plain)(bank),
    )


@pytest.mark.parametrize(
    "shape, rule, rank, store",
    [
        ((8, 6), bent, 6, True),
        ((6, 8), bent, 6, False),
        ((8, 6), bent, 6, False),
        ((9, 7), summed, 3, False),
        ((9, 7), summed, 5, True),
    ],
    ids=["tall", "wide", "tall, streamed", "sum", "a sum of less rank"],
)
def test_gradient_of_factors_where_the_rank_suffices(shape, rule, rank, store):
    check_slopes(shape, rule, rank, store)


def test_mutation_gradients_within_the_columns_fail(monkeypatch):
    """What moves out of the span of U is seen."""
    monkeypatch.setattr(streamed, "_slope_of", jnp.zeros_like)
    with pytest.raises(AssertionError):
        check_slopes((8, 6), bent, 6, True)


def test_values_alone_cost_no_pass_for_derivatives(monkeypatch):
    def passes():
        run = jax.jit(lambda bank: streamed.factor(bank, bent, 3, Solver(power=1, store=False)))
        return run.lower(BANK).compile().as_text().count(" while(")

    found = passes()
    monkeypatch.setattr(streamed, "_slope_of", jnp.zeros_like)
    assert found == passes() > 0


def buffers(compiled):
    """The sizes of all arrays in a compiled program, in elements."""
    found = re.findall(r"\b[fsu]\d+\[([\d,]+)\]", compiled.as_text())
    return {int(np.prod([int(n) for n in dims.split(",")])) for dims in found}


@pytest.mark.parametrize("grad", [False, True])
def test_peak_memory_is_bounded(grad):
    """Eight adapters of 512 x 512: no buffer as large as one dense delta, in all 1/8 of theirs."""
    bank, w = make(8, 512, 512, 4), jnp.full(8, 0.125)

    def run(bank, w):
        return ties(bank, w, rank=4, solver=Solver(power=1, store=False))

    def slope(bank, w):
        return jax.grad(lambda w: jnp.sum(run(bank, w).v))(w)

    compiled = jax.jit(slope if grad else run).lower(bank, w).compile()
    dense = 512 * 512
    assert max(buffers(compiled)) < dense
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * dense * 4 / 4


@pytest.mark.parametrize("store", [True, None])
def test_stored_memory_is_that_of_one_delta(store):
    bank, w = make(8, 512, 512, 4), jnp.full(8, 0.125)
    run = jax.jit(lambda bank, w: ties(bank, w, rank=4, solver=Solver(power=1, store=store)))
    compiled = run.lower(bank, w).compile()
    assert max(buffers(compiled)) == 512 * 512
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 512 * 512 * 4


def test_a_bank_of_sites_stores_one_delta_at_a_time():
    """What is told before a merge by default is one stored matrix more than if streamed."""
    shape = (256, 256)
    sites = [jl.Site(f"s{k}", shape, "io", jnp.dtype("float32"), ("dot",)) for k in range(8)]
    bank = jl.merging.to_adapter({s.path: make(2, *shape, 2) for s in sites}, sites)

    def told(store):
        solver = Solver(power=0, store=store)
        return jl.merging.peak_memory("consensus", bank, options={"rank": 2, "solver": solver})[
            "temporary"
        ]

    dense = 4 * 256 * 256
    assert dense / 2 < told(None) - told(False) < 3 * dense


def test_mutation_a_dense_bank_is_seen():
    bank, w = make(8, 512, 512, 4), jnp.full(8, 0.125)
    rule = ties_rule(bank, w, density=0.5)
    everything = jax.jit(lambda bank: rule(bank.u @ bank.v, jnp.arange(512)))
    assert max(buffers(everything.lower(bank).compile())) >= 8 * 512 * 512


@pytest.mark.parametrize("rank", [0, D_OUT + 1])
def test_bad_rank(rank):
    with pytest.raises(ValueError, match=f"rank: got {rank}, expected 1 to {D_OUT}"):
        streamed.factor(BANK, bent, rank)


@pytest.mark.parametrize("bad", [{"power": -1}, {"oversample": -1}, {"block": 0}])
def test_bad_solver(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: got"):
        Solver(**bad)
