"""VB-LoRA: the equation piece by piece, and one bank trained by all sites and layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora as jl
from jlora.methods.shared_basis import vblora
from jlora.methods.shared_basis.vblora import VBLoRA

METHOD = VBLoRA(rank=2, num_vectors=6, vector_length=4, top_k=2)


def pieces(logits, bank):
    """[..., h] -> [..., l] and the weights [..., h], one row of logits at a time."""
    out = np.zeros((*logits.shape[:-1], bank.shape[1]))
    weights = np.zeros(logits.shape)
    for at in np.ndindex(logits.shape[:-1]):
        best = np.argsort(-logits[at], kind="stable")[:2]
        e = np.exp(logits[at][best] - logits[at][best].max())
        weights[at][best] = e / e.sum()
        out[at] = sum(w * bank[j] for j, w in zip(best, e / e.sum(), strict=True))
    return out, weights


def delta(p, bank):
    a, _ = pieces(p["logits_a"], bank)
    c, _ = pieces(p["logits_b"], bank)
    rows = np.concatenate([a[:, k] for k in range(a.shape[1])], axis=1)  # [r, d_in]
    columns = np.concatenate([c[k] for k in range(c.shape[0])], axis=1)  # [r, d_out]
    return rows.T @ columns


def test_value(bench):
    adapter = bench.noisy(METHOD)
    p = bench.numbers(adapter) | bench_bank(adapter)
    bench.agree(adapter, bench.w + delta(p, p["bank"]))


def bench_bank(adapter):
    return {"bank": np.asarray(adapter.trainable["*0"]["bank"], np.float64)}


PARAMS = {
    "up": jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 12)) / 3, jnp.float32),
    "down": jnp.asarray(np.random.default_rng(1).normal(size=(2, 12, 8)) / 3, jnp.float32),
}
X = jnp.asarray(np.random.default_rng(2).normal(size=(3, 8)), jnp.float32)


def model(p, x):
    return lax.scan(lambda h, w: (h @ w["up"] @ w["down"], None), x, p)[0]


def adapter(seed=0):
    made = jl.init(jax.random.key(seed), model, PARAMS, X, methods={"up|down": METHOD})
    rng = np.random.default_rng(seed + 3)
    move = lambda t: t + jnp.asarray(0.4 * rng.normal(size=t.shape), t.dtype)  # noqa: E731
    return made.replace(trainable=jax.tree.map(move, made.trainable))


def by_hand(made):
    """The sum of the outputs and the gradient of the bank, in float64, layer by layer."""
    numbers = jax.tree.map(lambda t: np.asarray(t, np.float64), made.trainable)
    bank, x = numbers["*0"]["bank"], np.asarray(X, np.float64)
    inputs, weights = [], []
    for i in range(2):
        for name in ("up", "down"):
            p = {k: t[i] for k, t in numbers[name].items()}
            w = np.asarray(PARAMS[name][i], np.float64) + delta(p, bank)
            inputs.append((x, p))
            weights.append(w)
            x = x @ w
    g, total = np.ones_like(x), np.zeros_like(bank)
    for (h, p), w in zip(inputs[::-1], weights[::-1], strict=True):
        dw = h.T @ g
        a, wa = pieces(p["logits_a"], bank)
        c, wc = pieces(p["logits_b"], bank)
        rows, columns = a.reshape(2, -1), c.swapaxes(0, 1).reshape(2, -1)
        da = (dw @ columns.T).T.reshape(a.shape)  # [r, d_in] in pieces
        dc = (rows @ dw).reshape(2, -1, 4).swapaxes(0, 1)
        total += np.einsum("rth,rtl->hl", wa, da) + np.einsum("trh,trl->hl", wc, dc)
        g = g @ w.T
    return x.sum(), total


def value_and_bank(made):
    def loss(trainable):
        return jnp.sum(jl.lift(model)(PARAMS, made.replace(trainable=trainable), X))

    value, grads = jax.jit(jax.value_and_grad(loss))(made.trainable)
    return value, grads["*0"]["bank"]


def test_the_bank_learns_from_all_sites_and_layers():
    made = adapter()
    value, grad = value_and_bank(made)
    want, total = by_hand(made)
    np.testing.assert_allclose(value, want, rtol=1e-4)
    np.testing.assert_allclose(grad, total, rtol=1e-3, atol=1e-4)


def test_mutation_a_bank_that_one_factor_does_not_train_is_seen(monkeypatch):
    composed = vblora.composed

    def deaf(logits, bank, k):
        bank = lax.stop_gradient(bank) if logits.shape[0] == 2 else bank  # of A, [r, ...]
        return composed(logits, bank, k)

    monkeypatch.setattr(vblora, "composed", deaf)
    made = adapter()
    assert not np.allclose(value_and_bank(made)[1], by_hand(made)[1], rtol=1e-3, atol=1e-4)


def test_a_bank_of_adapters_and_a_checkpoint_hold_the_vectors_once(tmp_path):
    made, other = adapter(), adapter(1)
    assert made.size == 6 * 4 + 2 * 2 * 6 * 2 * (2 + 3)
    both = jl.stack([made, other])
    assert both.trainable["*0"]["bank"].shape == (2, 6, 4) and len(both) == 2
    got = jax.vmap(lambda a: jl.lift(model)(PARAMS, a, X))(both)
    want = [jl.lift(model)(PARAMS, a, X) for a in (made, other)]
    np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-4, atol=1e-5)
    jl.io.save_adapter(tmp_path / "a", made)
    back = jl.io.restore_adapter(tmp_path / "a")
    assert jax.tree.structure(back) == jax.tree.structure(made)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, made))


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"VBLoRA.top_k: got 7, expected 1..6"):
        VBLoRA(num_vectors=6, top_k=7)
    with pytest.raises(ValueError, match=r"up: got 8 inputs, expected a multiple of .* 5"):
        jl.init(jax.random.key(0), model, PARAMS, X, methods={"up": VBLoRA(vector_length=5)})
