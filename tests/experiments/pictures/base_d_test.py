"""The shipped base D is the one of its card, and the card is true."""

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.pictures import base_d, card, classifier
from experiments.pictures.sources import STYLES
from experiments.styles import pictures as style_pictures
from experiments.workdir import StageError

COLUMNS = 12  # of the sheet


@pytest.fixture(scope="module")
def base():
    return base_d.load()  # compares the sha256 of every file


def test_its_files_are_those_of_the_card(base):
    files = {p.name: p for p in base_d.FOLDER.iterdir()}
    assert files["model.safetensors"].stat().st_size <= 6_000_000
    assert set(base.card["files"]) == files.keys() - {card.NAME, "README.md"}
    assert files["README.md"].read_text(encoding="utf-8") == card.page(base.card)
    assert set(card.LICENCES) == set(STYLES)
    with pytest.raises(StageError, match="sha256 of the weights"):
        base_d.load(weights="0" * 64)


def test_samples_are_in_their_styles(base):
    quality = base.card["quality"]["accuracy"]
    real = quality["real held-out pictures"]
    for kind in ("samples of seen names", "samples of held-out names"):
        assert quality[kind]["style"] >= 0.8
        assert quality[kind]["label"] < real["label"]  # and that it is no better is said


def test_its_classifier_tells_the_styles_of_the_sheet_apart(base):
    """Real pictures and samples of the sheet, three rows per style; mutation: weights of zero."""
    sheet = np.asarray(Image.open(base_d.FOLDER / card.SHEET).convert("RGB"))
    styles, known = base.names["styles"], style_pictures.known(base)
    height, width = sheet.shape[0] // (3 * len(styles)), sheet.shape[1] // COLUMNS
    cells = sheet.reshape(3 * len(styles), height, COLUMNS, width, 3).swapaxes(1, 2)
    pixels = cells[:, :, :: height // 32, :: width // 32].reshape(-1, 32, 32, 3)
    expected = np.repeat(np.arange(len(styles)) + 1, 3 * COLUMNS)

    def right(params):
        return np.mean(classifier.apply(known, params, pixels)[1] == expected)

    assert right(base.classifier) >= 0.75
    assert right(jax.tree.map(np.zeros_like, base.classifier)) <= 0.3
