"""AutoLoRA: an encoder without gauge, retrieval of unseen adapters, gates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora.algebra import LowRank
from jlora.compose.gated_fusion import fuse, gated
from jlora.core.site import Site
from jlora.retrieval import weight_encoder as file
from jlora.retrieval.weight_encoder import contrastive, encode, init_encoder, retrieve, tokens

SITES = (
    Site("layers/0/q", (6, 5), "io", jnp.float32),
    Site("layers/1/q", (6, 5), "io", jnp.float32),
    Site("mlp", (2, 5, 7), "sio", jnp.float32),
)


def leaf(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def deltas(seed, r=3):
    rng = np.random.default_rng(seed)

    def one(s):
        u, v = rng.normal(size=(*s.stack, s.d_in, r)), rng.normal(size=(*s.stack, r, s.d_out))
        return LowRank(jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32))

    return {s.path: one(s) for s in SITES}


PARAMS = init_encoder(jax.random.key(0), SITES, out=8, width=16, probes=2)


def test_tokens_by_numpy():
    assert set(PARAMS["project"]) == {"layers/#/q", "mlp"}
    d, rows = deltas(1), []
    for path in sorted(d):
        u, v = (np.asarray(t, "f8") for t in d[path])
        e = np.asarray(PARAMS["probes"][path]) @ u @ v
        e = e - e.mean(-1, keepdims=True)
        e = e / np.sqrt((e**2).mean(-1, keepdims=True) + 1e-6)
        kind = "mlp" if path == "mlp" else "layers/#/q"
        rows.append((e @ np.asarray(PARAMS["project"][kind])).reshape(-1, 16))
    np.testing.assert_allclose(tokens(PARAMS, d), np.concatenate(rows), atol=1e-4)
    assert tokens(PARAMS, d).shape == (8, 16)
    z = encode(PARAMS, d)
    np.testing.assert_allclose(np.linalg.norm(z), 1.0, rtol=1e-5)


def test_embedding_by_numpy():
    """The block and the head, a head at a time, on the tokens."""
    n = {k: np.asarray(t, "f8") for k, t in PARAMS.items() if not isinstance(t, dict)}

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    x = np.concatenate([n["special"], np.asarray(tokens(PARAMS, deltas(1)))])
    q, k, v = np.split(norm(x) @ n["qkv"], 3, axis=1)
    mixed = []
    for part in np.split(np.arange(16), 4):
        a = np.exp(q[:, part] @ k[:, part].T / 2)
        mixed.append(a / a.sum(1, keepdims=True) @ v[:, part])
    x = x + np.concatenate(mixed, 1) @ n["mix"]
    up = norm(x) @ n["up"]
    gelu = up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))) / 2
    z = norm(x + gelu @ n["down"])[0] @ n["head"]
    np.testing.assert_allclose(encode(PARAMS, deltas(1)), z / np.linalg.norm(z), atol=1e-4)


def turned(d, seed=5):
    g = leaf(3, 3, seed=seed)
    return {k: LowRank(x.u @ g, jnp.linalg.inv(g) @ x.v) for k, x in d.items()}


def test_no_gauge_no_rank_no_padding():
    d, run = deltas(1), jax.jit(lambda d: encode(PARAMS, d))
    z = run(d)
    np.testing.assert_allclose(run(turned(d)), z, atol=1e-4)
    padded = {k: LowRank(jnp.pad(x.u, [(0, 0)] * (x.u.ndim - 1) + [(0, 2)]),
                         jnp.pad(x.v, [(0, 0)] * (x.v.ndim - 2) + [(0, 2), (0, 0)]))
              for k, x in d.items()}  # fmt: skip
    np.testing.assert_allclose(run(padded), z, atol=1e-5)
    assert np.abs(np.asarray(run(deltas(2)) - z)).max() > 0.05
    zero = {k: LowRank(jnp.zeros_like(x.u), x.v) for k, x in d.items()}
    slope = jax.jit(jax.grad(lambda p: jnp.sum(encode(p, zero))))(PARAMS)
    assert all(np.isfinite(np.asarray(t)).all() for t in jax.tree.leaves(slope))


def test_mutation_an_encoder_of_factors(monkeypatch):
    """Probes on u alone see the gauge."""
    plain = file.algebra.low_rank
    monkeypatch.setattr(
        file.algebra, "low_rank", lambda x: LowRank(plain(x).u, jnp.ones_like(plain(x).v))
    )
    with pytest.raises(AssertionError):
        test_no_gauge_no_rank_no_padding()


def test_contrastive_by_numpy_and_its_landmarks():
    z, t = leaf(4, 5), leaf(4, 5, seed=1)
    z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
    n = np.asarray(t) / np.linalg.norm(t, axis=1, keepdims=True)
    logits = np.asarray(z) @ n.T / 0.5
    rows = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    columns = np.log(np.exp(logits).sum(0)) - np.diag(logits)
    got = contrastive(z, t, temperature=0.5)
    np.testing.assert_allclose(got, (rows.mean() + columns.mean()) / 2, rtol=1e-5)
    same = jnp.ones((4, 5)) / np.sqrt(5)
    np.testing.assert_allclose(contrastive(same, same), np.log(4), rtol=1e-4)
    assert float(contrastive(jnp.eye(4), jnp.eye(4))) < 1e-4
    ids, cosines = retrieve(jnp.eye(4), jnp.asarray([0.0, 3.0, 1.0, 0.0]), 2)
    np.testing.assert_array_equal(ids, [1, 2])
    np.testing.assert_allclose(cosines, np.asarray([3, 1]) / np.sqrt(10), rtol=1e-5)


def family(task, seed):
    """An adapter of a task: the task's delta, some noise, in a random basis."""
    base, noise = (jax.tree.map(np.asarray, deltas(s)) for s in (100 + task, 1000 + seed))
    g = np.random.default_rng(seed).normal(size=(3, 3)).astype("f4")
    return {
        k: LowRank((x.u + 0.3 * noise[k].u) @ g, np.linalg.inv(g) @ (x.v + 0.3 * noise[k].v))
        for k, x in base.items()
    }


def stacked(many):
    return jax.tree.map(lambda *t: jnp.asarray(np.stack(t)), *many)


def test_unseen_adapters_are_retrieved_by_their_text():
    """The paper's claim in small: 8 tasks, 3 adapters each to learn from, one to be found."""
    texts = leaf(8, 8, seed=9)
    train = [stacked([family(k, 10 * k + j) for k in range(8)]) for j in range(3)]
    held_out = stacked([family(k, 10 * k + 9) for k in range(8)])
    adam = optax.adam(3e-3)
    many = stacked(train)

    def loss(p, bank):
        return contrastive(jax.vmap(lambda d: encode(p, d))(bank), texts)

    def step(carry, i):
        p, state = carry
        value, g = jax.value_and_grad(loss)(p, jax.tree.map(lambda t: t[i % 3], many))
        with jax.numpy_dtype_promotion("standard"):
            updates, state = adam.update(g, state)
        return (optax.apply_updates(p, updates), state), value

    run = jax.jit(lambda p: jax.lax.scan(step, (p, adam.init(p)), jnp.arange(150)))
    (p, _), values = run(PARAMS)

    @jax.jit
    def found(p):
        z = jax.vmap(lambda d: encode(p, d))(held_out)
        return jax.vmap(lambda t: retrieve(z, t, 1)[0][0])(texts)

    def recall(p):
        return np.mean(np.asarray(found(p)) == np.arange(8))

    assert recall(PARAMS) <= 0.5 and recall(p) >= 0.75
    assert float(values[-1]) < 0.2 * float(values[0])


# --- gates --------------------------------------------------------------------------------------

BASE, X = {"w": leaf(6, 5, seed=3), "deep": leaf(2, 5, 5, seed=4) / 3}, leaf(4, 6, seed=8)


def model(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["w"], p["deep"])[0]


TUNED = jl.lift(model)
RUN = jax.jit(lambda a: TUNED(BASE, a, X))


def adapter(seed, rank):
    a = jl.init(jax.random.key(seed), model, BASE, X, methods={"w|deep": jl.LoRA(rank)})
    new = jax.tree.map(lambda t: leaf(*t.shape, seed=seed + 10) / 2, a.trainable)
    return a.replace(trainable=new)


ADAPTERS = [adapter(0, 2), adapter(1, 1), adapter(2, 2)]


def test_gate_by_numpy():
    p = {k: leaf(5, seed=i) for i, k in enumerate(("base", "own", "both", "bias", "out"))}
    y, parts = leaf(4, 5, seed=6), leaf(4, 3, 5, seed=7)

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    n = {k: np.asarray(t) for k, t in p.items()}
    a, b = norm(np.asarray(y))[:, None], norm(np.asarray(parts))
    g = 1 / (1 + np.exp(-(n["base"] * a + n["own"] * b + n["both"] * a * b + n["bias"])))
    expected = n["out"] * (g * np.asarray(parts)).sum(1)
    np.testing.assert_allclose(fuse(p, y, parts, jnp.ones(3)), expected, atol=1e-4)
    assert 0 < g.min() and g.max() < 1


def test_open_gates_are_the_plain_sum_and_order_does_not_matter():
    total = jl.merging.merge("concat", ADAPTERS, jnp.ones(3))
    wide_open = gated(jax.random.key(0), ADAPTERS, bias=30.0)
    np.testing.assert_allclose(RUN(wide_open), RUN(total), atol=1e-4)
    shut = gated(jax.random.key(0), ADAPTERS, bias=-40.0)
    np.testing.assert_allclose(RUN(shut), model(BASE, X), atol=1e-5)
    half = [RUN(gated(jax.random.key(0), a)) for a in (ADAPTERS, ADAPTERS[::-1])]
    np.testing.assert_allclose(*half, atol=1e-5)
    with pytest.raises(NotImplementedError, match="depends on x"):
        jl.merge(BASE, shut)


def test_gates_learn_to_leave_out_what_disturbs():
    """Of three adapters one is wanted: trained gates come closer than any plain sum does."""
    wanted, a = RUN(ADAPTERS[1]), gated(jax.random.key(0), ADAPTERS)
    adam = optax.adam(3e-2)

    def loss(t):
        return jnp.mean((TUNED(BASE, a.replace(trainable=t), X) - wanted) ** 2)

    def step(carry, _):
        t, state = carry
        value, g = jax.value_and_grad(loss)(t)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = adam.update(g, state)
        return (optax.apply_updates(t, updates), state), value

    run = jax.jit(lambda t: jax.lax.scan(step, (t, adam.init(t)), None, length=200))
    (t, _), _ = run(a.trainable)
    sums = [jnp.full(3, c) for c in (0.0, 1 / 3, 1.0)]
    plain = [RUN(jl.merging.merge("concat", ADAPTERS, c)) for c in sums]
    assert float(loss(t)) < 0.3 * min(float(jnp.mean((y - wanted) ** 2)) for y in plain)


def test_refusals():
    odd = Site("layers/2/q", (6, 9), "io", jnp.float32)
    with pytest.raises(ValueError, match="layers/2/q: got d_out 9, expected 5"):
        init_encoder(jax.random.key(0), (*SITES, odd), out=4)
    with pytest.raises(ValueError, match="heads: got 3, expected a divisor of the width 16"):
        encode(PARAMS, deltas(1), heads=3)
    with pytest.raises(ValueError, match=r"k: got 5, expected in 1..4"):
        retrieve(jnp.eye(4), jnp.ones(4), 5)
