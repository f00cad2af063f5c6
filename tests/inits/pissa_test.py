"""PiSSA as an initialisation: numpy's SVD in float64, the adapter of `jl.init`, refusals."""

import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.inits.pissa import of_adapter
from jlora.methods.low_rank.pissa import PiSSA

KEY = jax.random.key(3)
module = importlib.import_module("jlora.inits.pissa")  # `jl.inits.pissa` is the function


def drawn(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "up": jnp.asarray(rng.normal(size=(2, 8, 6)), dtype),
        "head": jnp.asarray(rng.normal(size=(6, 5)), dtype),
    }


def model(params, x):
    h, _ = jax.lax.scan(lambda h, w: (h[:, :8] @ w @ jnp.ones((6, 8), h.dtype), None), x,
                        params["up"])  # fmt: skip
    return h[:, :6] @ params["head"]


def adapter_of(method, params=None, key=KEY):
    params = drawn(0) if params is None else params
    x = jnp.ones((3, 8), params["head"].dtype)
    return jl.init(key, model, params, x, methods={"up|head": method})


@pytest.fixture(scope="module")
def adapter():
    """Made from other weights than those of the tests."""
    return adapter_of(PiSSA(rank=3, alpha=6.0))


def test_a_second_randomised_start_compiles_nothing(adapter, compilations):
    key, params = jax.random.key(4), drawn(1)
    compilations.clear()
    of_adapter(KEY, adapter, drawn(0), niter=2)
    first = list(compilations)
    compilations.clear()
    of_adapter(key, adapter, params, niter=2)
    assert first and not compilations


def check_value(adapter, params):
    got = of_adapter(KEY, adapter, params)
    for path, w in params.items():
        p = {**got.trainable[path], **got.frozen[path]}
        u, s, vt = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
        best = (u[..., :, :3] * s[..., None, :3]) @ vt[..., :3, :]
        a, b, a0, b0 = (np.asarray(p[k], np.float64) for k in ("a", "b", "a0", "b0"))
        np.testing.assert_allclose(2 * a @ b, best, atol=2e-5)
        np.testing.assert_allclose(2 * a0 @ b0, best, atol=2e-5)
        balanced = np.apply_along_axis(np.diag, -1, s[..., :3] / 2)
        np.testing.assert_allclose(np.swapaxes(a, -1, -2) @ a, balanced, atol=2e-5)
        np.testing.assert_allclose(b @ np.swapaxes(b, -1, -2), balanced, atol=2e-5)
    merged = jl.merge(params, got)
    for path, w in params.items():
        np.testing.assert_array_equal(merged[path], w)


def test_value(adapter):
    check_value(adapter, drawn(1))


def test_it_is_the_adapter_of_init_bit_for_bit(adapter):
    """Exact and randomised, with one key: no second implementation that drifts."""
    params = drawn(1)
    for niter in (None, 2):
        want = adapter_of(PiSSA(rank=3, alpha=6.0, niter=niter), params)
        got = of_adapter(KEY, adapter, params, niter=niter)
        chex.assert_trees_all_equal(got.trainable, want.trainable)
        chex.assert_trees_all_equal(got.frozen, want.frozen)


def test_the_scale_is_the_adapters_own_not_that_of_its_method(adapter):
    """An adapter that was rescaled (alpha is data) keeps its scale, and each layer has its own."""
    scale = {"up": jnp.asarray([0.5, 4.0]), "head": jnp.asarray(3.0)}
    frozen = {p: {**t, "scale": scale[p]} for p, t in adapter.frozen.items()}
    params = drawn(1)
    got = of_adapter(KEY, adapter.replace(frozen=frozen), params)
    u, s, vt = np.linalg.svd(np.asarray(params["up"], np.float64), full_matrices=False)
    best = (u[..., :3] * s[:, None, :3]) @ vt[:, :3]
    a, b = (np.asarray(got.trainable["up"][k], np.float64) for k in ("a", "b"))
    np.testing.assert_allclose(np.asarray([0.5, 4.0])[:, None, None] * (a @ b), best, atol=2e-5)
    np.testing.assert_array_equal(got.frozen["up"]["scale"], scale["up"])


def test_the_next_round_starts_from_what_the_last_one_learned(adapter):
    """Trained, merged, started anew: the function is that of the trained adapter."""
    trained = adapter.replace(trainable=jax.tree.map(lambda t: t + 0.1, adapter.trainable))
    learned = jl.merge(drawn(0), trained)
    again = of_adapter(KEY, adapter, learned)
    for path, w in jl.merge(learned, again).items():
        np.testing.assert_array_equal(w, learned[path])


def test_a_narrow_adapter_stays_narrow_and_starts_at_the_weights(adapter):
    narrow = jax.tree.map(lambda t: t.astype(jnp.bfloat16), adapter)
    got, params = of_adapter(KEY, narrow, drawn(1)), drawn(1)
    assert {t.dtype for t in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    for path, w in jl.merge(params, got).items():
        np.testing.assert_array_equal(w, params[path])


def test_a_quantised_base_is_read(adapter):
    params = drawn(1)
    packed = {**params, "up": jl.quantize(params["up"], 8, 6)}
    got = of_adapter(KEY, adapter, packed).trainable["up"]
    w = np.asarray(packed["up"].dequantize(), np.float64)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    best = (u[..., :3] * s[:, None, :3]) @ vt[:, :3]
    np.testing.assert_allclose(2 * np.asarray(got["a"] @ got["b"]), best, atol=2e-5)
    assert np.max(np.abs(w - np.asarray(params["up"]))) > 1e-3  # not those of the plain base


def test_refusals(adapter):
    params = drawn(1)
    with pytest.raises(ValueError, match=r"head: got the method LoRA\(.*, expected PiSSA"):
        of_adapter(KEY, adapter_of(jl.LoRA(rank=2)), params)
    missing = jax.ShapeDtypeStruct((2, 8, 6), jnp.float32)
    with pytest.raises(ValueError, match="up: got an abstract weight, expected one with values"):
        of_adapter(KEY, adapter, {**params, "up": missing})
    with pytest.raises(ValueError, match="PiSSA: got a bank of 2 adapters, expected one"):
        of_adapter(KEY, jl.stack([adapter, adapter]), params)
    with pytest.raises(ValueError, match="site head is not in params"):
        of_adapter(KEY, adapter, {"up": params["up"]})
    half = jax.tree.map(lambda t: t.astype(jnp.bfloat16), adapter.trainable)
    with pytest.raises(ValueError, match="a0: got float32, expected bfloat16 as a has"):
        of_adapter(KEY, adapter.replace(trainable=half), params)


def test_a_rank_above_the_weights_is_refused(adapter):
    wide = jax.tree.map(lambda t: t, adapter.trainable)
    wide["head"]["a"], wide["head"]["b"] = jnp.zeros((6, 6)), jnp.zeros((6, 5))
    with pytest.raises(ValueError, match=r"head: PiSSA rank expected in 1\.\.5, got 6"):
        of_adapter(KEY, adapter.replace(trainable=wide), drawn(1))


def test_mutation_an_unbalanced_split_is_seen(adapter, monkeypatch):
    good = module.principal

    def lopsided(key, w, rank, scale, niter):
        a, b = good(key, w, rank, scale, niter)
        return 2.0 * a, 0.5 * b

    monkeypatch.setattr(module, "principal", lopsided)
    with pytest.raises(AssertionError):
        check_value(adapter, drawn(1))


def test_one_call(adapter):
    """`jl.inits.pissa` is the same start, of LoRA and what is subtracted from it."""
    params, x = drawn(1), jnp.ones((3, 8))
    got = jl.inits.pissa(model, params, [x], methods={"up|head": jl.LoRA(rank=3, alpha=6.0)})
    want = of_adapter(KEY, adapter, params)
    assert {m for _, m in got.sites} == {jl.Residual(jl.LoRA(rank=3))}
    chex.assert_trees_all_close(got.trainable, want.trainable, rtol=1e-6)
    for path, w in jl.merge(params, got).items():
        np.testing.assert_array_equal(w, params[path])
    with pytest.raises(ValueError, match="key: got None, expected one"):
        jl.inits.pissa(model, params, [x], methods={"up": jl.LoRA(rank=3)}, niter=2)
    with pytest.raises(ValueError, match="batches: got none"):
        jl.inits.pissa(model, params, [], methods={"up": jl.LoRA(rank=3)})
    with pytest.raises(ValueError, match=r"methods\['up'\]: got DoRA.*expected LoRA"):
        jl.inits.pissa(model, params, [x], methods={"up": jl.DoRA(rank=3)})
    bad = {**params, "head": params["head"].at[0, 0].set(jnp.inf)}
    with pytest.raises(ValueError, match="head: got a weight with values that are not finite"):
        jl.inits.pissa(model, bad, [x], methods={"head": jl.LoRA(rank=3)})


def test_it_is_the_start_of_peft():
    """The delta of both factors, and the base that is left, of real PEFT."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    w = np.asarray(drawn(1)["head"])
    layer = torch.nn.Linear(6, 5, bias=False)
    layer.weight.data = torch.tensor(w.T)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(torch.nn.Sequential(layer), config).base_model.model[0]
    ours = jl.inits.pissa(
        lambda p, x: x @ p["w"], {"w": w}, [w.T], methods={"w": jl.LoRA(rank=2, alpha=6.0)}
    )
    start = 3 * np.asarray(ours.trainable["w"]["a"] @ ours.trainable["w"]["b"])
    delta = theirs.get_delta_weight("default").detach().numpy().T
    np.testing.assert_allclose(start, delta, atol=1e-5)
    ((path, left),) = jl.inits.residual_leaves({"w": w}, ours)
    np.testing.assert_allclose(left, theirs.base_layer.weight.detach().numpy().T, atol=1e-5)
    assert path == "w"
