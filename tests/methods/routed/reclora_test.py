"""RecLoRA: the value of both mixes, one-hot weights, users of rows, personal adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods.routed.reclora import RecLoRA, personal

USERS = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
METHOD = RecLoRA(user=4, experts=3, rank=2, alpha=3.0, width=5)
FORMS = {
    "factors": METHOD,
    "deltas": dataclasses.replace(METHOD, mix="deltas", temperature=0.5),
    "roots": dataclasses.replace(METHOD, root=True),
    "raw": dataclasses.replace(METHOD, softmax=False),
}


def numbers(adapter):
    """The arrays of "w" and those of all sites, float64."""
    both = [*adapter.frozen.values(), *adapter.trainable.values()]
    return {k: np.asarray(t, np.float64) for part in both for k, t in part.items()}


def weights(method, p, users):
    u = np.asarray(users, np.float64)
    u = (u - u.mean(-1, keepdims=True)) / np.sqrt(u.var(-1, keepdims=True) + 1e-5)
    w = np.maximum(u @ p["inner"] + p["inner_bias"], 0) @ p["head"] + p["head_bias"]
    w = w / method.temperature
    if method.softmax:
        w = np.exp(w) / np.exp(w).sum(-1, keepdims=True)
    return np.sqrt(w) if method.root else w


def delta(method, p, w):
    """The delta of one user, [d_in, d_out]."""
    if method.mix == "deltas":
        return 1.5 * sum(w[k] * p["a"][k] @ p["b"][k] for k in range(3))
    return 1.5 * np.tensordot(w, p["a"], 1) @ np.tensordot(w, p["b"], 1)


def run(bench, adapter, users=USERS):
    return jl.lift(bench.model, aux=True)(bench.params, adapter, bench.x, ctx={"user": users})


def check(bench, method):
    adapter = bench.noisy(method)
    p = numbers(adapter)
    w = weights(method, p, USERS)
    x = np.asarray(bench.x, np.float64)
    want = np.stack(
        [row @ (bench.w + delta(method, p, own)) for row, own in zip(x, w, strict=True)]
    )
    y, aux = run(bench, adapter)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(aux["w"]["weights"], w.mean(0), rtol=1e-4, atol=1e-5)
    return adapter, y


@pytest.mark.parametrize("form", FORMS)
def test_value_and_personal_adapters(bench, form):
    adapter, y = check(bench, FORMS[form])
    for k in range(3):
        own = personal(adapter, USERS[k])
        assert {type(m) for _, m in own.sites} == {jl.LoRA}
        np.testing.assert_allclose(bench.x[k] @ bench.merged(own), y[k], rtol=1e-4, atol=1e-4)


def test_one_hot_weights_are_that_adapter(bench):
    adapter = bench.noisy(FORMS["raw"])
    (group,) = adapter.trainable.keys() - {"w"}
    own = adapter.trainable["w"]
    for k in range(3):
        shared = {**adapter.trainable[group], "head": jnp.zeros((5, 3)), "head_bias": jnp.eye(3)[k]}
        y, _ = run(bench, adapter.replace(trainable={"w": own, group: shared}))
        want = bench.x @ (bench.params["w"] + 1.5 * own["a"][k] @ own["b"][k])
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


def test_users_of_rows_and_of_tokens_are_the_same(bench):
    adapter = bench.noisy(METHOD)
    wide = jnp.broadcast_to(USERS[:, None], (3, 5, 4))
    np.testing.assert_allclose(run(bench, adapter, wide)[0], run(bench, adapter)[0], rtol=1e-5)
    other = run(bench, adapter, USERS[::-1])[0]
    assert np.abs(other[0] - run(bench, adapter)[0][0]).max() > 0.1


def test_gradients_reach_the_classifier_and_the_whole_set(bench):
    adapter = bench.noisy(METHOD)

    def loss(trainable):
        return jnp.sum(jnp.sin(run(bench, adapter.replace(trainable=trainable))[0]))

    grads = jax.grad(loss)(adapter.trainable)
    for t in jax.tree.leaves(grads["w"]):
        assert (np.abs(t).reshape(3, -1).max(1) > 1e-4).all(), "every adapter of the set"
    assert all(np.abs(t).max() > 1e-4 for t in jax.tree.leaves(grads))


def test_layers_of_a_stack(bench):
    """Personal adapters keep the stack axes."""
    params = {"w": jnp.stack([bench.params["w"][:, :8][:8], bench.params["w"][4:]])}

    def model(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    x = bench.x[..., :8]
    for mix in ("factors", "deltas"):
        method = dataclasses.replace(METHOD, mix=mix)
        fresh = jl.init(jax.random.key(0), model, params, x, methods={"w": method})
        move = lambda t: t + 0.3 * jax.random.normal(jax.random.key(t.size), t.shape)  # noqa: E731
        adapter = fresh.replace(trainable=jax.tree.map(move, fresh.trainable))
        y = jl.lift(model)(params, adapter, x, ctx={"user": USERS})
        want = model(jl.merge(params, personal(adapter, USERS[1])), x[1])
        np.testing.assert_allclose(y[1], want, rtol=1e-4, atol=1e-5)


def test_refusals(bench):
    adapter = bench.noisy(METHOD)
    with pytest.raises(ValueError, match=r"got no ctx\['user'\]"):
        bench.forward(adapter)
    with pytest.raises(ValueError, match=r"got \(3, 3\), expected the first axes of \(3, 5\)"):
        run(bench, adapter, USERS[:, :3])
    with pytest.raises(ValueError, match=r"got \(2, 4\)"):
        run(bench, adapter, USERS[:2])
    with pytest.raises(ValueError, match=r"user: got \(3,\), expected \(4,\)"):
        personal(adapter, USERS[0, :3])
    with pytest.raises(ValueError, match="w: got LoRA"):
        personal(bench.fresh(jl.LoRA(2)), USERS[0])
    for wrong in ({"temperature": 0.0}, {"mix": "both"}, {"softmax": False, "root": True}):
        with pytest.raises(ValueError, match="RecLoRA"):
            dataclasses.replace(METHOD, **wrong)


def test_mutation_one_vector_for_all_users(bench, monkeypatch):
    good = RecLoRA.weights
    monkeypatch.setattr(
        RecLoRA, "weights", lambda self, user, p: good(self, jnp.zeros_like(user), p)
    )
    with pytest.raises(AssertionError):
        check(bench, METHOD)
