"""The shipped base C is the one of its card, and the card is true."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.clip import base_c, card
from experiments.clip.data import Pairs


@pytest.fixture(scope="module")
def base():
    return base_c.load()  # compares the sha256 of every file


def said(base, params):
    """What some parameters say of the card's examples."""
    none = np.zeros(0, np.int32)
    texts = Pairs((), base.names, base.labels, none, none, none, none, none, base.embeddings)
    pixels = card.shown(base_c.FOLDER / card.EXAMPLES, base.config.vit.side)
    return card.read(base.config, params, texts, pixels, base.card["held_out"])


def test_it_is_small_and_its_files_are_those_of_the_card(base):
    files = {p.name: p for p in base_c.FOLDER.iterdir()}
    assert sum(p.stat().st_size for p in files.values()) <= 6_000_000
    assert set(base.card["files"]) == files.keys() - {card.NAME, "README.md"}
    assert files["README.md"].read_text(encoding="utf-8") == card.page(base.card)


def test_it_says_of_the_examples_what_the_card_says(base):
    right = [name for name, _ in base.card["examples"]]
    got = said(base, base.params)
    expected = [name for _, name in base.card["examples"]]
    same = np.mean([a == b for a, b in zip(got, expected, strict=True)])
    assert same >= 0.95, "another machine may turn a tie"
    hits = sum(a == b for a, b in zip(got, right, strict=True))
    vit = {
        **base.params["vit"],
        "layers": jax.tree.map(jnp.zeros_like, base.params["vit"]["layers"]),
    }
    worse = said(base, {**base.params, "vit": vit})
    lost = sum(a == b for a, b in zip(worse, right, strict=True))
    assert hits >= 5 and lost < hits / 2, "mutation: without its blocks"
    assert set(right) <= set(base.card["held_out"])


def test_names_never_seen_are_recognised_ten_times_as_often_as_by_chance(base):
    for style, found in base.card["quality"]["names"].items():
        model, chance = found["base C"], found["chance"]
        assert model[0] >= 10 * chance[0], style
        assert model[0] > max(found[k][0] for k in found if k.startswith("ridge")), style
        assert found["base C, texts exchanged"][0] <= 4 * chance[0], style
