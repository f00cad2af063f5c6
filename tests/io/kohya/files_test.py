"""kohya / LyCORIS and diffusers files against numpy's reading of their formats."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import FormatError, NameMap, safetensors_file
from jlora.methods.decomposed.dora import DoRA
from jlora.methods.kronecker.lokr import LoKr
from jlora.methods.low_rank.loha import LoHa
from jlora.methods.selective.ia3 import IA3

NAMES = NameMap(
    {
        r"blocks/attn/(q|k)/kernel": r"blocks.{i}.attn.to_\1",
        r"blocks/up_proj/kernel": "blocks.{i}.up_proj",
    }
)
RNG = np.random.default_rng(0)
SHAPES = {"attn.to_q": (8, 8), "attn.to_k": (4, 8), "up_proj": (12, 8)}  # [out, in]


def draw(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


PARAMS = {
    "blocks": {
        "attn": {"q": {"kernel": draw(2, 8, 8)}, "k": {"kernel": draw(2, 8, 4)}},
        "up_proj": {"kernel": draw(2, 8, 12)},
    }
}
SITE = {
    "attn.to_q": "blocks/attn/q/kernel",
    "attn.to_k": "blocks/attn/k/kernel",
    "up_proj": "blocks/up_proj/kernel",
}


def lora(out, inner):
    t = {"lora_down.weight": draw(3, inner), "lora_up.weight": draw(out, 3)}
    return t, 3, t["lora_up.weight"] @ t["lora_down.weight"]


def loha(out, inner):
    t = {f"hada_w{n}_{s}": draw(*(out, 2) if s == "a" else (2, inner)) for n in "12" for s in "ab"}
    return t, 2, (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def lokr(out, inner):
    t = {"lokr_w1": draw(2, 4), "lokr_w2_a": draw(out // 2, 1), "lokr_w2_b": draw(1, inner // 4)}
    return t, 1, np.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"])


def whole(out, inner):
    t = {"lokr_w1": draw(2, 4), "lokr_w2": draw(out // 2, inner // 4)}
    return t, None, np.kron(t["lokr_w1"], t["lokr_w2"])


KINDS = {"attn.to_q": lora, "attn.to_k": loha, "up_proj": lokr}


def a_file(path, kinds=KINDS, alpha=5.0, prefix="lora_unet"):
    """A file, and the delta [in, out] by site that numpy reads from it."""
    tensors, deltas = {}, {}
    for module, kind in kinds.items():
        for layer in range(2):
            t, rank, delta = kind(*SHAPES[module])
            key = f"{prefix}_blocks_{layer}_{module.replace('.', '_')}"
            tensors |= {f"{key}.{suffix}": array for suffix, array in t.items()}
            if alpha is not None:
                tensors[f"{key}.alpha"] = np.asarray(alpha, np.float32)
            scale = 1.0 if rank is None or alpha is None else alpha / rank
            deltas.setdefault(SITE[module], []).append(scale * delta.T)
    safetensors_file.write(path, tensors, {"format": "pt"})
    return tensors, {site: np.stack(d) for site, d in deltas.items()}


def check_deltas(adapter, deltas):
    made = jl.delta(jax.tree.map(jnp.asarray, PARAMS), adapter)
    assert set(made) == set(deltas)
    for site, delta in deltas.items():
        np.testing.assert_allclose(made[site], delta, rtol=1e-4, atol=1e-5, err_msg=site)


@pytest.mark.parametrize("alpha", [5.0, None])
def test_every_module_has_its_own_method_and_scale(tmp_path, alpha):
    path = tmp_path / "x.safetensors"
    tensors, deltas = a_file(path, alpha=alpha)
    adapter = jl.io.load_kohya(path, NAMES, PARAMS, layout="in_out")
    assert [type(m) for _, m in adapter.sites] == [LoHa, jl.LoRA, LoKr]
    check_deltas(adapter, deltas)
    jl.io.save_kohya(tmp_path / "y.safetensors", adapter, NAMES)
    again, _ = safetensors_file.read(tmp_path / "y.safetensors")
    if alpha is None:
        again = {key: array for key, array in again.items() if not key.endswith("alpha")}
    assert set(again) == set(tensors)
    for key, array in tensors.items():
        assert again[key].tobytes() == array.tobytes(), key


def test_two_whole_kronecker_factors_have_the_scale_one(tmp_path):
    path = tmp_path / "x.safetensors"
    _, deltas = a_file(path, {"up_proj": whole}, alpha=5.0)
    adapter = jl.io.load_kohya(path, NAMES, PARAMS, layout="in_out")
    check_deltas(adapter, deltas)
    double = adapter.replace(frozen=jax.tree.map(lambda t: 2 * t, adapter.frozen))
    jl.io.save_kohya(tmp_path / "y.safetensors", double, NAMES)
    twice = jl.io.load_kohya(tmp_path / "y.safetensors", NAMES, PARAMS, layout="in_out")
    check_deltas(twice, {site: 2 * delta for site, delta in deltas.items()})


def test_dora_scale_is_the_magnitude(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors, deltas = a_file(path, {"attn.to_q": lora})
    magnitude = draw(8, 1)
    for key in [k for k in tensors if k.endswith("alpha")]:
        tensors[key.replace("alpha", "dora_scale")] = magnitude
    safetensors_file.write(path, tensors, {"format": "pt"})
    adapter = jl.io.load_kohya(path, NAMES, PARAMS, layout="in_out")
    site = "blocks/attn/q/kernel"
    v = PARAMS["blocks"]["attn"]["q"]["kernel"] + deltas[site]
    want = v * magnitude[None, :, 0] / np.linalg.norm(v, axis=1, keepdims=True)
    got = jl.merge(jax.tree.map(jnp.asarray, PARAMS), adapter)
    np.testing.assert_allclose(got["blocks"]["attn"]["q"]["kernel"], want, rtol=1e-4, atol=1e-5)
    assert isinstance(adapter.sites[0][1], DoRA)
    jl.io.save_kohya(tmp_path / "y.safetensors", adapter, NAMES)
    assert (tmp_path / "y.safetensors").read_bytes() == path.read_bytes()


def test_alpha_zero_is_the_rank_as_no_trainer_has_a_scale_of_zero(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors, deltas = a_file(path, alpha=None)
    tensors |= {f"{k.split('.')[0]}.alpha": np.zeros((), np.float32) for k in tensors}
    safetensors_file.write(path, tensors, {"format": "pt"})
    adapter = jl.io.load_kohya(path, NAMES, PARAMS, layout="in_out")
    check_deltas(adapter, deltas)
    off = adapter.replace(frozen=jax.tree.map(jnp.zeros_like, adapter.frozen))
    with pytest.raises(FormatError, match="the scale is 0, which this format cannot say"):
        jl.io.save_kohya(path, off, NAMES)


@pytest.mark.parametrize("kind", [lora, loha])
def test_real_lycoris_reads_alpha_zero_as_we_do(tmp_path, kind):
    torch = pytest.importorskip("torch")
    modules = pytest.importorskip("lycoris.modules")
    path = tmp_path / "x.safetensors"
    tensors, _ = a_file(path, {"up_proj": kind}, alpha=0.0)
    got = jl.delta(
        jax.tree.map(jnp.asarray, PARAMS), jl.io.load_kohya(path, NAMES, PARAMS, layout="in_out")
    )["blocks/up_proj/kernel"]
    cls = {lora: modules.LoConModule, loha: modules.LohaModule}[kind]
    for layer in range(2):
        key = f"lora_unet_blocks_{layer}_up_proj"
        linear = torch.nn.Linear(8, 12, bias=False)
        state = {k: torch.from_numpy(t) for k, t in tensors.items()}
        with torch.no_grad():
            parts = cls.extract_state_dict(state, key)
            theirs = cls.make_module_from_state_dict(key, linear, *parts)
            want = theirs.get_diff_weight(1.0)[0].numpy().T
        np.testing.assert_allclose(got[layer], want, rtol=1e-4, atol=1e-5)


def comfy(tensors, prefix, names):
    """Dotted names, as ComfyUI and its trainers write them."""
    made = {}
    for key, array in tensors.items():
        flat, _, suffix = key.partition(".")
        module = next(n for n in names if n.replace(".", "_") == flat.removeprefix("lora_unet_"))
        made[f"{prefix}{module}.{suffix}"] = array
    return made


@pytest.mark.parametrize("prefix", ["diffusion_model.", ""])
@pytest.mark.parametrize("alpha", [5.0, None])
def test_dotted_names_are_read_by_the_reader_of_diffusers(tmp_path, prefix, alpha):
    """`lora_down`, LoHa and LoKr below `diffusion_model.`, each with its alpha."""
    path = tmp_path / "x.safetensors"
    tensors, deltas = a_file(path, alpha=alpha)
    names = [f"blocks.{k}.{module}" for k in range(2) for module in SHAPES]
    dotted = comfy(tensors, prefix, names)
    safetensors_file.write(path, dotted, {})
    component = prefix.removesuffix(".")
    adapter = jl.io.load_diffusers(path, NAMES, PARAMS, component, layout="in_out")
    assert [type(m) for _, m in adapter.sites] == [LoHa, jl.LoRA, LoKr]
    check_deltas(adapter, deltas)
    with pytest.raises(FormatError, match=r"dotted names are.*see load_diffusers"):
        jl.io.load_kohya(path, NAMES, PARAMS, layout="in_out")
    old = {k.replace("lora_down", "lora.down").replace("lora_up", "lora.up"): t
           for k, t in dotted.items()}  # fmt: skip
    safetensors_file.write(path, old, {})
    check_deltas(jl.io.load_diffusers(path, NAMES, PARAMS, component, layout="in_out"), deltas)
    both = {**dotted, **old}
    safetensors_file.write(path, both, {})
    with pytest.raises(FormatError, match="by two names"):
        jl.io.load_diffusers(path, NAMES, PARAMS, component, layout="in_out")


def test_names_whose_underscores_collide_are_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    a_file(path, {"up_proj": lora})
    names = NameMap({r"a/kernel": "blocks.0_up.proj", r"b/kernel": "blocks.0.up_proj"})
    params = {"a": {"kernel": draw(8, 12)}, "b": {"kernel": draw(8, 12)}}
    with pytest.raises(FormatError, match="two modules are called 'lora_unet_blocks_0_up_proj'"):
        jl.io.load_kohya(path, names, params, layout="in_out")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t, k: t.update({f"{k}.lora_mid.weight": draw(3, 3)}), "no window"),
        (lambda t, k: t.pop(f"{k}.lora_up.weight"), "no LoRA"),
        (lambda t, k: t.update({f"{k}.lora_up.weight": draw(8, 2)}), "expected"),
        (lambda t, k: t.update({f"{k}.lora_down.weight": draw(3, 8, 1, 1)}), "expected"),
        (lambda t, k: t.update({f"{k}.lora_down.weight": np.asarray(1, np.float32)}), "rank|shape"),
        (lambda t, k: t.update({f"{k}.alpha": draw(2)}), "one number"),
        (lambda t, k: t.update({f"{k}.dora_scale": draw(1, 7)}), "dora_scale"),
        (lambda t, k: t.update({"lora_unet_nowhere.alpha": draw(1)}), "not a site"),
        (lambda t, k: t.update({"lora_te_text.lora_up.weight": draw(1, 1)}), "does not start"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, change, why):
    path = tmp_path / "x.safetensors"
    tensors, _ = a_file(path, {"attn.to_q": lora})
    change(tensors, "lora_unet_blocks_1_attn_to_q")
    safetensors_file.write(path, tensors, {})
    with pytest.raises(FormatError, match=why):
        jl.io.load_kohya(path, NAMES, PARAMS, layout="in_out")


def test_other_prefixes_can_be_left(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors, deltas = a_file(path, {"attn.to_q": lora})
    safetensors_file.write(path, tensors | {"lora_te_t.alpha": draw(1)}, {})
    check_deltas(jl.io.load_kohya(path, NAMES, PARAMS, others="leave", layout="in_out"), deltas)
    with pytest.raises(FormatError, match="no key starts with"):
        jl.io.load_kohya(path, NAMES, PARAMS, "lora_te2", others="leave", layout="in_out")


def forward(params, x):
    def block(x, p):
        y = x @ p["attn"]["q"]["kernel"]
        k = x @ p["attn"]["k"]["kernel"]
        return y + jnp.tile(k, 2) + (x @ p["up_proj"]["kernel"])[:, :8], None

    return jax.lax.scan(block, x, params["blocks"])[0]


def made(**methods):
    params = jax.tree.map(jnp.asarray, PARAMS)
    methods = {pattern.replace("_", "/"): m for pattern, m in methods.items()}
    fresh = jl.init(jax.random.key(0), forward, params, jnp.ones((2, 8)), methods=methods)
    return fresh.replace(trainable=jax.tree.map(lambda t: t + 0.5, fresh.trainable))


def same(x, y):
    assert x.sites == y.sites
    chex.assert_trees_all_equal_shapes_and_dtypes(x, y)
    chex.assert_trees_all_equal(x, y)


def test_diffusers_round_trip_with_metadata(tmp_path):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    for adapter in (
        made(attn_q=jl.LoRA(2, alpha=3.0, rslora=True), attn_k=jl.LoRA(4, alpha=7.0, rslora=True)),
        made(attn_q=DoRA(2, alpha=3.0)),
    ):
        jl.io.save_diffusers(path, adapter, NAMES)
        tensors, header = safetensors_file.read(path)
        assert all(key.startswith("transformer.blocks.") for key in tensors)
        told = json.loads(header["lora_adapter_metadata"])
        assert told["transformer.peft_type"] == "LORA" and told["transformer.r"] in (2, 4)
        same(adapter, jl.io.load_diffusers(path, NAMES, PARAMS, layout="in_out"))
    with pytest.raises(FormatError, match="diffusers loads LoRA only"):
        jl.io.save_diffusers(path, made(attn_q=LoHa(2)), NAMES)


def test_diffusers_without_metadata_has_alpha_equal_to_rank(tmp_path):
    path = tmp_path / "x.safetensors"
    adapter = made(attn_q=jl.LoRA(2, alpha=3.0), attn_k=jl.LoRA(4, alpha=7.0))
    jl.io.save_diffusers(path, adapter, NAMES, "unet")
    tensors, _ = safetensors_file.read(path)
    safetensors_file.write(path, tensors, {"format": "pt"})
    back = jl.io.load_diffusers(path, NAMES, PARAMS, "unet", layout="in_out")
    assert [m.rank for _, m in back.sites] == [4, 2]
    assert all(np.all(np.asarray(f["scale"]) == 1) for f in back.frozen.values())
    same(back.replace(frozen={}), adapter.replace(frozen={}))
    with pytest.raises(FormatError, match="other components"):
        jl.io.load_diffusers(path, NAMES, PARAMS, "transformer", layout="in_out")
    lost = {k: v for k, v in tensors.items() if "to_q.lora_A" not in k}
    safetensors_file.write(path, lost, {"format": "pt"})
    with pytest.raises(FormatError, match="no matrix"):
        jl.io.load_diffusers(path, NAMES, PARAMS, "unet", layout="in_out")


def test_diffusers_alphas_are_scales_unless_the_metadata_say_them(tmp_path):
    path = tmp_path / "x.safetensors"
    adapter = made(attn_q=jl.LoRA(2, alpha=2.0), attn_k=jl.LoRA(4, alpha=4.0))
    jl.io.save_diffusers(path, adapter, NAMES, "unet")
    tensors, header = safetensors_file.read(path)
    alphas = {"attn.to_q": [1.5, 0.0], "attn.to_k": [3.0, 4.0]}
    for module, values in alphas.items():
        for layer, alpha in enumerate(values):
            tensors[f"unet.blocks.{layer}.{module}.alpha"] = np.asarray(alpha, np.float32)
    safetensors_file.write(path, tensors, {"format": "pt"})
    back = jl.io.load_diffusers(path, NAMES, PARAMS, "unet", layout="in_out")
    scales = {site: np.asarray(f["scale"]).tolist() for site, f in back.frozen.items()}
    assert scales == {SITE["attn.to_q"]: [0.75, 0.0], SITE["attn.to_k"]: [0.75, 1.0]}
    safetensors_file.write(path, tensors, header)  # diffusers refuses both as well
    with pytest.raises(FormatError, match="two sources of the scale"):
        jl.io.load_diffusers(path, NAMES, PARAMS, "unet", layout="in_out")
    tensors["unet.blocks.0.attn.to_q.alpha"] = draw(2)
    safetensors_file.write(path, tensors, {"format": "pt"})
    with pytest.raises(FormatError, match=r"unet.blocks.0.attn.to_q: alpha has shape \[2\]"):
        jl.io.load_diffusers(path, NAMES, PARAMS, "unet", layout="in_out")


POINT = jl.Site("w", (1, 1, 8, 12), "iiio", jnp.dtype("float32"), ("conv",))
MATRIX = jl.Site("w", (8, 12), "io", jnp.dtype("float32"), ("dot",))
WINDOW = jl.Site("w", (3, 3, 8, 12), "iiio", jnp.dtype("float32"), ("conv",))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", [lora, loha, lokr, whole])
def test_a_convolution_of_one_point_and_a_matrix_are_read_for_each_other(tmp_path, kind, dora):
    """SD 1.5's `proj_in` is the one, SD 2's the other; a larger window stays an error."""
    path, names = tmp_path / "x.safetensors", NameMap({"w": "proj_in"})
    t, _, delta = kind(12, 8)
    if dora:
        t["dora_scale"] = draw(12, 1)
    windowed = {
        k: a.reshape(*a.shape, 1, 1)
        if k in ("lora_down.weight", "lora_up.weight", "lokr_w2", "dora_scale")
        else a
        for k, a in t.items()
    }
    w = jnp.asarray(draw(8, 12))
    for tensors in (t, windowed):
        kohya = {f"lora_unet_proj_in.{k}": a for k, a in tensors.items()}
        safetensors_file.write(path, kohya, {})
        for site, params in ((MATRIX, {"w": w}), (POINT, {"w": w.reshape(1, 1, 8, 12)})):
            adapter = jl.io.load_kohya(path, names, [site])
            got = np.asarray(jl.merge(params, adapter)["w"]).reshape(8, 12)
            v = np.asarray(w, np.float64) + delta.T
            if dora:
                v = v * t["dora_scale"].T / np.linalg.norm(v, axis=0, keepdims=True)
            np.testing.assert_allclose(got, v, rtol=1e-4, atol=1e-4)
        if kind is not loha:  # whose tensors are the same of every window that fits
            with pytest.raises(FormatError, match=r"expected|make"):
                jl.io.load_kohya(path, names, [WINDOW])


@pytest.mark.parametrize("dora", [False, True])
def test_one_point_in_files_of_peft_and_diffusers(tmp_path, dora):
    a, b, m = draw(3, 8), draw(12, 3), draw(12)
    w, names = jnp.asarray(draw(8, 12)), NameMap({"w": "proj_in"})
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "use_dora": dora}
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": ["proj_in"]})
    )
    want = np.asarray(w, np.float64) + (b @ a).T
    if dora:
        want = want * m / np.linalg.norm(want, axis=0)
    path = tmp_path / "adapter_model.safetensors"
    for tail, m_shape in (((), (12,)), ((1, 1), (1, 12, 1, 1))):
        tensors = {
            "lora_A.weight": a.reshape(3, 8, *tail),
            "lora_B.weight": b.reshape(12, 3, *tail),
        }
        tensors |= {"lora_magnitude_vector": m.reshape(m_shape)} if dora else {}
        for site, params in ((MATRIX, {"w": w}), (POINT, {"w": w.reshape(1, 1, 8, 12)})):
            for start in ("base_model.model.", "unet."):
                keyed = {f"{start}proj_in.{k}": t for k, t in tensors.items()}
                safetensors_file.write(path, keyed, {})
                if start == "unet.":
                    adapter = jl.io.load_diffusers(path, names, [site], "unet")
                else:
                    adapter = jl.io.load_peft(tmp_path, names, [site])
                got = np.asarray(jl.merge(params, adapter)["w"]).reshape(8, 12)
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_methods_without_a_place_are_refused(tmp_path):
    with pytest.raises(FormatError, match="no place for IA3"):
        jl.io.save_kohya(tmp_path / "x", made(attn_q=IA3()), NAMES)
    zero = jax.tree.map(jnp.zeros_like, made(attn_q=jl.LoRA(2)))
    with pytest.raises(FormatError, match="nothing to write"):
        jl.io.save_kohya(tmp_path / "x", zero, NAMES)
    assert not (tmp_path / "x").exists()
