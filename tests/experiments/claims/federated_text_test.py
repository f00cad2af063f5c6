"""Texts of clients: nothing is lost or doubled, labels are skewed; the control keeps spectra."""

import jax.numpy as jnp
import numpy as np

from experiments.claims import federated_rounds as rounds
from experiments.claims import federated_text


def test_rows_are_spread_once_and_with_skew():
    rows = np.stack([np.arange(400), np.arange(400) % 2, np.arange(400) // 100], axis=1)
    pool, counts = federated_text.split(rows, 6, 0)
    assert counts.sum() == 400 and counts.min() > 0
    held = np.concatenate([p[:n] for p, n in zip(pool, counts, strict=True)])
    assert (held[np.argsort(held[:, 0])] == rows).all()
    kinds = np.stack([np.bincount(p[:n, 2] * 2 + p[:n, 1], minlength=8)
                      for p, n in zip(pool, counts, strict=True)])  # fmt: skip
    assert (kinds.max(axis=0) > 15).all()  # of 50: an even split gives each client 8
    again, _ = federated_text.split(rows, 6, 1)
    assert pool.shape != again.shape or (pool != again).any()


def test_the_control_keeps_the_spectrum_of_the_change_and_nothing_else():
    rng = np.random.default_rng(0)
    names = ("query", "key", "value", "out")
    old = {"layers": {"attention": {n: {"kernel": jnp.asarray(rng.normal(size=(1, 8, 8)), "f4")}
                                    for n in names}, "other": jnp.ones(3)}}  # fmt: skip
    u, v = rng.normal(size=(8, 2)), rng.normal(size=(2, 8))
    new = {"layers": {**old["layers"], "attention": {
        n: {"kernel": old["layers"]["attention"][n]["kernel"] + jnp.asarray((u @ v)[None], "f4")}
        for n in names}}}  # fmt: skip
    lost = federated_text.turned(old, new, 0)
    assert (lost["layers"]["other"] == 1).all()
    expected = np.linalg.svd(u @ v, compute_uv=False)[:2]
    for n, path in zip(names, rounds.SITES, strict=True):
        assert n in path
        change = lost["layers"]["attention"][n]["kernel"] - old["layers"]["attention"][n]["kernel"]
        change = np.asarray(change)[0]
        np.testing.assert_allclose(np.linalg.svd(change, compute_uv=False)[:2], expected, rtol=1e-3)
        cosine = np.sum(change * (u @ v)) / np.linalg.norm(change) / np.linalg.norm(u @ v)
        assert abs(cosine) < 0.6
