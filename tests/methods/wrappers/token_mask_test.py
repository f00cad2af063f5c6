"""TokenMask: tuned here, base there, one matmul for both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.decomposed.dora import DoRA
from jlora.methods.low_rank.lora import LoRA
from jlora.methods.routed.experts import Experts
from jlora.methods.wrappers.token_mask import TokenMask

MASK = np.random.default_rng(0).random((3, 5)) > 0.5


def run(bench, adapter, mask, **kw):
    ctx = {"tokens": jnp.asarray(mask)}
    return jl.lift(bench.model, **kw)(bench.params, adapter, bench.x, ctx=ctx)


def check_value(bench, inner):
    tuned = bench.forward(bench.noisy(inner))
    got = run(bench, bench.noisy(TokenMask(inner)), MASK)
    want = np.where(MASK[..., None], tuned, np.asarray(bench.x) @ np.asarray(bench.params["w"]))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inner", [LoRA(rank=2), DoRA(rank=2)])
def test_value(bench, inner):
    check_value(bench, inner)


def test_soft_masks_mix_and_limits_are_exact(bench):
    adapter = bench.noisy(TokenMask(LoRA(rank=2)))
    base = np.asarray(bench.x @ bench.params["w"])
    full = np.asarray(run(bench, adapter, np.ones((3, 5), bool)))
    assert np.array_equal(run(bench, adapter, np.zeros((3, 5), bool)), base)
    half = run(bench, adapter, np.full((3, 5), 0.25, np.float32))
    np.testing.assert_allclose(half, 0.75 * base + 0.25 * full, rtol=1e-4, atol=1e-5)


def test_base_and_tuned_share_one_matmul_forward_and_backward(bench):
    adapter = bench.noisy(TokenMask(LoRA(rank=2)))

    def loss(x, trainable):
        tuned = adapter.replace(trainable=trainable)
        return jnp.sum(jl.lift(bench.model)(bench.params, tuned, x, ctx={"tokens": MASK}) ** 2)

    lines = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(bench.x, adapter.trainable)).splitlines()
    count = sum("dot_general" in line for line in lines)
    assert count == 2 + 6  # the base forward and back; three products of each of A and B


def test_reports_of_the_wrapped_method_are_passed_on(bench):
    inner = Experts(experts=2, top_k=1, rank=2)
    _, aux = run(bench, bench.noisy(TokenMask(inner)), MASK, aux=True)
    assert aux["w"].keys() == {"balance", "counts", "dropped", "load"}


def test_refusals(bench):
    adapter = bench.fresh(TokenMask(LoRA(rank=2)))
    with pytest.raises(ValueError, match=r"TokenMask: ctx has no 'tokens'; got \[\]"):
        bench.forward(adapter)
    with pytest.raises(ValueError, match=r"expected shape \(3, 5\), got \(5,\)"):
        run(bench, adapter, MASK[0])
    with pytest.raises(NotImplementedError, match="TokenMask has no merge"):
        jl.merge(bench.params, adapter)


def test_mutation_an_inverted_mask_is_seen(bench, monkeypatch):
    good = TokenMask.apply

    def inverted(self, x, w, p, ctx):
        return good(self, x, w, p, {"tokens": ~ctx["tokens"]})

    monkeypatch.setattr(TokenMask, "apply", inverted)
    with pytest.raises(AssertionError):
        check_value(bench, LoRA(rank=2))
