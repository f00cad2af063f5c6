"""EVA: numpy's SVD of all inputs, ranks by explained variance, PEFT, refusals."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl

module = importlib.import_module("jlora.inits.eva")


def started(world, **more):
    args = (world.fn, world.params, world.batches)
    return jl.inits.eva(*args, **{"methods": world.methods, **more})


def directions(x):
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    return s, vt


def same_space(a, vt, tolerance=2e-4):
    """The columns of a are the rows of vt, up to signs."""
    np.testing.assert_allclose(np.abs(vt @ a), np.eye(len(vt)), atol=tolerance)


def check_value(world):
    adapter = started(world, rho=1.0)
    world.unchanged(adapter)
    x = world.inputs()
    for path in world.weights:
        p = world.arrays(adapter, path)
        assert not p["b"].any()
        for a, rows in zip(p["a"].reshape(-1, 8, 2), x[path].reshape(-1, 27, 8), strict=True):
            same_space(a, directions(rows)[1][:2])


def test_value(world):
    check_value(world)


def test_mutation_the_last_directions_are_seen(world, monkeypatch):
    good = module.directions
    monkeypatch.setattr(module, "directions", lambda f, rank, whiten=False: jnp.flip(
        good(f, 8, whiten), -1)[..., :rank])  # fmt: skip
    with pytest.raises(AssertionError):
        check_value(world)


def test_ranks_go_where_there_is_the_most_to_explain(world):
    """Against a sort in numpy; the budget is kept, dead columns are zero and stay so."""
    adapter = started(world)
    shares = []
    for path, rows in world.inputs().items():
        for k, x in enumerate(rows.reshape(-1, 27, 8)):
            s = directions(x)[0] ** 2
            most = min(4, 6) if path == "head" else 4
            shares += [(share, path, k) for share in (s / s.sum())[:most]]
    best = sorted(shares, reverse=True)[:6]
    for path in world.weights:
        p = world.arrays(adapter, path)
        for k, a in enumerate(p["a"].reshape(-1, *p["a"].shape[-2:])):
            rank = sum(entry[1:] == (path, k) for entry in best)
            assert np.any(a != 0, axis=0).sum() == rank
            np.testing.assert_allclose(p["scale"].reshape(-1)[k], 3.0 if rank else 0.0, rtol=1e-6)

    def total(trainable):
        moved = adapter.replace(trainable=trainable)
        return jnp.sum(jl.lift(world.fn)(world.params, moved, world.batches[0]))

    grads = jax.grad(total)(adapter.trainable)
    dead = ~np.any(world.arrays(adapter, "layers")["a"] != 0, axis=-2)
    assert not np.asarray(grads["layers"]["b"])[dead].any()


def test_an_incremental_svd_finds_them_too(world):
    exact, streamed = started(world), started(world, svd="incremental", rho=2.0)
    for path in world.weights:
        p, q = world.arrays(exact, path), world.arrays(streamed, path)
        assert p["a"].shape == q["a"].shape
        for a, b in zip(p["a"].reshape(-1, *p["a"].shape[-2:]),
                        q["a"].reshape(-1, *q["a"].shape[-2:]), strict=True):  # fmt: skip
            if a[:, 0].any():
                assert abs(a[:, 0] @ b[:, 0]) > 0.99


def test_the_components_and_ranks_of_peft(world):
    """Of two layers that see other inputs, centred as PEFT's are; one batch, all of it."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from peft.tuners.lora.eva import get_eva_state_dict

    x = np.concatenate([np.asarray(b).reshape(-1, 8) for b in world.batches])
    ws = np.asarray(world.params["layers"])
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 8, bias=False), torch.nn.Tanh(), torch.nn.Linear(8, 8, bias=False)
    )
    for k, place in enumerate((0, 2)):
        model[place].weight.data = torch.tensor(ws[k].T)
    config = peft.LoraConfig(
        r=2, target_modules=["0", "2"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0)
    )
    theirs = get_eva_state_dict(
        model, [torch.tensor(x)] * 3, config, forward_fn=lambda m, b: m(b),
        prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    adapter = jl.inits.eva(
        lambda p, x: jnp.tanh(x @ p["0"]) @ p["2"], {"0": ws[0], "2": ws[1]},
        [jnp.asarray(x)], methods={"0|2": jl.LoRA(rank=2)}, center=True,
    )  # fmt: skip
    for name, rows in theirs.items():
        a = world.arrays(adapter, name)["a"]
        assert a.shape[1] == len(rows)
        same_space(a, rows.numpy(), 1e-2)


def test_whitening_and_masks(world):
    white = started(world, rho=1.0, whiten=True)
    s, _ = directions(world.inputs()["head"])
    norms = np.linalg.norm(world.arrays(white, "head")["a"], axis=0)
    np.testing.assert_allclose(norms, s[:2] ** -0.5, rtol=1e-3)
    some = started(world, rho=1.0, mask=lambda x: jnp.arange(x.shape[0] * 3).reshape(-1, 3) < 3)
    x = np.concatenate([np.asarray(b, "f8")[0] for b in world.batches])
    same_space(world.arrays(some, "layers")["a"][0], directions(x)[1][:2])


def test_refusals(world):
    with pytest.raises(ValueError, match="head: got 3 input rows, expected at least the rank 6"):
        jl.inits.eva(world.fn, world.params, [world.batches[0][:1]],
                     methods={"head": jl.LoRA(rank=6)})  # fmt: skip
    with pytest.raises(ValueError, match=r"head: EVA rank expected in 1\.\.6, got 7"):
        started(world, methods={"head": jl.LoRA(rank=7)})
    with pytest.raises(ValueError, match="svd: got 'fast'"):
        started(world, svd="fast")
    with pytest.raises(ValueError, match=r"rho: got 0\.5, expected at least 1"):
        started(world, rho=0.5)
    with pytest.raises(ValueError, match="head: got inputs that are not finite"):
        jl.inits.eva(world.fn, world.params, [world.batches[0] * np.float32("nan")],
                     methods={"head": jl.LoRA(rank=2)})  # fmt: skip
