"""One site of a random map, its gradients in float64, and an optimizer run over it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SCALE = 0.7


class Site(NamedTuple):
    """Factors and the gradient of the full weight, float64."""

    a: np.ndarray  # [6, 2]
    b: np.ndarray  # [2, 5]
    g: np.ndarray  # [6, 5], the same at every step: the loss is linear in the delta

    def gradients(self, a, b):
        """Of A and B."""
        return SCALE * self.g @ b.T, SCALE * a.T @ self.g

    def run(self, optimizer, steps, start=None):
        """[(update of A, update of B)] of an optimizer, step by step, and where the factors are."""
        a, b = start or (self.a, self.b)
        tree = {"w": {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}}
        frozen, state, found = {"w": {"scale": jnp.float32(SCALE)}}, optimizer.init(tree), []
        update = jax.jit(optimizer.update)
        for _ in range(steps):
            at = (np.asarray(tree["w"][n], "f8") for n in "ab")
            g = dict(zip("ab", self.gradients(*at), strict=True))
            grads = {"w": {n: jnp.asarray(t, jnp.float32) for n, t in g.items()}}
            updates, state = update(grads, state, tree, frozen=frozen)
            tree = jax.tree.map(jnp.add, tree, updates)
            found.append(tuple(np.asarray(updates["w"][n], "f8") for n in "ab"))
        return found, tuple(np.asarray(tree["w"][n], "f8") for n in "ab")


@pytest.fixture
def site():
    rng = np.random.default_rng(0)
    return Site(rng.normal(size=(6, 2)), rng.normal(size=(2, 5)), rng.normal(size=(6, 5)))


@pytest.fixture(autouse=True)
def loose():
    """optax counts steps in int32 and divides by powers of them."""
    with jax.numpy_dtype_promotion("standard"):
        yield
