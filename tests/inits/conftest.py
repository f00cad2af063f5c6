"""A function of a stack and a transposed head, with data, for all initialisations."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl


class World:
    """Weights, batches, and what a plain loop in numpy sees of them."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.params = {
            "layers": jnp.asarray(rng.normal(size=(2, 8, 8)) / 2, jnp.float32),
            "head": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32),
        }
        scales = np.array([4, 3, 2, 1, 0.5, 0.3, 0.2, 0.1])
        self.batches = [
            jnp.asarray(rng.normal(size=(n, 3, 8)) * scales, jnp.float32) for n in (4, 2, 3)
        ]
        self.methods = {"layers|head": jl.LoRA(rank=2, alpha=6.0)}

    @staticmethod
    def fn(params, x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])
        return h @ params["head"].T

    @classmethod
    def loss(cls, params, x):
        return jnp.sum(jnp.sin(cls.fn(params, x)))

    @property
    def weights(self):
        """{path: [*stack, d_in, d_out]} in float64."""
        return {
            "layers": np.asarray(self.params["layers"], "f8"),
            "head": np.asarray(self.params["head"], "f8").T,
        }

    def inputs(self):
        """{path: all input rows [*stack, n, d_in]} in float64."""
        h = np.concatenate([np.asarray(b, "f8").reshape(-1, 8) for b in self.batches])
        seen = []
        for w in self.weights["layers"]:
            seen.append(h)
            h = np.tanh(h @ w)
        return {"layers": np.stack(seen), "head": h}

    def gradients(self):
        """{path: G [*stack, d_in, d_out]} in float64, summed over the batches."""
        total = {"layers": 0, "head": 0}
        for batch in self.batches:
            g = jax.grad(self.loss)(self.params, batch)
            total["layers"] += np.asarray(g["layers"], "f8")
            total["head"] += np.asarray(g["head"], "f8").T
        return total

    @staticmethod
    def arrays(adapter, path):
        """All arrays of a site in float64."""
        both = {**adapter.frozen[path], **adapter.trainable[path]}
        return {k: np.asarray(v, "f8") for k, v in both.items()}

    def unchanged(self, adapter):
        """The merged weights are the weights, bit for bit, and the start is not nothing."""
        for path, w in jl.merge(self.params, adapter).items():
            np.testing.assert_array_equal(w, self.params[path])


@pytest.fixture(scope="session")
def world():
    return World()


class Compilations(logging.Handler):
    """The names of the programs that XLA compiled while it listens to JAX's log."""

    def __init__(self):
        super().__init__()
        self.names = []

    def emit(self, record):
        said = record.getMessage()
        if said.startswith("Finished XLA compilation of"):
            self.names.append(said.split()[4])


@pytest.fixture
def compilations():
    """Programs that are compiled during a test."""
    listener, log = Compilations(), logging.getLogger("jax")
    log.addHandler(listener)
    try:
        with jax.log_compiles():
            yield listener.names
    finally:
        log.removeHandler(listener)
