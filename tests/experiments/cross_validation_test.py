"""Which method to use: folds without leaks, the verdict by hand, what is said of it."""

import numpy as np
import pytest

from experiments.stages import cross_validation as lib


@pytest.mark.parametrize(("zero", "one"), [(16, 16), (2, 9), (3, 3)])
def test_folds_keep_every_class_and_hide_every_example_once(zero, one):
    label = np.repeat([0, 1], [zero, one])
    parts = lib.folds(label, seed=3)
    assert len(parts) == min(4, zero)
    hidden = np.concatenate([part.hidden for part in parts])
    assert sorted(hidden.tolist()) == list(range(zero + one))
    for part in parts:
        assert not set(part.kept) & set(part.hidden)
        assert len(part.kept) + len(part.hidden) == zero + one
        assert set(label[part.kept]) == {0, 1}
        shares = np.bincount(label[part.hidden], minlength=2)
        assert abs(shares[0] - zero / len(parts)) < 1 and abs(shares[1] - one / len(parts)) < 1
    other = lib.folds(label, seed=4)
    assert any(p.hidden.tolist() != q.hidden.tolist() for p, q in zip(parts, other, strict=True))


def test_a_single_example_of_a_class_leaves_nothing_to_validate_on():
    assert lib.folds(np.asarray([0, 1, 1, 1]), seed=0) == []
    assert lib.sentence(None).startswith("nothing is recommended: with a single example")
    assert lib.as_json(None) == {}


def scores(**means):
    """{method: 20 figures of that mean}; all wrong where nothing is said."""
    every = {"generated": 0, "nearest_mean": 0, "logreg": 0, "ridge": 0} | means
    return {key: (np.arange(20) < right).astype(float) for key, right in every.items()}


def test_a_rival_that_is_better_is_named_in_the_first_words():
    found = lib.verdict(scores(generated=8, logreg=18, nearest_mean=15))
    assert (found.best, found.over, found.n) == ("logreg", "generated", 20)
    assert found.lead["mean"] == pytest.approx(0.5) and found.lead["low"] > 0
    assert found.figures["generated"]["low"] < 0.4 < found.figures["generated"]["high"]
    said = lib.sentence(found)
    assert said.startswith("the generated adapter is NOT the best here: use logistic regression")
    assert "90.0 % against 40.0 %, +50.0 points" in said and "on the 20 examples" in said
    assert "too few to be sure" not in said


def test_a_lead_of_one_example_is_not_sold_as_certain():
    found = lib.verdict(scores(generated=14, nearest_mean=15))
    assert found.best == "nearest_mean" and found.lead["low"] <= 0
    assert "NOT the best" in lib.sentence(found)
    assert lib.sentence(found).endswith("too few to be sure")


def test_the_generated_adapter_is_used_where_nothing_is_better():
    found = lib.verdict(scores(generated=15, ridge=15, logreg=11))
    assert (found.best, found.over) == ("generated", "ridge")  # a tie is no reason to leave it
    said = lib.sentence(found)
    assert said.startswith("nothing is better than the generated adapter, and kernel ridge, ")
    assert "NOT" not in said and lib.as_json(found)["lead"]["mean"] == 0
    ahead = lib.verdict(scores(generated=16, ridge=15, logreg=11))
    assert lib.sentence(ahead).startswith("use the generated adapter: before kernel ridge")
