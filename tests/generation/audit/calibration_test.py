"""Calibration measures against loops over examples, scikit-learn, and cases that are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from jlora.generation.audit import calibration as lib

measure = functools.partial(jax.jit, static_argnames=("bins", "threshold"))(lib.measure)


def draws(n=57, classes=3, seed=0):
    """Probabilities in steps of 1/20, so that edges and ties are met, and labels."""
    rng = np.random.default_rng(seed)
    parts = rng.multinomial(20, rng.dirichlet(np.ones(classes)), size=n)
    return (parts / 20).astype("f4"), rng.integers(0, classes, n).astype("i4")


def gap(rows):
    return abs(sum(h - q for q, h in rows) / len(rows)) if rows else 0.0


def equal_width(rows, bins):
    edges = [float(np.float32(k / bins)) for k in range(bins + 1)]
    return [[(q, h) for q, h in rows if (edges[m] < q or m == 0) and q <= edges[m + 1]]
            for m in range(bins)]  # fmt: skip


def equal_count(rows, bins):
    rows, size = sorted(rows), max(1, len(rows) // bins)
    return [rows[m * size : (m + 1) * size if m < bins - 1 else None] for m in range(bins)]


def by_loops(p, y, bins, threshold):
    """The docstring's equations, example by example."""
    n, classes = p.shape
    p = p.astype("f8")
    top = [(p[i].max(), float(int(p[i].argmax()) == y[i])) for i in range(n)]
    of = [[(p[i, c], float(y[i] == c)) for i in range(n)] for c in range(classes)]
    kept = [[(q, h) for q, h in rows if q >= threshold] for rows in of]
    return lib.Calibration(
        sum(len(b) / n * gap(b) for b in equal_width(top, bins)),
        np.mean([sum(len(b) / n * gap(b) for b in equal_width(rows, bins)) for rows in of]),
        max(gap(b) for b in equal_width(top, bins)),
        np.mean([[gap(b) for b in equal_count(rows, bins)] for rows in of]),
        np.mean([[gap(b) for b in equal_count(rows, bins)] for rows in kept]),
        np.mean([sum((p[i, c] - (y[i] == c)) ** 2 for c in range(classes)) for i in range(n)]),
    )


@pytest.mark.parametrize(("n", "bins", "threshold"), [(57, 10, 0.1), (60, 7, 0.3), (12, 12, 0.6)])
def test_all_six_are_those_of_loops_over_the_examples(n, bins, threshold):
    p, y = draws(n)
    found = measure(jnp.asarray(p), jnp.asarray(y), bins=bins, threshold=threshold)
    want = by_loops(p, y, bins, threshold)
    np.testing.assert_allclose(found, want, atol=2e-6)
    assert len({round(float(v), 4) for v in found}) == 6  # all different: none stands for another


@pytest.fixture(scope="module")
def found():
    p, y = draws()
    return p, y, np.asarray(measure(jnp.asarray(p), jnp.asarray(y)))


def test_the_order_of_the_examples_does_not_matter(found):
    p, y, want = found
    order = np.random.default_rng(1).permutation(len(y))
    assert len(np.unique(p[:, 0])) < len(p)  # there are ties
    np.testing.assert_allclose(measure(jnp.asarray(p[order]), jnp.asarray(y[order])), want,
                               atol=1e-6)  # fmt: skip


def test_mutations_would_be_seen(found):
    p, y, want = found
    turned = measure(jnp.asarray(p), jnp.asarray(np.roll(y, 1)))
    assert (np.abs(np.asarray(turned) - want) > 1e-3).all()  # labels of other examples
    for lower in (True, False):  # an edge that belongs to the wrong bin
        edges = np.arange(1, 10) / 10
        at = np.searchsorted(edges.astype("f4"), p.max(1), side="left" if lower else "right")
        hit = (p.argmax(1) == y) - p.max(1).astype("f8")
        ece = sum(abs(hit[at == m].sum()) for m in range(10)) / len(y)
        assert (abs(ece - want[0]) < 1e-6) == lower


def test_brier_is_scikit_learns(found):
    p, y, want = found
    both = [brier_score_loss(y == c, p[:, c]) for c in range(3)]
    assert want[5] == pytest.approx(sum(both), abs=1e-6)
    uniform = jnp.full((8, 4), 0.25)
    assert lib.brier(uniform, jnp.zeros(8, jnp.int32)) == pytest.approx(1 - 1 / 4)


def test_labels_drawn_from_the_probabilities_are_calibrated_and_certain_errors_are_not():
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.ones(2), size=20_000).astype("f4")
    y = (rng.random(20_000) > p[:, 0]).astype("i4")
    good = measure(jnp.asarray(p), jnp.asarray(y))
    assert max(float(v) for v in good[:5]) < 0.05 and good.ece < good.mce
    certain = jnp.tile(jnp.asarray([[1.0, 0.0]]), (20, 1))
    bad = measure(certain, jnp.ones(20, jnp.int32))
    # TACE: of class 1 nothing is kept, of class 0 all examples are, in ten bins with a gap of 1
    np.testing.assert_allclose(bad, [1, 1, 1, 1, 0.5, 2], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"probabilities": jnp.asarray([[0.5, 0.6]])}, r"probabilities\[0\]: got"),
        ({"probabilities": jnp.asarray([[jnp.nan, 1.0]])}, r"probabilities\[0\]: got"),
        ({"labels": jnp.asarray([2])}, r"labels\[0\]: got 2, expected 0 to 1"),
        ({"labels": jnp.asarray([0, 1])}, r"expected \(n, C >= 2\), \(n,\)"),
        ({"bins": 2}, "bins: got 2, expected 1 to n = 1"),
        ({"bins": 0}, "bins: got 0, expected at least 1"),
        ({"threshold": 1.0}, "threshold: got 1.0"),
    ],
)
def test_what_has_no_meaning_is_an_error(changes, said):
    given = {"probabilities": jnp.asarray([[0.5, 0.5]]), "labels": jnp.asarray([0]), "bins": 1}
    with pytest.raises(ValueError, match=said):
        lib.measure(**{**given, **changes})
