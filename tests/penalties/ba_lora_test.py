"""BA-LoRA: the terms of both forms by numpy and torch, where they are zero, gradients."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.penalties.ba_lora import Terms, ba_lora, nlg, nlu, spectrum

file = importlib.import_module("jlora.penalties.ba_lora")  # the function has its name
RNG = np.random.default_rng(0)
Z, BEFORE = (RNG.normal(size=(6, 5)) for _ in range(2))


def f4(x):
    return jnp.asarray(x, jnp.float32)


def share(z, k):
    s = np.linalg.svd(z, compute_uv=False)
    return -s[:k].sum() / s.sum()


def check_nlu(found):
    unit = lambda z: z / np.linalg.norm(z, axis=1, keepdims=True)  # noqa: E731
    cov = np.cov(Z.T)
    apart = sum(cov[i, j] ** 2 for i in range(5) for j in range(5) if i != j) / 5
    want = ((unit(Z) - unit(BEFORE)) ** 2).mean(), apart, share(Z, 3)
    np.testing.assert_allclose(found, want, rtol=1e-4)


def test_nlu_by_numpy():
    check_nlu(nlu(f4(Z), f4(BEFORE)))


def test_mutation_variances_that_count_are_seen(monkeypatch):
    monkeypatch.setattr(file.jnp, "eye", lambda n, dtype: jnp.zeros((n, n), dtype))
    with pytest.raises(AssertionError):
        check_nlu(nlu(f4(Z), f4(BEFORE)))


@pytest.mark.parametrize("masked", [False, True])
def test_nlg_by_torch(masked):
    torch = pytest.importorskip("torch")
    z, before = RNG.normal(size=(3, 4, 5)), RNG.normal(size=(3, 4, 5))
    mask = RNG.random((3, 4)) < 0.6 if masked else np.ones((3, 4), bool)
    log_p, p = (f(torch.tensor(x), -1) for f, x in (
        (torch.nn.functional.log_softmax, z), (torch.nn.functional.softmax, before)))  # fmt: skip
    kl = torch.nn.functional.kl_div(log_p[mask], p[mask], reduction="sum")
    entropy = -(log_p.exp() * log_p).sum(-1)[mask].mean()
    want = float(kl) / 3, -float(entropy), share((z * mask[..., None]).reshape(3, 20), 2)
    given = jnp.asarray(mask) if masked else None
    np.testing.assert_allclose(nlg(f4(z), f4(before), 2, given), want, rtol=1e-4)
    by_token = nlg(f4(z), f4(before), 2, given, per_token=True).consistency
    np.testing.assert_allclose(by_token, float(kl) / mask.sum(), rtol=1e-4)


def test_where_the_terms_are_at_their_ends():
    """Nothing lost: 0. Columns that are independent: 0. Logits of rank k: -1. All alike: -log d."""
    assert float(nlu(f4(Z), f4(Z)).consistency) == 0
    assert abs(float(nlg(f4(Z), f4(Z)).consistency)) < 1e-6
    white = np.linalg.qr(RNG.normal(size=(6, 6)) - 0)[0]
    centred = np.linalg.qr((white - white.mean(0))[:, :5])[0]
    assert abs(float(nlu(f4(centred), f4(BEFORE)).diversity)) < 1e-6
    np.testing.assert_allclose(spectrum(f4(Z[:, :2] @ Z[:2]), 2), -1, rtol=1e-5)
    assert float(spectrum(jnp.zeros((3, 2)), 1)) == 0
    np.testing.assert_allclose(nlg(jnp.ones((2, 5)), f4(Z[:2])).diversity, -np.log(5), rtol=1e-5)


def test_the_start_of_pissa_has_lost_nothing_and_training_has():
    params = {"w": f4(RNG.normal(size=(4, 5)))}
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    x = f4(RNG.normal(size=(6, 4)))
    adapter = jl.inits.pissa(apply, params, [x], methods={"w": jl.LoRA(2)})

    def consistency(t):
        tuned = jl.lift(apply)(params, adapter.replace(trainable=t), x)
        return nlu(tuned, apply(params, x)).consistency

    assert float(consistency(adapter.trainable)) < 1e-9
    moved = jax.tree.map(lambda t: 1.5 * t, adapter.trainable)
    value, slope = jax.value_and_grad(consistency)(moved)
    assert value > 1e-3 and all(jnp.abs(g).max() > 1e-4 for g in jax.tree.leaves(slope))


def test_no_gradient_reaches_the_pretrained_logits():
    for form in (nlu, nlg):
        slope = jax.grad(lambda b, form=form: sum(form(f4(Z), b)))(f4(BEFORE))
        assert not np.asarray(slope).any()


def test_weights_and_refusals():
    terms = Terms(*(jnp.float32(x) for x in (2.0, 3.0, -1.0)))
    np.testing.assert_allclose(ba_lora(terms), 2e-4 + 9e-4 - 1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match=r"weights: got .*expected numbers >= 0"):
        ba_lora(terms, (1.0, -1.0, 0.0))
    with pytest.raises(ValueError, match=r"logits: got \(1, 5\)"):
        nlu(f4(Z[:1]), f4(Z[:1]))
    with pytest.raises(ValueError, match=r"logits: got \(6, 5\), pretrained \(6, 5\), mask \(5,\)"):
        nlg(f4(Z), f4(Z), mask=jnp.ones(5, bool))
    with pytest.raises(ValueError, match=r"k: got 0, expected at least 1"):
        spectrum(f4(Z), 0)
