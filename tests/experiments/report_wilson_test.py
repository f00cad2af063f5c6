"""Wilson's interval against scipy's, and what it says where a bootstrap says nothing."""

import pytest
from scipy.stats import binomtest

from experiments.report import wilson


@pytest.mark.parametrize(("right", "texts"), [(7, 16), (0, 5), (5, 5), (84, 100), (1, 1)])
def test_bounds_are_those_of_scipy(right, texts):
    got = wilson.interval(right / texts, texts)
    want = binomtest(right, texts).proportion_ci(0.95, method="wilson")
    assert got == pytest.approx((want.low, want.high), abs=1e-12)


def test_sixteen_texts_say_nothing_of_44_percent_and_a_hundred_do_of_84():
    assert wilson.against(wilson.interval(7 / 16, 16), 0.5) == "not distinguishable from"
    assert wilson.against(wilson.interval(0.84, 100), 0.5) == "above"
    assert wilson.against(wilson.interval(0.2, 100), 0.5) == "below"


@pytest.mark.parametrize(("accuracy", "texts"), [(1.1, 5), (float("nan"), 5), (0.5, 0)])
def test_what_is_no_accuracy_is_refused(accuracy, texts):
    with pytest.raises(ValueError, match=r": got .*, expected "):
        wilson.interval(accuracy, texts)
