"""LoKr and cores of LoHa on convolutions: golden adapters of PEFT, and ours in the real PEFT."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora as jl
from jlora import algebra
from jlora.core.site import unfold
from jlora.io import FormatError, NameMap, safetensors_file
from jlora.io.kohya import layout as lycoris_layout
from jlora.io.peft import lycoris as peft_lycoris
from tests.io.shared import conv, error, kernels

GOLDEN = Path(__file__).parents[3] / "third_party" / "peft" / "lycoris"
STATE, _ = safetensors_file.read(GOLDEN / "base.safetensors")
WEIGHTS = "adapter_model.safetensors"
ADAPTERS = ("loha_core", "lokr", "lokr_both", "lokr_core", "lokr_core_both", "lokr_whole")
ADAPTERS += ("lokr_whole_one",)
LIFTED = ("loha_core", "lokr", "lokr_whole_one")
NAMES = NameMap({r"(two|point|grouped|one|head)/kernel": r"\1"})
X = jnp.asarray(STATE["x"])


MODULES = ("two", "point", "grouped", "one", "head")


def flax_model(p, x, flax=True):
    h = conv(p["two"], x, flax, window_strides=(1, 2), padding=((1, 1), (0, 0)))
    h = conv(p["point"], jnp.tanh(h), flax)
    options = {"rhs_dilation": (2, 1), "feature_group_count": 2}
    h = jnp.tanh(conv(p["grouped"], jnp.tanh(h), flax, **options)).reshape(2, 8, -1)
    h = jnp.tanh(conv(p["one"], h, flax)).mean(2)
    return h @ p["head"]["kernel"] + p["head"]["bias"][None]


def torch_like(p, x):
    return flax_model(p, x, flax=False)


FORMS = {
    fn: (kernels(STATE, MODULES, fn is flax_model), jax.jit(fn)) for fn in (flax_model, torch_like)
}
SITES = {fn: jl.sites(fn, p, X) for fn, (p, _) in FORMS.items()}


def check_value(name, fn, lift=False):
    want = safetensors_file.read(GOLDEN / name / "expected.safetensors")[0]["expected"]
    p, run = FORMS[fn]
    assert error(run(p, X), STATE["expected"]) <= 1e-5 < 1e-3 < error(run(p, X), want)
    adapter = jl.io.load_peft(GOLDEN / name, NAMES, SITES[fn])
    assert error(run(jl.merge(p, adapter), X), want) <= 1e-5
    if lift:
        assert error(jax.jit(jl.lift(fn))(p, adapter, X), want) <= 1e-5
    return adapter


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_computes_what_peft_computes_and_goes_back_bitwise(tmp_path, name):
    for fn in FORMS:
        adapter = check_value(name, fn, lift=fn is flax_model and name in LIFTED)
        jl.io.save_peft(tmp_path, adapter, NAMES)
        assert (tmp_path / WEIGHTS).read_bytes() == (GOLDEN / name / WEIGHTS).read_bytes()
        told = [
            json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, GOLDEN / name)
        ]
        for key in ("r", "alpha", "use_effective_conv2d", "peft_type"):
            assert told[0][key] == told[1][key]


def dense(t, prefix, scale):
    """PEFT's delta [out, in, *window] of one module by numpy, from its docstring's table."""
    t = {
        k.removeprefix(f"base_model.model.{prefix}."): np.asarray(v, np.float64)
        for k, v in t.items()
    }
    if "hada_t1" in t:
        sides = (("hada_t1", "hada_w1_a", "hada_w1_b"), ("hada_t2", "hada_w2_a", "hada_w2_b"))
        one, two = (np.einsum("ij...,io,jc->oc...", *(t[k] for k in side)) for side in sides)
        return scale * one * two
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    w2 = np.einsum("ij...,io,jc->oc...", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    made = np.einsum("xy,oc...->xoyc...", w1, w2)
    return scale * made.reshape(w1.shape[0] * w2.shape[0], -1, *w2.shape[2:])


@pytest.mark.parametrize("name", ["loha_core", "lokr_core"])
def test_delta_and_algebra_by_numpy(name):
    tensors, _ = safetensors_file.read(GOLDEN / name / WEIGHTS)
    want = dense(tensors, "two", 1.5)  # alpha / r
    for fn, (p, _) in FORMS.items():
        adapter = jl.io.load_peft(GOLDEN / name, NAMES, SITES[fn])
        site = next(site for site, _ in adapter.sites if site.path == "two/kernel")
        got = np.asarray(unfold(jl.delta(p, adapter)["two/kernel"], site.kinds, site.shape))
        turned = np.moveaxis(got, (-1, -2), (0, 1)) if fn is flax_model else got
        np.testing.assert_allclose(turned, want, rtol=1e-5, atol=1e-6)
        u, v = algebra.low_rank(algebra.deltas(adapter)["two/kernel"])
        np.testing.assert_allclose(np.linalg.norm(u @ v), np.linalg.norm(want), rtol=1e-5)


def whole_one(tensors):
    """(W1 [o1, i1], W2 [o2, i2, n]) of the one-dimensional convolution."""
    return (tensors[f"base_model.model.one.lokr_{name}"] for name in ("w1", "w2"))


def test_the_factors_of_a_whole_one_dimensional_w2_are_swapped():
    """By numpy and by PEFT itself, whose factored W2 and two dimensions have the other order."""
    torch, layer = pytest.importorskip("torch"), pytest.importorskip("peft.tuners.lokr.layer")
    tensors, _ = safetensors_file.read(GOLDEN / "lokr_whole_one" / WEIGHTS)
    w1, w2 = whole_one(tensors)
    orders = [
        np.stack([np.kron(*pair(w1, w2[..., k])) for k in range(w2.shape[2])], axis=2)
        for pair in (lambda a, b: (b, a), lambda a, b: (a, b))
    ]
    t1, t2 = torch.from_numpy(w1), torch.from_numpy(w2)
    one = layer.make_kron(t1, t2).numpy().reshape(orders[0].shape)
    two = layer.make_kron(t1, t2[..., None])[..., 0].numpy()
    flat = layer.make_kron(t1, t2.flatten(1)).numpy().reshape(orders[0].shape)  # as a2 b2 would be
    for got, want, other in ((one, *orders), (two, *orders[::-1]), (flat, *orders[::-1])):
        assert error(got, want) <= 1e-6 and error(got, other) > 0.1
    for fn, (p, _) in FORMS.items():
        adapter = jl.io.load_peft(GOLDEN / "lokr_whole_one", NAMES, SITES[fn])
        (site,) = (site for site, _ in adapter.sites if site.path == "one/kernel")
        got = np.asarray(unfold(jl.delta(p, adapter)["one/kernel"], site.kinds, site.shape))
        got = np.moveaxis(got, (-1, -2), (0, 1)) if fn is flax_model else got
        assert error(got, 3 / 8 * orders[0]) <= 1e-5  # alpha / r


def moved(fresh):
    """The adapter with noise on everything that is trained."""
    rng = np.random.default_rng(0)
    noise = jax.tree.map(lambda t: rng.normal(size=t.shape).astype(t.dtype) / 3, fresh.trainable)
    return fresh.replace(trainable=jax.tree.map(jnp.add, fresh.trainable, noise))


METHODS = {
    "loha": jl.LoHa(rank=2, alpha=3.0),
    "loha_core": jl.LoHa(rank=2, alpha=3.0, tucker=True),
    "lokr": jl.LoKr(rank=2, alpha=3.0),
    "lokr_both": jl.LoKr(rank=1, alpha=3.0, factor=6, decompose_both=True),
    "lokr_core": jl.LoKr(rank=2, alpha=3.0, tucker=True),
    "lokr_swapped": jl.LoKr(rank=8, alpha=3.0, swapped=True),
}
ONLY = {"lokr_swapped": "(one|head)/kernel"}


@pytest.mark.parametrize("name", METHODS)
def test_real_peft_computes_what_we_do(tmp_path, monkeypatch, name):
    """Adapters made here, fresh arrays and noise; cores on kernels of either layout."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "golden")
    import make_peft

    for fn in FORMS if name.endswith(("core", "swapped")) else [flax_model]:
        p, run = FORMS[fn]
        methods = {ONLY.get(name, "kernel"): METHODS[name]}
        fresh = jl.init(jax.random.key(0), fn, p, X, methods=methods)
        np.testing.assert_allclose(run(jl.merge(p, fresh), X), run(p, X))  # the identity
        adapter = moved(fresh)
        jl.io.save_peft(tmp_path, adapter, NAMES)
        base = make_peft.Wide()
        base.load_state_dict({k: torch.from_numpy(STATE[k]) for k in base.state_dict()})
        module = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        with torch.no_grad():
            theirs = module(torch.from_numpy(STATE["x"])).numpy()
        ours = run(jl.merge(p, adapter), X)
        assert error(ours, STATE["expected"]) > 1e-3 and error(ours, theirs) <= 1e-5
        back = jl.io.load_peft(tmp_path, NAMES, SITES[fn])
        chex.assert_trees_all_equal(adapter.trainable, back.trainable)


def test_what_peft_cannot_compute_is_refused(tmp_path):
    p, _ = FORMS[flax_model]

    def made(method, where):
        fresh = jl.init(jax.random.key(0), flax_model, p, X, methods={where: method})
        return fresh.replace(trainable=jax.tree.map(lambda t: t + 1, fresh.trainable))

    swapped = made(jl.LoKr(rank=8, swapped=True), "two/kernel")
    for adapter in (made(jl.LoKr(rank=8), "one/kernel"), swapped):
        with pytest.raises(FormatError, match=r"PEFT has the product W2 ⊗ W1 in one-dimensional"):
            jl.io.save_peft(tmp_path / "x", adapter, NAMES)
    with pytest.raises(FormatError, match="no place for a swapped LoKr"):
        jl.io.save_kohya(tmp_path / "x", swapped, NAMES)
    mixed = made(jl.LoKr(rank=1, tucker=True), "two/kernel")
    other = made(jl.LoKr(rank=1), "head/kernel")
    both = jl.Adapter(
        {**mixed.trainable, **other.trainable},
        {**mixed.frozen, **other.frozen},
        (*mixed.sites, *other.sites),
    )
    with pytest.raises(FormatError, match="one use_effective_conv2d for all modules"):
        jl.io.save_peft(tmp_path / "x", both, NAMES)
    for method in (jl.LoHa(2), jl.LoKr(2)):
        site = jl.Site("two/kernel", (2, 2, 2, 8, 12), "iiiio", jnp.dtype("float32"), ("conv",))
        ones = jl.init(jax.random.key(0), *deep(site), methods={"two": method})
        ones = ones.replace(trainable=jax.tree.map(lambda t: t + 1, ones.trainable))
        with pytest.raises(FormatError, match="one- and two-dimensional convolutions only"):
            jl.io.save_peft(tmp_path / "x", ones, NAMES)
    assert not (tmp_path / "x").exists()


def deep(site):
    """A function with one three-dimensional convolution, its parameters and input."""

    def fn(p, x):
        spec = ("NCDHW", "DHWIO", "NCDHW")
        w = p["two"]["kernel"]
        return lax.conv_general_dilated(x, w, (1, 1, 1), "VALID", dimension_numbers=spec)

    return fn, {"two": {"kernel": jnp.ones(site.shape)}}, jnp.ones((1, 8, 2, 2, 2))


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("lokr_core", {"use_effective_conv2d": False}, "PEFT makes"),
        ("lokr", {"use_effective_conv2d": True}, "PEFT makes"),
        ("loha_core", {"use_effective_conv2d": False}, "use_effective_conv2d = False"),
        ("loha_core", {"r": 3}, r"has shape \[2, \d+\], expected \[3, \d+\]|expected"),
        ("lokr_whole", {"r": 2}, "PEFT makes"),
        ("lokr_core", {"use_effective_conv2d": 1}, "expected e.g. False"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path, name, change, why):
    config = json.loads((GOLDEN / name / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / WEIGHTS).write_bytes((GOLDEN / name / WEIGHTS).read_bytes())
    with pytest.raises(FormatError, match=why):
        jl.io.load_peft(tmp_path, NAMES, SITES[flax_model])


def test_mutation_a_core_with_its_ranks_swapped_is_seen(monkeypatch):
    good = lycoris_layout.core
    monkeypatch.setattr(lycoris_layout, "core", lambda t, n: good(t, n).swapaxes(2, 3))
    for name in ("loha_core", "lokr_core"):
        with pytest.raises(AssertionError):
            check_value(name, flax_model)


def test_mutation_a_whole_w2_in_the_usual_order_is_seen(monkeypatch):
    good = lycoris_layout.read_kron
    monkeypatch.setattr(peft_lycoris, "read_kron", lambda site, t, swapped: good(site, t))
    with pytest.raises(AssertionError):
        check_value("lokr_whole_one", flax_model)
