"""Texts for transfer: prompts hold the seeds alone, batches resume, what is no text is left out."""

import json

import pytest

from experiments.claims import transfer_texts as lib

SEEDS = ("a good film  about\nsnow", "bad acting all along", "fine", "i liked it", "never again")


def test_a_prompt_shows_every_seed_on_a_line_in_an_order_of_its_own():
    shown = [lib.prompt(SEEDS, n).split("\n") for n in range(4)]
    assert len({tuple(s) for s in shown}) > 1
    for lines in shown:
        assert lines[-1] == "-"
        assert sorted(lines[:-1]) == sorted(f"- {lib.plain(s)}" for s in SEEDS)
    long = lib.prompt((" ".join(["word"] * 99),), 0)
    assert long.count("word") == lib.WORDS


def test_what_is_no_text_of_its_own_is_left_out():
    lines = ["bad acting all along", "a good film about snow", "a new one here", "", "two words",
             "a new one here", "another new one"]  # fmt: skip
    assert lib.usable(lines, SEEDS) == ["a new one here", "another new one"]


@pytest.fixture
def batches(monkeypatch):
    """Numbers of the batches that are written; each holds 6 usable texts of 8."""
    calls = []

    def batch_of(seeds, batch, key):
        calls.append(batch)
        return ["", *(f"text number {batch} {n}" for n in range(6)), "fine"]

    monkeypatch.setattr(lib, "batch_of", batch_of)
    monkeypatch.setattr(lib, "BATCH", 8)
    return calls


def test_batches_are_written_once_and_only_as_many_as_needed(batches, tmp_path):
    texts = lib.written("t", SEEDS, 8, tmp_path).texts
    assert texts == tuple(f"text number {n // 6} {n % 6}" for n in range(8))
    assert batches == [0, 1]
    assert lib.written("t", SEEDS, 12, tmp_path).texts[:8] == texts and batches == [0, 1]
    path = sorted((tmp_path / "written_texts").iterdir())[1]
    assert json.loads(path.read_text())["texts"][1] == "text number 1 0"
    path.unlink()  # a run that was killed
    assert lib.written("t", SEEDS, 8, tmp_path).texts == texts and batches == [0, 1, 1]
    lib.written("t", SEEDS[::-1], 6, tmp_path)  # other seeds: other texts
    assert batches == [0, 1, 1, 0]


def test_too_few_texts_are_an_error(batches, tmp_path, monkeypatch):
    monkeypatch.setattr(lib, "usable", lambda lines, seeds: lines[:1])
    with pytest.raises(ValueError, match="t: got 1 usable texts of 16, expected 8"):
        lib.written("t", SEEDS, 8, tmp_path)


def test_random_texts_are_words_of_the_vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\nsnow\n##ing\nab\nfilm\n1999\né\n")
    words = lib.vocabulary(tmp_path)
    assert words == ("snow", "film")
    texts = lib.random_texts(words, 30, 0)
    assert {w for t in texts for w in t.split()} == set(words)
    assert all(4 <= len(t.split()) <= 20 for t in texts)
    assert texts == lib.random_texts(words, 30, 0) != lib.random_texts(words, 30, 1)
