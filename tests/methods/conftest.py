"""One small matmul on which every method is tried: y = x @ w, x [3, 5, 12], w [12, 8]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.core.init import initialise


class Bench:
    """`fresh` and `noisy` adapters of a method, its forward pass, its merged weight, as float64."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.params = {"w": jnp.asarray(rng.normal(size=(12, 8)), jnp.float32)}
        self.x = jnp.asarray(rng.normal(size=(3, 5, 12)), jnp.float32)
        self.site = jl.Site("w", (12, 8), "io", np.dtype("float32"), ("dot",))

    @staticmethod
    def model(params, x):
        return x @ params["w"]

    def fresh(self, method, seed=0):
        site = jl.Site("w", (12, 8), "io", np.dtype("float32"), ("dot",), group="*0")
        return initialise(jax.random.key(seed), [(site, method)], self.params)

    def noisy(self, method, size=0.3, seed=0):
        """A fresh adapter with noise on everything that is trained."""
        rng, adapter = np.random.default_rng(seed + 1), self.fresh(method, seed)
        move = lambda t: t + jnp.asarray(size * rng.normal(size=t.shape), t.dtype)  # noqa: E731
        return adapter.replace(trainable=jax.tree.map(move, adapter.trainable))

    def forward(self, adapter, x=None, **kw):
        x = self.x if x is None else x
        tuned = jax.jit(jl.lift(self.model, **kw))
        return tuned(self.params, adapter, x)

    def merged(self, adapter):
        return np.asarray(jl.merge(self.params, adapter)["w"], np.float64)

    def numbers(self, adapter):
        """All arrays of the adapter by name, float64."""
        both = {**adapter.frozen["w"], **adapter.trainable["w"]}
        for path in adapter.frozen.keys() - {"w"}:
            both |= adapter.frozen[path]
        return {k: np.asarray(v, np.float64) for k, v in both.items()}

    def agree(self, adapter, w, tol=2e-5):
        """Both the definition and the fast path give x @ w."""
        np.testing.assert_allclose(self.merged(adapter), w, atol=tol)
        want = np.asarray(self.x, np.float64) @ w
        np.testing.assert_allclose(self.forward(adapter), want, atol=4 * tol, rtol=1e-4)

    @property
    def w(self):
        return np.asarray(self.params["w"], np.float64)


@pytest.fixture(scope="module")
def bench():
    return Bench()
