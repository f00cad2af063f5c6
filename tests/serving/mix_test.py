"""The form of a batch: by hand counts, equal logits of both, few sizes."""

import numpy as np
import pytest

from jlora.serving import mix as module
from jlora.serving.components import BASE
from jlora.serving.mix import plan, size

RANKS = {"a": 4, "b": 64, "c": 5}


def check_choice():
    rest = [None] * 7
    found = plan(["b", None, "a", "c", *rest], RANKS)  # 96 (11 + 8) or 96 (1 + 8): 76 has 3 zeros
    assert found.own and found.names == ("b", "a", "c")
    assert found.numbers.tolist() == [0, BASE, 1, 2, *[BASE] * 7]
    found = plan(["b"] * 8, RANKS)  # 64 (8 + 8) or 512 (1 + 8)
    assert not found.own and found.names == ("b",) and found.numbers.tolist() == [0] * 8


def test_choice_by_counts():
    check_choice()


def test_mutation_own_components_whatever_they_cost(monkeypatch):
    monkeypatch.setattr(module, "GAIN", 0.0)
    with pytest.raises(AssertionError):
        check_choice()


def test_an_adapter_of_two_rows_has_two_copies_where_rows_have_their_own(monkeypatch):
    found = plan(["b", "a", "b", "c"], RANKS)  # 96 (4 + 8) or 144 -> 192 (1 + 8)
    assert not found.own and found.names == ("a", "b", "c")
    monkeypatch.setattr(module, "GAIN", 0.5)
    found = plan(["b", "a", "b", "c"], RANKS)
    assert found.own and found.names == ("b", "a", "b", "c")
    assert found.numbers.tolist() == [0, 1, 2, 3]


def test_one_row_and_rows_of_the_base_take_the_shared_form():
    assert plan(["c"], RANKS)[0::2] == (("c",), False)
    found = plan([None, None], RANKS)
    assert not found.own and not found.names and found.numbers.tolist() == [BASE, BASE]


def test_sizes_are_few_and_at_most_half_as_many_again():
    sizes = sorted({size(count) for count in range(1, 2049)})
    assert sizes == [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(n % module.LEAST == 0 for n in sizes)  # devices divide them
    assert all(size(count) <= 1.5 * count for count in range(33, 2049))
    assert size(3, least=2) == 4 and size(5, least=2) == 6


def test_whole_blocks():
    assert [module.blocks(rank) for rank in (0, 1, 4, 5)] == [0, 4, 4, 8]
    assert np.all([module.blocks(r) % module.BLOCK == 0 for r in range(70)])
