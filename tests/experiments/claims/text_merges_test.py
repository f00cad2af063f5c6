"""The control of merging claims keeps the singular values and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.claims import text_merges


def test_random_directions_keep_spectra_and_lose_the_directions():
    params, rng = {"w": jnp.ones((12, 9))}, np.random.default_rng(0)
    fresh = jl.init(jax.random.key(0), lambda p, x: x @ p["w"], params, jnp.ones((2, 12)),
                    methods={"w": jl.LoRA(rank=3, alpha=6.0)})  # fmt: skip
    a, b = rng.normal(size=(12, 3)), rng.normal(size=(3, 9))
    arrays = {"w": {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}}
    adapter = fresh.replace(trainable=arrays)
    adapters = {("t", seed, 3): adapter for seed in (0, 1)}
    shared = text_merges.cells.Bench((), None, None, adapters, adapter, {}, {})
    lost = text_merges.random_directions(shared, 1)
    assert lost["t", 0, 3] is adapter
    one = lost["t", 1, 3]
    dense = np.asarray(one.trainable["w"]["a"], "f8") @ np.asarray(one.trainable["w"]["b"], "f8")
    dense = dense * float(one.frozen["w"]["scale"])
    expected = np.linalg.svd(2.0 * a @ b, compute_uv=False)[:3]
    np.testing.assert_allclose(np.linalg.svd(dense, compute_uv=False)[:3], expected, rtol=1e-4)
    cosine = np.sum(dense * (a @ b)) / np.linalg.norm(dense) / np.linalg.norm(a @ b)
    assert abs(cosine) < 0.5
