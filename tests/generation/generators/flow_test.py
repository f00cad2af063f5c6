"""The flow around a ridge: untrained it is the ridge, whatever the noise; trained, noise counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.contracts import generator, tiny
from jlora.generation.diffusion import dit
from jlora.generation.generators import flow, prior
from jlora.generation.tokens import canonical, site_tokens

SMALL = dataclasses.replace(flow.SYSTEM.small["config"], components=96)


@pytest.fixture(scope="module")
def at():
    return generator.world(jl.LoRA(2, alpha=3.0, freeze_a=True))


@pytest.fixture(scope="module")
def state(at):
    """The generator with its network as it starts."""

    def untrained(config, begin, steps, y, cond):
        shapes = (y.shape[1], y.shape[2]), (cond.shape[1], cond.shape[2])
        return dit.init(flow.network(config), begin, *shapes), jnp.zeros(3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "_train", untrained)
        return flow.fit(jax.random.key(0), at.conditions, at.groups, at.bank, SMALL)


def test_untrained_it_is_the_sum_of_soups_that_ridge_asks_for(at, state):
    condition = at.queries[0]
    raw = np.asarray(at.conditions, "f8")[::2]  # a task's two adapters have one condition
    scaled = (np.asarray(condition, "f8") - raw.mean(0)) / np.sqrt(
        ((raw - raw.mean(0)) ** 2).mean()
    )
    given = jnp.asarray(scaled, jnp.float32)[None]
    weights = np.asarray(prior.weights(state.arrays.prior, state.kernel, given, False), "f8")
    assert weights.sum() == pytest.approx(1.0, abs=1e-5) and np.ptp(weights) > 0.03
    for key in (1, 2):  # the noise has no part in it
        made = flow.generate(jax.random.key(key), state, condition)
        for path, leaves in made.trainable.items():
            b = np.asarray(at.bank.trainable[path]["b"], "f8")
            want = np.einsum("k,k...->...", weights, (b[::2] + b[1::2]) / 2)
            np.testing.assert_allclose(leaves["b"], want, atol=2e-5)
            np.testing.assert_array_equal(made.frozen[path]["a"], at.bank.frozen[path]["a"][0])


def test_noise_counts_once_the_network_does_not_return_zero(at, state):
    out = state.arrays.params["out"]
    params = {**state.arrays.params, "out": {**out, "kernel": out["kernel"].at[0].add(1.0)}}
    moved = dataclasses.replace(state, arrays=state.arrays._replace(params=params))
    one, two = (flow.generate(jax.random.key(k), moved, at.queries[0]) for k in (1, 2))
    apart = [np.abs(np.asarray(x - y)).max() for x, y in
             zip(*map(jax.tree.leaves, (one.trainable, two.trainable)), strict=True)]  # fmt: skip
    assert min(apart) > 1e-3


def test_tokens_of_trained_factors_keep_every_delta():
    p = tiny.params()
    adapter = tiny.moved(tiny.fresh(jl.LoRA(2, alpha=6.0), p), 3)
    spec = site_tokens.from_adapter(adapter)
    scales = {path: leaves["scale"] for path, leaves in adapter.frozen.items()}
    assert {float(s) for v in scales.values() for s in np.ravel(v)} == {3.0}
    x = flow.tokens(spec, adapter)
    again = adapter.replace(trainable=canonical.unfold(site_tokens.detokenise(spec, x), scales))
    want, got = jl.merge(p, adapter), jl.merge(p, again)
    for name in p:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)
    a, b = (next(iter(again.trainable.values()))[k] for k in "ab")
    assert float(jnp.linalg.norm(a)) == pytest.approx(3 * float(jnp.linalg.norm(b)), rel=1e-4)


def test_what_cannot_be_learned_from_is_an_error(at, monkeypatch):
    key, same = jax.random.key(0), jnp.ones_like(at.conditions)
    with pytest.raises(ValueError, match="all conditions are equal"):
        flow.fit(key, same, at.groups, at.bank, SMALL)
    bad = at.bank.replace(frozen=jax.tree.map(lambda t: t.at[1].add(1.0), at.bank.frozen))
    with pytest.raises(ValueError, match="of adapter 1 differs from adapter 0"):
        flow.fit(key, at.conditions, at.groups, bad, SMALL)
    losses = jnp.asarray([0.5, jnp.nan, jnp.inf])
    monkeypatch.setattr(flow, "_train", lambda *args: ({}, losses))
    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        flow.fit(key, at.conditions, at.groups, at.bank, SMALL)
