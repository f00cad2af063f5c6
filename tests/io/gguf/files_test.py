"""Adapters for llama.cpp: llama.cpp itself runs them on a tiny model, as jlora does."""

import struct

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.io import FormatError
from jlora.io.gguf import base as gguf_names
from jlora.models import decoder

gguf = pytest.importorskip("gguf", reason="gguf is an extra")

VOCAB, WIDTH, HEADS, KV, D, FFN, LAYERS, RANK = 64, 32, 4, 2, 8, 48, 2, 3
SHAPES = {
    "attn_q": (HEADS * D, WIDTH), "attn_k": (KV * D, WIDTH), "attn_v": (KV * D, WIDTH),
    "attn_output": (WIDTH, HEADS * D), "ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH),
    "ffn_down": (WIDTH, FFN),
}  # fmt: skip
BASE = gguf_names.GgufBase("llama", LAYERS, HEADS, KV, tied=False)
TOKENS = (1, 5, 2, 9, 7)
SITES = "layers/|embed_tokens|lm_head"
LLAMA = {k: f"model.{v}" for k, v in jl.io.llama().rules.items()}
NAMES = jl.io.NameMap({**LLAMA, "lm_head/kernel": "lm_head"})


def weights(arch, tied):
    """The tensors of a model, by llama.cpp's names."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: (0.2 * rng.normal(size=shape)).astype("f4")  # noqa: E731
    found = {f"blk.{i}.{n}.weight": normal(*s) for i in range(LAYERS) for n, s in SHAPES.items()}
    if arch == "qwen2":
        found |= {f"blk.{i}.attn_{n}.bias": normal(SHAPES[f"attn_{n}"][0])
                  for i in range(LAYERS) for n in "qkv"}  # fmt: skip
    norms = [f"blk.{i}.{n}_norm.weight" for i in range(LAYERS) for n in ("attn", "ffn")]
    found |= {name: np.ones(WIDTH, "f4") for name in (*norms, "output_norm.weight")}
    found["token_embd.weight"] = 5 * normal(VOCAB, WIDTH)
    return found if tied else found | {"output.weight": normal(VOCAB, WIDTH)}


def write_model(path, tensors, arch="llama"):
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(D)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*map(chr, range(0x21, 0x21 + VOCAB - 1)), "<end>"])
    writer.add_token_types([1] * (VOCAB - 1) + [3])
    writer.add_token_merges(['! "'])
    writer.add_eos_token_id(VOCAB - 1)
    writer.add_add_bos_token(False)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def log_probs(model, adapter=None):
    """Those of the next token after TOKENS, by llama.cpp: [VOCAB]."""
    llama_cpp = pytest.importorskip("xllamacpp", reason="no wheel for this Python")
    settings = llama_cpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup = str(model), 64, False
    settings.n_parallel = settings.cpuparams.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.verbosity = -1
    if adapter is not None:
        settings.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = llama_cpp.Server(settings)
    asked = {"prompt": list(TOKENS), "n_predict": 1, "n_probs": VOCAB, "seed": 1, "top_k": 0,
             "temperature": 1.0, "top_p": 1.0, "min_p": 0.0}  # fmt: skip
    found = server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]
    out = np.full(VOCAB, np.nan)
    for entry in found["top_logprobs"]:
        out[entry["id"]] = entry["logprob"]
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(path, config, parameters, an adapter of every matrix of the model)."""
    path = write_model(tmp_path_factory.mktemp("gguf") / "m.gguf", weights("llama", tied=False))
    config, params = decoder.load_gguf(path)
    fn = lambda p, ids: decoder.forward(p, ids, config=config).logits  # noqa: E731
    ids = jnp.asarray([TOKENS])
    methods = {SITES: jl.LoRA(rank=RANK, alpha=6.0)}
    adapter = jl.init(jax.random.key(0), fn, params, ids, methods=methods)
    rng = np.random.default_rng(1)
    noisy = jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), adapter.trainable
    )
    return path, fn, params, ids, adapter.replace(trainable=noisy)


def test_llama_cpp_runs_the_adapter_as_jlora_does(model, tmp_path, monkeypatch):
    """Every matrix adapted: log-probabilities to 1e-5; heads in another order are noticed."""
    path, fn, params, ids, adapter = model
    base = jl.io.gguf_base(path)
    assert base == BASE
    jl.io.save_gguf(tmp_path / "a.gguf", adapter, NAMES, base)
    logits = jax.jit(jl.lift(fn))(params, adapter, ids)
    expected = np.asarray(jax.nn.log_softmax(logits[0, -1]))
    got = log_probs(path, tmp_path / "a.gguf")
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.abs(log_probs(path) - expected).max() > 0.1
    monkeypatch.setattr("jlora.io.gguf.files.heads_of", lambda base, name: None)
    jl.io.save_gguf(tmp_path / "b.gguf", adapter, NAMES, base)
    assert np.abs(log_probs(path, tmp_path / "b.gguf") - expected).max() > 0.01


def test_another_architecture_is_its_merged_weights(model, tmp_path):
    """Qwen 2, whose heads are stored as transformers has them: llama.cpp on W + alpha / r B A."""
    tensors, adapter = weights("qwen2", tied=True), model[-1]
    keep = [s for s in adapter.sites if s[0].path.startswith("layers/")]
    adapter = adapter.replace(trainable={s.path: adapter.trainable[s.path] for s, _ in keep},
                              frozen={s.path: adapter.frozen[s.path] for s, _ in keep},
                              sites=tuple(keep))  # fmt: skip
    path = write_model(tmp_path / "m.gguf", tensors, "qwen2")
    base = jl.io.gguf_base(path)
    assert base == BASE._replace(architecture="qwen2", tied=True)
    jl.io.save_gguf(tmp_path / "a.gguf", adapter, NAMES, base)
    ours = [f"attention/{name}" for name in ("query", "key", "value", "out")]
    ours = dict(zip(SHAPES, [*ours, "ffn/gate", "ffn/up", "ffn/down"], strict=True))
    merged = dict(tensors)
    for name in SHAPES:
        part = {
            k: np.asarray(v, "f8")
            for k, v in adapter.trainable[f"layers/{ours[name]}/kernel"].items()
        }
        for i in range(LAYERS):
            delta = 6.0 / RANK * part["a"][i] @ part["b"][i]
            key = f"blk.{i}.{name}.weight"
            merged[key] = (tensors[key] + delta.T).astype("f4")
    expected = log_probs(write_model(tmp_path / "merged.gguf", merged, "qwen2"))
    np.testing.assert_allclose(log_probs(path, tmp_path / "a.gguf"), expected, atol=1e-5)


def test_read_back_bit_for_bit(model, tmp_path):
    _, fn, params, ids, adapter = model
    file = tmp_path / "a.gguf"
    jl.io.save_gguf(file, adapter, NAMES, BASE)
    again = jl.io.load_gguf(file, NAMES, jl.sites(fn, params, ids), BASE)
    chex.assert_trees_all_equal(again.trainable, adapter.trainable)
    assert {(s.path, m) for s, m in again.sites} == {(s.path, m) for s, m in adapter.sites}
    half = adapter.replace(trainable=jax.tree.map(lambda x: x.astype("f2"), adapter.trainable))
    jl.io.save_gguf(file, half, NAMES, BASE)
    again = jl.io.load_gguf(file, NAMES, params, BASE, layout="in_out")
    chex.assert_trees_all_equal(again.trainable, half.trainable)


def one_site(method=None, dtype="f4"):
    params = {"layers": [{"self_attn": {"q_proj": {"kernel": jnp.ones((32, 32), "f4")}}}]}
    fn = lambda p, x: x @ p["layers"][0]["self_attn"]["q_proj"]["kernel"]  # noqa: E731
    adapter = jl.init(jax.random.key(0), fn, params, jnp.ones((1, 32)),
                      methods={"kernel": method or jl.LoRA(rank=2, alpha=4.0)})  # fmt: skip
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, dtype), adapter.trainable)
    return adapter.replace(trainable=ones)


def refused(call, *words):
    with pytest.raises(FormatError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_what_llama_cpp_cannot_run_is_not_written(model, tmp_path):
    file, adapter = tmp_path / "a.gguf", model[-1]
    save = lambda adapter, base=BASE: jl.io.save_gguf(file, adapter, jl.io.llama(), base)  # noqa: E731
    refused(lambda: jl.io.save_gguf(file, adapter, NAMES, BASE._replace(tied=True)),
            "token_embd", "output layer", "merge")  # fmt: skip
    refused(lambda: save(one_site(jl.DoRA(rank=2))), "LoRA only", "DoRA")
    refused(lambda: save(one_site(dtype=jnp.bfloat16)), "bfloat16", "float32")
    refused(lambda: save(one_site(jl.LoRA(rank=2, alpha=0.0))), "not 0")
    refused(lambda: save(one_site(), BASE._replace(blocks=0)), "no module")
    sites = list(adapter.sites)
    sites[0] = (sites[0][0], jl.LoRA(rank=RANK, alpha=1.0))
    path = sites[0][0].path
    frozen = dict(adapter.frozen) | {
        path: {"scale": jnp.full_like(adapter.frozen[path]["scale"], 1 / 3)}
    }
    mixed = adapter.replace(frozen=frozen, sites=tuple(sites))
    refused(lambda: jl.io.save_gguf(file, mixed, NAMES, BASE), "one alpha", "6 at")
    assert not list(tmp_path.iterdir())


def test_rank_stabilised_scales_are_an_alpha(tmp_path):
    """alpha / sqrt(r) = alpha' / r: 4 / sqrt(2) at rank 2 is alpha' = 5.657."""
    adapter = one_site(jl.LoRA(rank=2, alpha=4.0, rslora=True))
    jl.io.save_gguf(tmp_path / "a.gguf", adapter, jl.io.llama(), BASE)
    reader = gguf.GGUFReader(str(tmp_path / "a.gguf"))
    value = reader.get_field("adapter.lora.alpha").contents()
    np.testing.assert_allclose(value, 2 * 4 / np.sqrt(2), rtol=1e-6)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    file = tmp_path_factory.mktemp("good") / "a.gguf"
    jl.io.save_gguf(file, one_site(), jl.io.llama(), BASE)
    return file.read_bytes()


def changed(good, old, new):
    assert good.count(old) == 1
    return good.replace(old, new)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: b"", ("not a GGUF",)),
        (lambda g: g[:100], ("not a GGUF",)),
        (lambda g: g[:-4], ("not a GGUF",)),
        (lambda g: g[:8] + struct.pack("<Q", 2**60) + g[16:], ("not a GGUF",)),  # tensors
        (lambda g: g[:16] + struct.pack("<Q", 2**60) + g[24:], ("not a GGUF",)),  # fields
        (lambda g: changed(g, b"adapter.type", b"adapter.tipe"), ("adapter.type: missing",)),
        (lambda g: changed(g, b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma"),
         ("general.architecture", "'gemma'", "'llama'")),
        (lambda g: changed(g, b"attn_q.weight.lora_a", b"attn_z.weight.lora_a"), ("lora_b",)),
        (lambda g: changed(g, b"attn_q.weight.lora_a", b"attn_q.weight.lora_c"), ("surplus",)),
        (lambda g: g.replace(b"blk.0.attn_q", b"blk.7.attn_q"), ("blk.7.attn_q", "not a site")),
        (lambda g: g[:-4] + struct.pack("<f", np.nan), ("NaN",)),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_error(good, tmp_path, change, words):
    file = tmp_path / "bad.gguf"
    file.write_bytes(change(good))
    where = [site for site, _ in one_site().sites]
    refused(lambda: jl.io.load_gguf(file, jl.io.llama(), where, BASE), str(file), *words)


def test_a_model_is_no_adapter(model, tmp_path):
    refused(lambda: jl.io.load_gguf(model[0], NAMES, [], BASE), "general.type")


def test_bases(tmp_path):
    refused(lambda: jl.io.gguf_base(tmp_path), "neither a GGUF file")
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "mamba"}')
    refused(lambda: jl.io.gguf_base(tmp_path), "mamba", "llama")
    config.write_text('{"model_type": "gemma2", "num_hidden_layers": 3, "num_attention_heads": 4}')
    assert jl.io.gguf_base(tmp_path) == gguf_names.GgufBase("gemma2", 3, 4, 4, tied=True)
    config.write_text('{"model_type": "llama", "num_hidden_layers": "x"}')
    refused(lambda: jl.io.gguf_base(tmp_path), "blocks", "'x'")
