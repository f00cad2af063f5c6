"""Adapters of every type with a factored delta, on sites of one shape; one bank of three."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jlora as jl
from jlora.merging.engine.law_world import World

D_IN, D_OUT = 8, 12
TYPES = {  # site -> the methods of three adapters there; all of rank 4 or less
    "lora": (jl.LoRA(4, 8.0), jl.LoRA(2), jl.LoRA(3, 1.0)),
    "rslora": (jl.LoRA(4, rslora=True),) * 3,
    "loha": (jl.LoHa(2),) * 3,
    "lokr": (jl.LoKr(rank=1, factor=4),) * 3,
    "mixed": (jl.LoRA(3), jl.LoHa(2), jl.LoKr(rank=1, factor=4)),
    "stacked": (jl.LoRA(4),) * 3,
}


def model(p, x):
    for name in TYPES:
        if name != "stacked":
            x = (x @ p[name])[:, :D_IN]
    return jax.lax.scan(lambda c, w: ((c @ w)[:, :D_IN], None), x, p["stacked"])[0]


@pytest.fixture(scope="session")
def params():
    rng = np.random.default_rng(0)
    shapes = {name: (2, D_IN, D_OUT) if name == "stacked" else (D_IN, D_OUT) for name in TYPES}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


@pytest.fixture(scope="session")
def adapters(params):
    """Three adapters, with other methods and ranks, and nothing at its initial value."""
    rng, x = np.random.default_rng(1), jnp.ones((2, D_IN))

    def one(k):
        chosen = {f"^{name}$": methods[k] for name, methods in TYPES.items()}
        a = jl.init(jax.random.key(k), model, params, x, methods=chosen)
        new = jax.tree.map(lambda t: jnp.asarray(rng.normal(size=t.shape), t.dtype), a.trainable)
        return a.replace(trainable=new)

    return [one(k) for k in range(3)]


@pytest.fixture(scope="session")
def world(adapters):
    """What the laws are measured on."""
    weights = jnp.asarray([0.5, 0.3, 0.2], jnp.float32)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("d", "s"))
    bank = jl.merging.gather(adapters, weights).bank
    return World(bank, weights, jax.random.key(7), mesh)
