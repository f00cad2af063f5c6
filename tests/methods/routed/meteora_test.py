"""MeteoRA: the value, equal back-ends, learning from labels, switching inside a sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.routed import meteora
from jlora.methods.routed.expert_bank import with_experts
from jlora.methods.routed.meteora import MeteoRA
from jlora.routing import dispatch

SCALES = jnp.asarray([0.5, 1.0, 2.0, 1.5], jnp.float32)


def moved(bench, **how):
    """Trained experts of different scales."""
    adapter = bench.noisy(MeteoRA(experts=4, rank=3, train_experts=True, **how))
    return adapter.replace(frozen={"w": {"scales": SCALES}})


def check(bench, tau=2.0, k=2, backend="dense"):
    adapter = moved(bench, temperature=tau, top_k=k, backend=backend)
    p = bench.numbers(adapter)
    x = np.asarray(bench.x, np.float64).reshape(-1, 12)
    want = x @ bench.w
    for t, row in enumerate(x):
        logits = row @ p["gate"]
        best = np.argsort(-logits)[:k]
        g = np.exp(logits[best] / tau)
        for weight, e in zip(g / g.sum(), best, strict=True):
            want[t] += weight * p["scales"][e] * row @ p["a"][e] @ p["b"][e]
    got = np.reshape(bench.forward(adapter), (-1, 8))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_value(bench, backend):
    check(bench, backend=backend)


def test_limit_one_adapter_is_lora(bench):
    lora = bench.noisy(jl.LoRA(rank=3, alpha=6.0))
    one = with_experts(bench.noisy(MeteoRA(experts=1, top_k=1, rank=3)), [lora])
    np.testing.assert_allclose(bench.forward(one), bench.forward(lora), rtol=1e-5, atol=1e-5)


def test_adapters_are_frozen(bench):
    adapter = bench.fresh(MeteoRA(experts=4, rank=3))
    assert adapter.trainable["w"].keys() == {"gate"}
    assert adapter.frozen["w"].keys() == {"a", "b", "scales"}


def tasks():
    """Four tasks, each with inputs around a centre of its own."""
    rng = np.random.default_rng(0)
    centres = jnp.asarray(2 * rng.normal(size=(4, 12)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 4, (6, 10)), jnp.int32)
    return centres, centres[labels] + jnp.asarray(rng.normal(size=(6, 10, 12)) / 3, "f4"), labels


def test_gates_learn_from_labels_and_switch_inside_a_sequence(bench):
    """Top-1: nothing but the label loss moves them; each token then has its own adapter."""
    centres, x, labels = tasks()
    loras = [bench.noisy(jl.LoRA(rank=3, alpha=3.0), seed=s) for s in range(4)]
    adapter = with_experts(bench.fresh(MeteoRA(experts=4, top_k=1, rank=3)), loras)
    run = jl.lift(bench.model, aux=True)

    def loss(trainable, part):
        ctx = {"labels": labels}
        y, aux = run(bench.params, adapter.replace(trainable=trainable), x, ctx=ctx)
        return {"label": aux["w"]["label_loss"], "model": jnp.sum(y**2)}[part]

    assert not np.any(jax.grad(loss)(adapter.trainable, "model")["w"]["gate"])
    slope = jax.grad(lambda t: loss(t, "label"))
    step = lambda _, t: jax.tree.map(lambda a, g: a - 0.1 * g, t, slope(t))  # noqa: E731
    trained = adapter.replace(trainable=jax.lax.fori_loop(0, 50, step, adapter.trainable))
    sequence = centres[jnp.asarray([0, 0, 0, 3, 3, 1, 1])]
    got = bench.forward(trained, sequence)
    for t, e in enumerate((0, 0, 0, 3, 3, 1, 1)):
        want = bench.forward(loras[e], sequence[t])
        np.testing.assert_allclose(got[t], want, rtol=1e-4, atol=1e-4)


def test_reports(bench):
    """Load and label loss in float64; tokens without a label or of padding do not count."""
    adapter, mask = moved(bench, top_k=2), jnp.arange(15).reshape(3, 5) % 4 > 0
    labels = jnp.arange(15, dtype=jnp.int32).reshape(3, 5) % 5 - 1
    run = jl.lift(bench.model, aux=True)
    _, aux = run(bench.params, adapter, bench.x, ctx={"mask": mask, "labels": labels})
    logits = (np.asarray(bench.x, "f8") @ bench.numbers(adapter)["gate"])[np.asarray(mask)]
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    which = np.asarray(labels)[np.asarray(mask)]
    want = -np.mean([row[c] for row, c in zip(log, which, strict=True) if c >= 0])
    np.testing.assert_allclose(aux["w"]["label_loss"], want, rtol=1e-5)
    count = np.bincount(np.argsort(-logits)[:, :2].ravel(), minlength=4)
    np.testing.assert_array_equal(aux["w"]["counts"], count)
    with pytest.raises(ValueError, match=r"ctx\['labels'\]: got \(5,\), expected the router's"):
        run(bench.params, adapter, bench.x, ctx={"labels": labels[0]})


def test_refusals():
    with pytest.raises(ValueError, match=r"MeteoRA\.top_k: got 5, expected 1\.\.4"):
        MeteoRA(experts=4, top_k=5)
    with pytest.raises(ValueError, match=r"MeteoRA\.temperature: got 0"):
        MeteoRA(temperature=0)
    with pytest.raises(ValueError, match=r"MeteoRA\.backend: got 'magic'"):
        MeteoRA(backend="magic")


def test_mutation_a_temperature_that_is_lost_is_seen(bench, monkeypatch):
    softmax = jax.nn.softmax
    monkeypatch.setattr(meteora.jax.nn, "softmax", lambda t, axis: softmax(2 * t, axis=axis))
    with pytest.raises(AssertionError):
        check(bench)
