"""GGUF files of llama.cpp: a tiny one written by the gguf package, and the real SmolLM2."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.io.gguf.base import halves
from jlora.models import decoder
from jlora.models.decoder import gguf_file

gguf = pytest.importorskip("gguf", reason="gguf is an extra")

WIDTH, HEADS, KV, D, FFN = 32, 4, 2, 8, 32
RNG = np.random.default_rng(0)
SHAPES = {
    "attn_q": (HEADS * D, WIDTH), "attn_k": (KV * D, WIDTH), "attn_v": (KV * D, WIDTH),
    "attn_output": (WIDTH, HEADS * D), "ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH),
    "ffn_down": (WIDTH, FFN), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
}  # fmt: skip
TENSORS = {f"blk.0.{n}.weight": RNG.normal(size=s).astype("f4") for n, s in SHAPES.items()}
TENSORS |= {
    "token_embd.weight": RNG.normal(size=(5, WIDTH)).astype("f4"),
    "output_norm.weight": np.ones(WIDTH, "f4"),
}


def write(path, tensors=TENSORS, arch="llama", **fields):
    writer = gguf.GGUFWriter(str(path), arch)
    numbers = {
        "block_count": 1, "context_length": 64, "embedding_length": WIDTH,
        "feed_forward_length": FFN, "attention.head_count": HEADS, "attention.head_count_kv": KV,
        "rope.dimension_count": D,
    }  # fmt: skip
    for name, value in numbers.items():
        writer.add_uint32(f"{arch}.{name}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{arch}.rope.freq_base", 100.0)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ab", "<e>", "c"])
    for name, value in fields.items():
        writer.add_string(name.replace("__", "."), value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_rotated_scores_are_those_of_neighbouring_pairs(tmp_path):
    """llama.cpp rotates neighbours (2i, 2i+1) of the stored rows; by numpy, in float64."""
    config, params = gguf_file.load_gguf(write(tmp_path / "m.gguf"))
    x, positions = RNG.normal(size=(2, WIDTH)), np.array([3, 11])

    def neighbours(y, p):
        z = y.reshape(-1, D // 2, 2)
        angle = p * 100.0 ** (-2 * np.arange(D // 2) / D)
        turned = (z[..., 0] + 1j * z[..., 1]) * np.exp(1j * angle)
        return np.stack([turned.real, turned.imag], -1).reshape(-1, D)

    q = neighbours(TENSORS["blk.0.attn_q.weight"].astype("f8") @ x[1], positions[1])
    k = neighbours(TENSORS["blk.0.attn_k.weight"].astype("f8") @ x[0], positions[0])
    want = np.einsum("hd,hd->h", q, np.repeat(k, HEADS // KV, 0))
    ours = {}
    for i, name, heads in ((1, "query", HEADS), (0, "key", KV)):
        kernel = params["layers"]["attention"][name]["kernel"][0]
        y = (jnp.asarray(x[i], jnp.float32) @ kernel).reshape(1, 1, heads, D)
        angles = decoder.rope.angles(config.rope, D, jnp.asarray([[positions[i]]]))
        ours[name] = np.asarray(decoder.rope.rotate(y, *angles))[0, 0]
    got = np.einsum("hd,hd->h", ours["query"], np.repeat(ours["key"], HEADS // KV, 0))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    kept = TENSORS["blk.0.attn_v.weight"].T  # values are not rotated, and stay as they are
    np.testing.assert_array_equal(params["layers"]["attention"]["value"]["kernel"][0], kept)
    moved = halves(TENSORS["blk.0.attn_q.weight"], HEADS)
    assert not np.array_equal(moved, TENSORS["blk.0.attn_q.weight"])


def test_what_is_not_read_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"no gguf")
    with pytest.raises(ValueError, match="not a GGUF file"):
        gguf_file.load_gguf(path)
    with pytest.raises(ValueError, match=r"general.architecture: got 'falcon'"):
        gguf_file.load_gguf(write(tmp_path / "a.gguf", arch="falcon"))
    with pytest.raises(ValueError, match=r"rope.scaling.type: got 'yarn'"):
        gguf_file.load_gguf(write(tmp_path / "b.gguf", llama__rope__scaling__type="yarn"))
    less = {k: v for k, v in TENSORS.items() if k != "output_norm.weight"}
    with pytest.raises(ValueError, match=r"output_norm.weight: missing"):
        gguf_file.load_gguf(write(tmp_path / "c.gguf", less))
    more = {**TENSORS, "blk.0.extra.weight": np.ones(3, "f4")}
    with pytest.raises(ValueError, match="surplus tensors"):
        gguf_file.load_gguf(write(tmp_path / "d.gguf", more))
    with pytest.raises(ValueError, match=r"tokenizer.ggml.model: missing"):
        gguf_file.gguf_tokenizer(tmp_path / "d.gguf")
    assert gguf_file.chat_template(tmp_path / "d.gguf") == ""


@pytest.mark.long
def test_the_real_smollm2_has_the_loss_that_torch_has():
    """A minute and 93 MB: `pytest -m long tests/models/decoder/gguf_file_test.py`."""
    import torch
    import transformers

    from experiments.data import assets, pinned

    folder = assets.fetch(pinned.ASSETS["smollm2"])
    path = next(folder.rglob("*.gguf"))
    config, params = gguf_file.load_gguf(path)
    text = "The capital of France is Paris. In 1789 the French people rose against their king."
    tokenizer = gguf_file.gguf_tokenizer(path)
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text and tokenizer.encode("123").tokens == ["1", "2", "3"]
    row = jnp.asarray([ids], jnp.int32)
    ours = decoder.loss(
        decoder.forward(params, row, config=config).logits, row, jnp.ones(row.shape)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()
    with torch.no_grad():
        theirs = float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    assert abs(float(ours) - theirs) < 1e-3
