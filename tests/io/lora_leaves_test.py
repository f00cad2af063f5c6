"""LoRA leaves of JAX packages, as the packages wrote and ran them."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora import io
from jlora.io import FormatError
from tests.golden import make_stacks
from tests.io import stacks_test

GOLDEN = sorted(path.stem for path in make_stacks.LORA.glob("*.json"))


def read(name):
    """(golden data, the base's leaves, the LoRA leaves, alpha, the name map)."""
    data = json.loads((make_stacks.LORA / f"{name}.json").read_text(encoding="utf-8"))
    config, base, names = stacks_test.read(name)
    lora = {
        path: jnp.asarray(make_stacks.weight(path, tuple(shape)), dtype)
        for path, (dtype, *shape) in data["tree"].items()
    }
    alpha = make_stacks.ALPHA if package(name) in ("qwix", "maxtext") else None
    return (
        data | {"config": config["config"], "versions": config["versions"]},
        base,
        lora,
        alpha,
        names,
    )


def package(name):
    first = name.partition("-")[0]
    return "qwix" if first == "tunix" else first


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", GOLDEN)
def test_peft_on_torch_gives_the_logits_of_the_package(name, tmp_path):
    """The package ran its own LoRA; here PEFT runs what jlora wrote of its leaves."""
    peft = pytest.importorskip("peft")
    data, base, lora, alpha, names = read(name)
    adapter = io.load_lora_leaves(base | lora, names, alpha=alpha)
    if package(name) == "maxtext":
        with pytest.raises(FormatError, match="are flattened; expected its weight, axes"):
            io.load_lora_leaves(lora, names, alpha=alpha)
    else:
        chex.assert_trees_all_equal(adapter, io.load_lora_leaves(lora, names, alpha=alpha))
    assert len(adapter.sites) == len(lora) // 2
    io.save_peft(tmp_path / "peft", adapter, names, task_type="CAUSAL_LM")
    model = stacks_test.twin(data, base, names)
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    want = np.asarray(data["logits"])
    stacks_test.near(stacks_test.logits(tuned), want)
    alone = stacks_test.read(name)[0]["logits"]
    assert np.abs(want - np.asarray(alone)).max() > 0.02 * np.abs(want).max()


@pytest.mark.parametrize("name", GOLDEN)
def test_back_bit_for_bit(name):
    _, base, lora, alpha, names = read(name)
    adapter = io.load_lora_leaves(base | lora, names, alpha=alpha)
    back = io.lora_leaves(adapter, package(name))
    chex.assert_trees_all_equal(back.leaves, {k: np.asarray(v) for k, v in lora.items()})
    assert (back.rank, back.alpha) == (make_stacks.RANK, alpha or make_stacks.RANK)


def test_parts_with_first_factors_of_their_own_are_joined(tmp_path):
    """PEFT's k_proj and v_proj in Gemma's one einsum: the same deltas at twice the rank."""
    _, base, _, _, names = read("gemma")
    stacks_test.written(tmp_path, base, names)
    adapter = io.load_peft(tmp_path, names, base)
    back = io.lora_leaves(adapter, "gemma")
    assert (back.rank, back.alpha) == (2 * make_stacks.RANK, 2 * make_stacks.RANK)
    kv = back.leaves["layer_0/attn/kv_einsum/_LoRAEinsum_0/lora/b"]
    assert kv.shape == (2 * make_stacks.RANK, 2, 2, 6)
    again = io.load_lora_leaves(back.leaves, names)
    expected, got = jl.delta(base, adapter), jl.delta(base, again)
    assert expected.keys() == got.keys()
    for path in expected:
        np.testing.assert_allclose(got[path], expected[path], atol=1e-6)


def test_heads_of_keras_are_a_lora_of_their_joined_rank():
    """By NumPy: dW[i, n, h] = sum_r A[i, n, r] B[r, h]; others are refused on the way back."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3, 2)).astype("f4"), rng.normal(size=(2, 4)).astype("f4")
    names = io.NameMap({"q/kernel": ("q_proj", "ioo")})
    leaves = {"q/lora_kernel_a": a, "q/lora_kernel_b": b}
    adapter = io.load_lora_leaves(leaves, names)
    ((site, method),) = adapter.sites
    assert site.shape == (5, 3, 4) and method == jl.LoRA(rank=6, alpha=6)
    expected = np.einsum("inr,rh->inh", a.astype("f8"), b.astype("f8")).reshape(5, 12)
    base = {"q/kernel": jnp.zeros((5, 3, 4))}
    np.testing.assert_allclose(jl.delta(base, adapter)["q/kernel"], expected, rtol=1e-5, atol=1e-6)
    trained = jax.tree.map(lambda x: x + 0.1, adapter.trainable)
    with pytest.raises(ValueError, match="one second factor for all heads"):
        io.lora_leaves(adapter.replace(trainable=trained), "keras")


def test_flax_modules_of_today():
    """`nnx.LoRALinear` itself: its function is that of the adapter."""
    from flax import nnx

    layer = nnx.LoRALinear(5, 4, lora_rank=2, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    state = jax.tree.map(lambda x: x + 0.1, state)
    names = io.NameMap({"m/kernel": ("m", "io")})
    adapter = io.load_lora_leaves({"m": state}, names)
    x = jnp.arange(10.0).reshape(2, 5)
    fn = lambda params, x: nnx.merge(graph, params["m"])(x)  # noqa: E731
    bare = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (0 if "lora" in jax.tree_util.keystr(path) else 1), state
    )
    expected = fn({"m": state}, x)
    assert np.abs(fn({"m": bare}, x) - expected).max() > 0.1
    np.testing.assert_allclose(jl.lift(fn)({"m": bare}, adapter, x), expected, rtol=1e-5)
    leaves = io.lora_leaves(adapter, "flax").leaves
    chex.assert_trees_all_equal(
        leaves["m/lora/lora_a/value"], np.asarray(state["lora"]["lora_a"][...])
    )


def test_a_flax_module_around_another():
    """`nnx.LoRA` keeps its factors next to the module that it wraps; they come back there."""
    from flax import nnx

    inner = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
    layer = nnx.LoRA(5, 2, 4, base_module=inner, rngs=nnx.Rngs(1))
    graph, state = nnx.split(layer)
    state = jax.tree.map(lambda x: x + 0.1, state)
    names = io.NameMap({"m/base_module/kernel": ("m", "io")})
    adapter = io.load_lora_leaves({"m": state}, names)
    x = jnp.arange(10.0).reshape(2, 5)
    merged = jl.merge({"m": state}, adapter)["m"]["base_module"]
    bias = merged["bias"][...][None]
    expected = nnx.merge(graph, state)(x)
    np.testing.assert_allclose(x @ merged["kernel"][...] + bias, expected, rtol=1e-5)
    assert set(io.lora_leaves(adapter, "flax").leaves) == {"m/lora_a/value", "m/lora_b/value"}


def test_layers_that_a_scan_stacks():
    """qwix in `nn.scan`: both factors have the layer axis."""
    names = io.NameMap({"layers/w": ("model.layers.{i}.w", "sio")})
    a, b = jnp.ones((3, 5, 2)), jnp.ones((3, 2, 4))
    leaves = {"layers/w_lora_a": a, "layers/w_lora_b": b}
    adapter = io.load_lora_leaves(leaves, names, alpha=6.0)
    delta = jl.delta({"layers/w": jnp.zeros((3, 5, 4))}, adapter)["layers/w"]
    np.testing.assert_allclose(delta, np.full((3, 5, 4), 6.0))


NAMES = io.NameMap({"m/w": ("m", "io")})
A, B = np.ones((5, 2), "f4"), np.ones((2, 4), "f4")


@pytest.mark.parametrize(
    ("leaves", "alpha", "words"),
    [
        ({"m/w": A}, None, "no LoRA leaves"),
        ({"m/w_lora_a": A, "m/w_lora_b": B}, None, "that of qwix's LoraRule"),
        ({"m/lora_w_a": A}, None, "no LoRA leaves"),
        ({"m/w_lora_a": A}, 1.0, "lora_a alone"),
        ({"n/w_lora_a": A, "n/w_lora_b": B}, 1.0, "no rule for its weight 'n/w'"),
        ({"m/w_lora_a": A, "m/w_lora_b": B[:1]}, 1.0, r"\(5, 2\).*\(1, 4\).*'io'"),
        ({"m/_LoRAEinsum_0/lora/a": A, "m/_LoRAEinsum_0/lora/b": B}, 2.0, "scale of gemma is 1"),
        ({"m/_LoRAEinsum_0/lora/a": A, "m/w_lora_b": B}, 2.0, "two names|two packages"),
    ],
)
def test_what_is_no_pair_of_factors_is_refused(leaves, alpha, words):
    with pytest.raises(FormatError, match=words):
        io.load_lora_leaves(leaves, NAMES, alpha=alpha)
