"""Starts per task: the function of the base, other data another start, dead columns stay dead."""

import dataclasses
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.claims import text_methods, text_starts

D = 64
NAMES = ("query", "key", "value", "out")


def linear(params, hidden, mask, heads):
    held = params["layers"]["attention"]

    def layer(h, w):
        return h + jnp.tanh(h @ w["query"] + h @ w["key"]) @ w["value"] + h @ w["out"], None

    h, _ = jax.lax.scan(layer, hidden, {s: held[s]["kernel"] for s in NAMES})
    return jnp.einsum("ncd,nd->nc", heads, jnp.where(mask[..., None], h, 0.0).sum(1))


@pytest.fixture(scope="module")
def found():
    """Two tasks of 128 rows."""
    rng = np.random.default_rng(0)
    f32 = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    base = {"layers": {"attention": {s: {"kernel": 0.2 * f32(1, D, D)} for s in NAMES}}}
    index = jnp.arange(256, dtype=jnp.int32).reshape(2, 128)
    label = jnp.asarray(rng.integers(0, 2, (2, 128)), jnp.int32)
    mask = jnp.arange(4)[None] < jnp.asarray(rng.integers(2, 5, 256))[:, None]
    rows = index[:, :80], label[:, :80]
    return text_methods.Tasks(linear, base, ("a", "b"), index, label, f32(2, 2, D),
                              f32(256, 4, D), mask, rows, rows)  # fmt: skip


@pytest.mark.parametrize("name", ["pissa", "eva", "lora_ga", "nlora"])
def test_a_start_is_the_base_and_that_of_its_task(found, name):
    method = importlib.import_module(f"experiments.claims.{name}").CLAIM.run.args[0]
    starts = [method.start(text_starts.data(found, task, 0), 0)[1] for task in range(2)]
    for adapter in starts:
        for path, d in jl.delta(found.base, adapter).items():
            np.testing.assert_allclose(d, 0, atol=1e-6, err_msg=path)
    one, other = (np.asarray(a.trainable[text_methods.SITES[0]]["a"]) for a in starts)
    assert np.array_equal(one, other) == (name in ("pissa", "nlora"))


def test_a_claim_runs_from_end_to_end(found, monkeypatch):
    """Two steps of one rate, on the two tasks."""
    recipe = dataclasses.replace(text_starts.RECIPE, steps=2)
    monkeypatch.setattr(text_starts, "RECIPE", recipe)
    monkeypatch.setattr(text_methods, "tasks", lambda workdir: found)
    tuned = text_methods.Tuned(1e-2, False, {})
    monkeypatch.setattr(text_starts, "tune", lambda *args: tuned)
    monkeypatch.setattr(text_methods, "tune", lambda *args: tuned)
    plain = text_methods.Result((0.5, 0.5), (0.7, 0.7), 12)
    monkeypatch.setattr(text_methods, "run", lambda *args: plain)
    from experiments.claims import loftq

    got = loftq.CLAIM.run(0, Path("nowhere"))
    assert got.units == ("a", "b") and got.system != got.control
    assert np.isfinite([*got.system, *got.baseline, *got.control]).all()
    text_starts._starts.cache_clear()


def test_padding_keeps_the_function_and_the_scale(found):
    data = text_starts.data(found, 0, 0)
    args = (data.fn, data.params, data.inputs)
    small = jl.inits.eva(*args, methods=text_starts.methods(2), rho=2.0, mask=text_starts.tokens)
    whole = text_starts.padded(small, data, 4)
    for site, _ in whole.sites:
        assert whole.trainable[site.path]["a"].shape == (1, D, 4)
    for site, _ in small.sites:
        a = small.trainable[site.path]["a"]
        np.testing.assert_array_equal(whole.trainable[site.path]["a"][..., : a.shape[-1]], a)
        np.testing.assert_array_equal(
            whole.frozen[site.path]["scale"], small.frozen[site.path]["scale"]
        )
