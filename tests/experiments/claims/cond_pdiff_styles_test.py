"""Statistics of the style that is asked for: what the networks see, and what becomes of a zero."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import cond_pdiff_styles as lib
from experiments.styles.settings import Settings


def test_networks_that_know_the_style_see_no_difference_of_means(monkeypatch):
    rng, seen = np.random.default_rng(0), []
    theta = np.concatenate([rng.normal(5.0 * k, 1.0 + k, (6, 4)) for k in range(2)])
    theta[:6, 3] = 7.0  # a number that does not vary within a style
    given = SimpleNamespace(
        theta=jnp.asarray(theta, jnp.float32), adapter=np.arange(12), conditions=jnp.ones((12, 3)),
        tasks=jnp.asarray([0] * 6 + [1] * 6),
    )  # fmt: skip
    every: Any = SimpleNamespace(
        given=given, asked=jnp.ones((2, 3)), zoo=SimpleNamespace(template=None),
        world=SimpleNamespace(settings=Settings(), styles=("one", "other")),
    )  # fmt: skip
    monkeypatch.setattr(lib.pdiff, "fit", lambda key, conditions, w, config: seen.append(w))
    monkeypatch.setattr(lib.pdiff, "generate", lambda key, state, c, config: jnp.full(4, 0.5))
    monkeypatch.setattr(lib.pdiff, "unflat", lambda template, theta: theta)
    write = lib.knowing(every, jax.random.key(0))
    w = np.asarray(seen[0])
    for k, rows in enumerate((slice(0, 6), slice(6, 12))):
        np.testing.assert_allclose(w[rows].mean(0), 0, atol=1e-5)
        own = theta[rows]
        size = np.where(own.std(0) > 1e-8, own.std(0), 1.0)
        got: Any = write(jax.random.key(1), k)
        np.testing.assert_allclose(got, own.mean(0) + 0.5 * size, rtol=1e-4)
    assert np.abs(np.asarray(write(jax.random.key(1), 0)) - got).max() > 1
