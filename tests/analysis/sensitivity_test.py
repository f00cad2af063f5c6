"""Spreads of a sweep: by loops, in two limits, and what choosing on test rows would change."""

import numpy as np
import pytest

from jlora.analysis import sensitivity as lib

V, S, E, T = 4, 3, 5, 6
RNG = np.random.default_rng(0)
TEST = RNG.uniform(0.4, 0.9, (V, S, E, T))
VALIDATION = RNG.uniform(0.4, 0.9, (V, S, E, T))


def by_loops(y, x):
    """The definition, one number after the other."""
    rate, best, rates = [], np.zeros((V, T)), np.zeros((V, T))
    for v in range(V):
        score = [sum(y[v, s, e, t] for s in range(S) for t in range(T)) for e in range(E)]
        rate.append(score.index(max(score)))
        for t in range(T):
            mean = [sum(x[v, s, e, t] for s in range(S)) / S for e in range(E)]
            best[v, t], rates[v, t] = mean[rate[-1]], max(mean) - min(mean)
    methods = [max(best[:, t]) - min(best[:, t]) for t in range(T)]
    return rate, best, rates, methods


def check(spreads):
    found, (rate, best, rates, methods) = spreads(VALIDATION, TEST), by_loops(VALIDATION, TEST)
    assert found.rate.tolist() == rate
    np.testing.assert_allclose(found.best, best, rtol=1e-12)
    np.testing.assert_allclose(found.rates, rates, rtol=1e-12)
    np.testing.assert_allclose(found.methods, methods, rtol=1e-12)
    for t in range(T):
        low, high = sorted(rates[:, t])[1:3]
        assert found.over_rates[t] == pytest.approx((low + high) / 2)


def test_spreads_by_loops():
    check(lib.spreads)


def test_choosing_the_rate_on_test_rows_would_be_noticed():
    with pytest.raises(AssertionError):
        check(lambda y, x: lib.spreads(x, x))


def test_a_rate_without_effect_and_methods_that_are_one():
    still = np.broadcast_to(TEST[:, :, :1], TEST.shape)
    assert not lib.spreads(VALIDATION, still).over_rates.any()
    same = lib.spreads(*(np.broadcast_to(x[:1], x.shape) for x in (VALIDATION, TEST)))
    assert not same.methods.any() and (same.over_rates > 0).all()


def test_behind_the_method_that_validation_rows_rank_first():
    found = lib.spreads(VALIDATION, TEST)
    score = VALIDATION.mean((1, 3)).max(1)
    top = int(score.argmax())
    assert not lib.behind(VALIDATION, found, top).any()
    other = (top + 1) % V
    want = found.best[top] - found.best[other]
    np.testing.assert_allclose(lib.behind(VALIDATION, found, other), want)
    assert (want < 0).any(), "the best on validation rows is not the best on every task"


def test_noise_is_the_range_of_runs():
    runs = RNG.uniform(size=(3, 4, 2))
    want = [sorted(max(r[:, t]) - min(r[:, t]) for r in runs)[1] for t in range(2)]
    np.testing.assert_allclose(lib.noise(runs), want)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: lib.spreads(TEST[:, :, :1], TEST[:, :, :1]), "at least 2 rates"),
    (lambda: lib.spreads(TEST[0], TEST[0]), "expected one shape"),
    (lambda: lib.spreads(VALIDATION, TEST[1:]), "expected one shape"),
    (lambda: lib.spreads(VALIDATION, TEST * np.nan), "test: got values that are not finite"),
    (lambda: lib.behind(TEST, lib.spreads(TEST, TEST), V), "method: got 4, expected 0 to 3"),
    (lambda: lib.noise(TEST), "expected .methods, runs, tasks."),
])  # fmt: skip
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
