"""Stack axes that a user declares: factors for each slice, as NumPy, merging and PEFT have it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import NameMap, safetensors_file
from jlora.methods.selective.bitfit import BitFit

L, D, K, H, R = 2, 6, 2, 3, 2
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(4, D)), jnp.float32)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def attention(p, x):
    k, v = jnp.einsum("td,ckdh->ctkh", x, p["kv_einsum"]["w"])
    return jnp.tanh(k) * v


def layer(params, x):
    return attention(params["attn"], x)


def scanned(params, x):
    return jax.lax.scan(lambda c, p: (c, attention(p, x)), 0, params["layers"])[1]


LAYER = {"attn": {"kv_einsum": {"w": draw(2, K, D, H)}}}
LAYERS = {"layers": {"kv_einsum": {"w": draw(L, 2, K, D, H)}}}
MODELS = {"layer": (layer, LAYER, 0, "soio"), "scanned": (scanned, LAYERS, 1, "ssoio")}


def trained(fn, params, method, stacks):
    fresh = jl.init(jax.random.key(0), fn, params, X, methods={"kv": method}, stacks=stacks)
    return fresh.replace(trainable=jax.tree.map(lambda t: t + draw(*t.shape), fresh.trainable))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", [jl.LoRA(R, 3.0), jl.DoRA(R, 3.0)], ids=["lora", "dora"])
def test_each_slice_has_factors_of_its_own(kind, method):
    fn, params, axis, kinds = MODELS[kind]
    adapter = trained(fn, params, method, {"kv_einsum": axis})
    ((site, _),) = adapter.sites
    p = {k: np.asarray(t, np.float64) for k, t in adapter.trainable[site.path].items()}
    assert site.kinds == kinds and p["a"].shape == (*site.stack, D, R)
    w = np.asarray(jax.tree.leaves(params)[0], np.float64)
    for at in np.ndindex(*site.stack):
        v = w[at].transpose(1, 0, 2).reshape(D, K * H) + 1.5 * p["a"][at] @ p["b"][at]
        if isinstance(method, jl.DoRA):
            v *= p["m"][at] / np.linalg.norm(v, axis=0)
        w[at] = v.reshape(D, K, H).transpose(1, 0, 2)
    np.testing.assert_allclose(jax.tree.leaves(jl.merge(params, adapter))[0], w, rtol=3e-6,
                               atol=3e-6)  # fmt: skip
    kv = np.einsum("td,...ckdh->...ctkh", np.asarray(X, np.float64), w)
    want = np.tanh(kv[..., 0, :, :, :]) * kv[..., 1, :, :, :]

    @jax.jit
    def both(trainable):
        def lifted(t):
            y = jl.lift(fn)(params, adapter.replace(trainable=t), X)
            return jnp.sum(y**2), y

        def merged(t):
            return jnp.sum(fn(jl.merge(params, adapter.replace(trainable=t)), X) ** 2)

        return jax.value_and_grad(lifted, has_aux=True)(trainable), jax.grad(merged)(trainable)

    ((_, y), got), same = both(adapter.trainable)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    for g, s in zip(jax.tree.leaves(got), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(g, s, rtol=1e-4, atol=1e-5 * float(jnp.abs(s).max()))


@pytest.mark.parametrize("kind", MODELS)
def test_peft_files_have_a_module_for_each_slice(kind, tmp_path):
    fn, params, axis, kinds = MODELS[kind]
    i = "{i}." if kind == "scanned" else ""
    names = NameMap({".*/kv_einsum/w": ("h." + i + "{k_proj|v_proj}", kinds)})
    adapter = trained(fn, params, jl.LoRA(R, 3.0), {"kv_einsum": axis})
    jl.io.save_peft(tmp_path, adapter, names)
    found = safetensors_file.read(tmp_path / "adapter_model.safetensors")[0]
    ((site, _),) = adapter.sites
    for at in np.ndindex(*site.stack):
        module = ".".join(["h", *map(str, at[:-1]), ("k_proj", "v_proj")[at[-1]]])
        for x in "ab":
            key = f"base_model.model.{module}.lora_{x.upper()}.weight"
            np.testing.assert_array_equal(found[key], adapter.trainable[site.path][x][at].T)
    assert len(found) == 2 * len(list(np.ndindex(*site.stack)))
    back = jl.io.load_peft(tmp_path, names, params)
    assert [s.kinds for s, _ in back.sites] == [kinds]
    for s, t in zip(jax.tree.leaves(back), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(s, t)


def test_vectors_and_several_axes():
    fn = lambda p, x: jnp.einsum("td,ckdh->tckh", x, p["w"]) + p["bias"][None]  # noqa: E731
    params = {"w": draw(2, K, D, H), "bias": draw(2, K, H)}
    methods = {"w": jl.LoRA(R), "bias": BitFit()}
    adapter = jl.init(
        jax.random.key(0), fn, params, X, methods=methods, stacks={"w": (0, -3), "bias": [0]}
    )
    assert {s.path: s.kinds for s, _ in adapter.sites} == {"w": "ssio", "bias": "soo"}
    assert adapter.trainable["w"]["b"].shape == (2, K, R, H)
    assert adapter.trainable["bias"]["v"].shape == (2, K * H)
    noisy = adapter.replace(trainable=jax.tree.map(lambda t: t + 1, adapter.trainable))
    np.testing.assert_allclose(
        jl.lift(fn)(params, noisy, X), fn(jl.merge(params, noisy), X), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("stacks", "message"),
    [
        ({"qkv": 0}, "matches no site; nearest: .*attn/kv_einsum/w"),
        ({"kv": 4}, r"attn/kv_einsum/w \(2, 2, 6, 3\).*got axis 4, expected one of 4"),
        ({"kv": 2}, "got axis 2, which is summed over"),
        ({"kv": (0, 1, 3)}, "expected outputs to be left"),
        ({"kv": "0"}, "got axis '0'"),
        ({"(": 0}, "not a regular expression"),
    ],
)
def test_what_cannot_be_a_stack_is_refused(stacks, message):
    with pytest.raises(ValueError, match=message):
        trained(layer, LAYER, jl.LoRA(R), stacks)


def test_mutation_one_first_factor_for_all_slices_is_seen():
    """Without the declaration the same axis has one A."""
    adapter = trained(layer, LAYER, jl.LoRA(R), None)
    ((site, _),) = adapter.sites
    assert site.kinds == "ooio" and adapter.trainable[site.path]["a"].shape == (D, R)
