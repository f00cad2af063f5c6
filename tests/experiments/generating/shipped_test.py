"""The generator that ships is the one of its card, and works on MiniLM."""

import json
from pathlib import Path

import pytest

from experiments.data.assets import fetch
from experiments.data.pinned import ASSETS
from experiments.generating import card, checkpoint
from jlora.cli.main import main

BIRDS = Path(__file__).parents[1] / "fixtures" / "user_task" / "birds_or_mushrooms"


def test_its_files_are_those_of_the_card_and_small():
    folder = checkpoint.SHIPPED
    about = json.loads((folder / checkpoint.CARD).read_text())
    found = checkpoint.read(folder)  # compares the sha256 of every file
    assert (folder / checkpoint.WEIGHTS).stat().st_size < 6_000_000
    assert (folder / checkpoint.PAGE).read_text() == card.page(about)
    assert set(about["files"]) == {checkpoint.WEIGHTS, checkpoint.CONFIG}
    assert card.levels(about["accuracy"]) == about["levels"]
    reading, known = found.fitted
    assert found.config.base == "minilm" and reading.mean.shape == (3, 1536)
    assert known is not None and len(known.rows) == about["remembered"] >= 40
    assert not set(about["seen"]) & set(about["accuracy"])


@pytest.mark.slow
def test_an_adapter_of_ones_own_task_on_the_real_base(tmp_path, capsys):
    fetch(ASSETS["minilm"], progress=False)
    out = tmp_path / "adapter"
    assert main(["generate", f"--task_dir={BIRDS}", f"--out={out}"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("birds_or_mushrooms: ")
    about = json.loads((out / "generated.json").read_text())
    assert about["base"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert about["examples_per_class"] == [8, 8]
    assert about["test"]["generated"]["low"] > 0.5, "above chance, with its interval"
    config = json.loads((out / "peft" / "adapter_config.json").read_text())
    assert "encoder.layer.5.output.dense" in config["target_modules"]
    assert pytest.approx(1.0, abs=1e-5) == config["lora_alpha"] / config["r"]
