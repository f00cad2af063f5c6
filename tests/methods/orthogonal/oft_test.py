"""OFT: rotations from numpy's inverse, and what a rotation keeps."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.methods.orthogonal.oft import OFT


def rotations(q, n, terms):
    out = []
    for row in q:
        k = np.zeros((n, n))
        k[np.triu_indices(n, 1)] = row
        k, eye = k - k.T, np.eye(n)
        if terms is None:
            out.append((eye + k) @ np.linalg.inv(eye - k))
        else:
            powers = [np.linalg.matrix_power(k, j) for j in range(terms)]
            out.append(powers[0] + 2 * sum(powers[1:-1]) + powers[-1])
    return out


def blocks(parts, d):
    full, n = np.zeros((d, d)), len(parts[0])
    for i in range(d // n):
        full[i * n : i * n + n, i * n : i * n + n] = parts[i % len(parts)]
    return full


def check_value(bench, method):
    adapter = bench.noisy(method)
    r = rotations(bench.numbers(adapter)["q"], method.block, method.terms)
    bench.agree(adapter, blocks(r, 12) @ bench.w)


@pytest.mark.parametrize("terms", [None, 5, 3])
@pytest.mark.parametrize("share", [False, True])
def test_value(bench, terms, share):
    check_value(bench, OFT(block=4, terms=terms, share=share))


def test_exact_rotation_keeps_norms_and_angles(bench):
    merged = bench.merged(bench.noisy(OFT(block=6, terms=None)))
    assert np.abs(merged - bench.w).max() > 0.1
    np.testing.assert_allclose(merged.T @ merged, bench.w.T @ bench.w, atol=1e-4)


def test_limit_the_series_converges_to_the_inverse(bench):
    adapter = bench.noisy(OFT(block=4, terms=None), size=0.1)
    p = {"q": jnp.asarray(adapter.trainable["w"]["q"])}
    exact = OFT(block=4, terms=None).rotations(p)
    errors = [
        float(jnp.abs(OFT(block=4, terms=t).rotations(p) - exact).max()) for t in (2, 4, 8, 16)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 < errors[0]


def test_refusals(bench):
    with pytest.raises(ValueError, match="w: OFT block expected to divide d_in = 12, got 5"):
        bench.fresh(OFT(block=5))
    with pytest.raises(ValueError, match=r"OFT\.terms: expected at least 2, got 1"):
        OFT(terms=1)


def test_mutation_the_transposed_rotation_is_seen(bench, monkeypatch):
    good = OFT.rotations
    monkeypatch.setattr(OFT, "rotations", lambda self, p: good(self, p).mT)
    with pytest.raises(AssertionError):
        check_value(bench, OFT(block=4))
