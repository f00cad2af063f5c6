"""CorDA: numpy in float64, round inputs, both modes, PEFT."""

import importlib

import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl

module = importlib.import_module("jlora.inits.corda")


def started(world, batches=None, **more):
    batches = world.batches if batches is None else batches
    return jl.inits.corda(world.fn, world.params, batches, methods=world.methods, **more)


def oracle(x, w, kept):
    c = x.T @ x / len(x)
    c = c + 0.01 * np.trace(c) / len(c) * np.eye(len(c))
    u, s, vt = np.linalg.svd(c @ w, full_matrices=False)
    return np.linalg.solve(c, u[:, kept] * s[kept]) @ vt[kept]


def check_value(world, adapter, kept):
    world.unchanged(adapter)
    x = world.inputs()
    for path, w in world.weights.items():
        p = world.arrays(adapter, path)
        got = (3 * p["a"] @ p["b"]).reshape(-1, *w.shape[-2:])
        for k, one in enumerate(w.reshape(-1, *w.shape[-2:])):
            want = oracle(x[path].reshape(-1, 27, 8)[k], one, kept)
            np.testing.assert_allclose(got[k], want, atol=2e-3)


def test_value(world):
    check_value(world, started(world), slice(0, 2))


def test_a_second_call_compiles_nothing(world, compilations):
    started(world)
    compilations.clear()
    again = started(world)
    assert not compilations
    jnp.zeros((3, 5, 7)) + jnp.ones((3, 5, 1))  # a shape that nothing else here has
    assert compilations, "mutation: what is compiled is seen"
    world.unchanged(again)


def test_the_least_used_directions(world):
    check_value(world, started(world, mode="kpm"), slice(-2, None))


def test_mutation_a_forgotten_inverse_is_seen(world, monkeypatch):
    good = module.damped
    monkeypatch.setattr(module, "damped", lambda c: (good(c)[0], jnp.eye(len(c))))
    with pytest.raises(AssertionError):
        check_value(world, started(world), slice(0, 2))


def test_limit_inputs_of_one_size_in_all_directions_are_pissa(world):
    batches = [jnp.eye(8, dtype=jnp.float32)[None]]
    methods = {"0": jl.LoRA(rank=2, alpha=6.0)}
    fn, params = lambda p, x: x @ p["0"], {"0": world.params["layers"][0]}
    ours = jl.inits.corda(fn, params, batches, methods=methods)
    pissa = jl.inits.pissa(fn, params, batches, methods=methods)
    p, q = world.arrays(ours, "0"), world.arrays(pissa, "0")
    np.testing.assert_allclose(p["a"] @ p["b"], q["a"] @ q["b"], atol=1e-5)


def test_it_is_the_delta_of_peft(world):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from peft.tuners.lora.corda import preprocess_corda

    x, w = np.asarray(world.batches[0]).reshape(-1, 8), np.asarray(world.params["layers"][0])
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    model[0].weight.data = torch.tensor(w.T)
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["0"], init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method="ipm"),
    )  # fmt: skip
    preprocess_corda(model, config, run_model=lambda: model(torch.tensor(x)))
    theirs = peft.get_peft_model(model, config).base_model.model[0]
    ours = jl.inits.corda(
        lambda p, x: x @ p["0"], {"0": jnp.asarray(w)}, [jnp.asarray(x)],
        methods={"0": jl.LoRA(rank=2, alpha=6.0)},
    )  # fmt: skip
    p = world.arrays(ours, "0")
    delta = theirs.get_delta_weight("default").detach().numpy().T
    np.testing.assert_allclose(3 * p["a"] @ p["b"], delta, atol=1e-3)


def test_refusals(world):
    with pytest.raises(ValueError, match="mode: got 'both', expected one of"):
        started(world, mode="both")
    with pytest.raises(ValueError, match="batches: got none"):
        started(world, [])
