"""The shipped base L is the one of its card, and the card is true."""

import numpy as np
import pytest

from experiments.pretraining import base_l, card
from jlora.models import decoder


@pytest.fixture(scope="module")
def base():
    return base_l.load()  # compares the sha256 of every file


def test_it_is_small_and_its_files_are_those_of_the_card(base):
    weights = base_l.FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 6_000_000
    assert set(base.card["files"]) == {
        p.name for p in base_l.FOLDER.iterdir() if p.name not in (card.NAME, "README.md")
    }
    assert (base_l.FOLDER / "README.md").read_text() == card.page(base.card)


def test_its_loss_is_that_of_the_card_and_below_that_of_simpler_models(base):
    snippet, settings = base.card["snippet"], base.card["settings"]
    ids = np.asarray(snippet["ids"], np.uint16)
    assert base.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == snippet["text"]
    assert base.tokenizer.encode(snippet["text"]).ids[:200] == ids[:200].tolist()
    start = np.array([0])
    loss = card.row_losses(base.params, ids, start, base.config, settings["context"]).mean()
    assert loss == pytest.approx(snippet["loss"], abs=1e-3)
    assert loss < snippet["ngram_loss"] < snippet["unigram_loss"]
    fresh = {**base.params, "layers": zeros(base.params["layers"])}
    worse = card.row_losses(fresh, ids, start, base.config, settings["context"]).mean()
    assert worse > loss + 0.1, "mutation: without its layers"


def zeros(tree):
    return {k: zeros(v) if isinstance(v, dict) else np.zeros_like(v) for k, v in tree.items()}


def test_it_speaks_in_words(base):
    said = card.continuations(base.config, base.params, base.tokenizer)
    assert len(said) == len(base.card["words"]) == len(card.PROMPTS)
    assert all(text.startswith(p) for text, p in zip(said, card.PROMPTS, strict=True))
    known = set(base.card["snippet"]["text"].lower().split()) | {"the", "of", "and", "to", "a"}
    words = " ".join(said).lower().split()
    assert len(words) > 40 and len(set(words) & known) > 5


def test_the_loader_of_the_library_reads_it_too(base):
    config, half = decoder.load(base_l.FOLDER)
    assert config == base.config and half["norm"]["scale"].dtype == np.float16
