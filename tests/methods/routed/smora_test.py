"""SMoRA: the value, its limits, a mixture of LoRAs as a case, balance by state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.routed import smora
from jlora.methods.routed.smora import SMoRA
from jlora.routing.state import advance

METHOD = SMoRA(rank=6, top_k=2, alpha=3.0, rate=0.01)


def moved(bench, method):
    """A noisy adapter with a bias."""
    adapter = bench.noisy(method)
    bias = jnp.asarray(np.random.default_rng(5).normal(size=method.rank) / 3, jnp.float32)
    return adapter.replace(frozen={"w": {**adapter.frozen["w"], "bias": bias}})


def expected(bench, method):
    p = bench.numbers(moved(bench, method))
    x = np.asarray(bench.x, np.float64).reshape(-1, 12)
    out = x @ bench.w
    for t, row in enumerate(x):
        logits = np.repeat(row @ p["router"], method.partition)
        s = 1 / (1 + np.exp(-logits))
        if method.gate == "softmax":
            s = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-(s + p["bias"]), kind="stable")[: method.top_k]
        for i in best:
            gate = method.top_k * s[i] / s[best].sum()
            out[t] += method.alpha / method.top_k * gate * (row @ p["a"][:, i]) * p["b"][i]
    return out.reshape(3, 5, 8)


def check(bench, method=METHOD):
    got = bench.forward(moved(bench, method))
    np.testing.assert_allclose(got, expected(bench, method), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "method", [METHOD, SMoRA(rank=6, top_k=2, alpha=3.0, partition=2, gate="softmax")]
)
def test_value(bench, method):
    check(bench, method)


def test_limit_all_ranks_of_one_partition_are_lora(bench):
    """One logit for all ranks, all of them active: every gate is 1."""
    adapter = bench.noisy(SMoRA(rank=4, top_k=4, alpha=8.0, partition=4))
    p = bench.numbers(adapter)
    want = np.asarray(bench.x, np.float64) @ (bench.w + 2.0 * p["a"] @ p["b"])
    np.testing.assert_allclose(bench.forward(adapter), want, rtol=1e-4, atol=1e-4)


def test_a_mixture_of_loras_is_the_case_of_blocks_of_ranks(bench):
    """Partitions of two ranks as experts of rank 2, softmax over the two that are chosen."""
    ours = bench.noisy(SMoRA(rank=6, top_k=4, alpha=4.0, partition=2, gate="softmax"))
    theirs = bench.fresh(jl.Experts(experts=3, top_k=2, rank=2, alpha=4.0))
    p = ours.trainable["w"]
    arrays = {
        "a": jnp.moveaxis(p["a"].reshape(12, 3, 2), 1, 0),
        "b": p["b"].reshape(3, 2, 8),
        "router": p["router"],
    }
    want = bench.forward(theirs.replace(trainable={"w": arrays}))
    np.testing.assert_allclose(bench.forward(ours), want, rtol=1e-4, atol=1e-4)


def test_the_state_evens_the_load_and_moves_by_advance_alone(bench):
    adapter = moved(bench, METHOD)

    @jax.jit
    def step(adapter):
        _, aux = jl.lift(bench.model, aux=True)(bench.params, adapter, bench.x)
        return advance(adapter, aux), aux["w"]

    first = step(adapter)[1]
    np.testing.assert_array_equal(first["counts"], np.round(first["load"] * 30))
    assert first["counts"].sum() == 30 and first["dropped"] == 0
    for _ in range(60):
        adapter, last = step(adapter)
    assert jnp.std(last["load"]) < 0.5 * jnp.std(first["load"])
    assert np.any(adapter.frozen["w"]["bias"])


def test_padding_counts_in_no_report(bench):
    adapter, mask = bench.noisy(METHOD), jnp.arange(15).reshape(3, 5) % 3 > 0
    run = jax.jit(jl.lift(bench.model, aux=True))
    _, aux = run(bench.params, adapter, bench.x, ctx={"mask": mask})
    _, real = run(bench.params, adapter, bench.x[mask])
    for name, value in real["w"].items():
        np.testing.assert_allclose(aux["w"][name], value, rtol=1e-5)
    with pytest.raises(ValueError, match=r"ctx\['mask'\]: got \(3,\), expected the router's"):
        run(bench.params, adapter, bench.x, ctx={"mask": mask[:, 0]})


def test_refusals():
    with pytest.raises(ValueError, match=r"SMoRA\.top_k: got 9, expected 1\.\.8"):
        SMoRA(rank=8, top_k=9)
    with pytest.raises(ValueError, match=r"SMoRA\.partition: got 3, expected a divisor of 8"):
        SMoRA(rank=8, top_k=2, partition=3)
    with pytest.raises(ValueError, match="gate: got 'relu'"):
        SMoRA(rank=8, top_k=2, gate="relu")


def test_mutation_gates_of_mean_one_over_k_are_seen(bench, monkeypatch):
    good = smora.dense_weights
    monkeypatch.setattr(smora, "dense_weights", lambda i, w, r: good(i, w / 2, r))
    with pytest.raises(AssertionError):
        check(bench)
