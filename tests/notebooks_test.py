"""The notebooks run from top to bottom as they are, with the pinned model and without it."""

import os
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest

from jlora.io import safetensors_file

FOLDER = Path(__file__).parents[1] / "notebooks"
QUICKSTART, FINETUNE = FOLDER / "quickstart.ipynb", FOLDER / "finetune_tpu.ipynb"
CHECKS = """
import json
assert sum(losses[-5:]) < 0.5 * sum(losses[:5]), losses
assert scores["train"] > 0.9, scores
assert difference < (1e-5 if dtype == "float32" else 0.1), difference
far = jnp.abs(mixed - merged[:4]).max(-1)
assert (far[1::2] < 1e-4).all() and (far[::2] > 1e-2).all(), far
print(json.dumps({"pretrained": pretrained, "scores": scores}))
"""


def run(folder, more=CHECKS, path=QUICKSTART, **env):
    """Executes a copy in `folder`, `more` as a last cell; returns what that cell printed."""
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not kept"
    notebook.cells.append(nbformat.v4.new_code_cell(more))
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env={**os.environ, "XLA_FLAGS": "", **env})
    return "".join(out.get("text", "") for out in notebook.cells[-1].outputs)


@pytest.fixture
def offline(tmp_path) -> dict[str, str]:
    """No internet: models from a folder that is not there. They are small and run once, so that
    nearly all of their time went into optimising; the pinned model runs as it does for users."""
    return {
        "JLORA_ASSETS": str(tmp_path / "none"),
        "JLORA_CACHE": str(tmp_path / "cache"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def check_export(folder):
    tensors, _ = safetensors_file.read(folder / "quickstart_adapter" / "adapter_model.safetensors")
    keys = [k for k in tensors if k.endswith("query.lora_B.weight")]
    assert keys and all(np.any(tensors[k]) for k in keys)


def test_quickstart_without_internet(tmp_path, offline):
    """The small random encoder."""
    said = run(tmp_path, **offline)
    assert '"pretrained": false' in said, said
    check_export(tmp_path)


def test_finetune_without_internet(tmp_path, offline):
    """A small random Llama: its loss falls, and what it learned is a file for llama.cpp."""
    more = "print(report['before']['loss'] - report['after']['loss'], losses[0] - losses[-1])"
    fell = [float(x) for x in run(tmp_path, more, FINETUNE, **offline).split()]
    assert min(fell) > 0, fell
    assert (tmp_path / "finetune_run" / "adapter.gguf").read_bytes()[:4] == b"GGUF"


def test_quickstart(tmp_path):
    """The pinned MiniLM, which also understands words it was not trained on."""
    said = run(tmp_path, CHECKS + "assert scores['test'] > 0.8, scores")
    assert '"pretrained": true' in said, said
    check_export(tmp_path)


def test_a_cell_that_fails_is_noticed(tmp_path, monkeypatch):
    """The mutation check, on the first cells."""
    notebook = nbformat.read(QUICKSTART, as_version=4)
    del notebook.cells[3:]
    monkeypatch.setattr(nbformat, "read", lambda *_, **__: notebook)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="never heard of it"):
        run(tmp_path, "assert backend in ('none',), 'never heard of it'")
