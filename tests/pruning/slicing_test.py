"""Slicing: arrays by numpy, the small model is the masked one, adapters go along."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.pruning import slicing
from jlora.pruning.linked_axes import linked
from tests.pruning.conftest import FFN, full_model, small_model


@pytest.fixture(scope="module")
def small(tiny):
    return (
        slicing.sliced(tiny.params, tiny.groups, tiny.kept),
        slicing.sliced_adapter(tiny.adapter, tiny.groups, tiny.kept),
    )


@pytest.fixture(scope="module")
def run(tiny):
    """(params, adapter) -> outputs of the full model."""
    lifted = jax.jit(jl.lift(full_model))
    return lambda p, a: lifted(p, a, tiny.hidden, tiny.mask)


def test_arrays_by_numpy(tiny, small):
    params, adapter = small
    for layer in range(2):
        heads = np.flatnonzero(tiny.kept["heads"][layer])
        own = np.concatenate([np.arange(2 * h, 2 * h + 2) for h in heads])
        columns = np.flatnonzero(tiny.kept["columns"][layer])
        old, new = tiny.params["layers"], params["layers"]
        for name in ("query", "key", "value"):
            for leaf in ("kernel", "bias"):
                np.testing.assert_array_equal(
                    new["attention"][name][leaf][layer],
                    np.asarray(old["attention"][name][leaf][layer])[..., own],
                )
        out = np.asarray(old["attention"]["out"]["kernel"][layer])[own]
        np.testing.assert_array_equal(new["attention"]["out"]["kernel"][layer], out)
        down = np.asarray(old["ffn"]["down"]["kernel"][layer])[columns]
        np.testing.assert_array_equal(new["ffn"]["down"]["kernel"][layer], down)
        a, b = (tiny.adapter.trainable[f"{FFN}/{n}/kernel"] for n in ("down", "up"))
        np.testing.assert_array_equal(
            adapter.trainable[f"{FFN}/down/kernel"]["a"][layer], np.asarray(a["a"][layer])[columns]
        )
        np.testing.assert_array_equal(
            adapter.trainable[f"{FFN}/up/kernel"]["b"][layer], np.asarray(b["b"][layer])[:, columns]
        )
    assert {s.path: s.shape for s, _ in adapter.sites}[f"{FFN}/up/kernel"] == (2, 8, 3)
    assert new["attention"]["norm"]["scale"] is old["attention"]["norm"]["scale"]


def test_the_small_model_is_the_masked_one(tiny, small, run):
    params = slicing.masked(tiny.params, tiny.groups, tiny.kept)
    adapter = slicing.masked_adapter(tiny.adapter, tiny.groups, tiny.kept)
    want = run(params, adapter)
    got = jax.jit(jl.lift(small_model))(*small, tiny.hidden, tiny.mask)
    np.testing.assert_allclose(got, want, atol=2e-5)
    count = lambda p: sum(x.size for x in jax.tree.leaves(p))  # noqa: E731
    assert count(small[0]) < 0.65 * count(tiny.params)
    assert np.abs(want - run(tiny.params, tiny.adapter)).max() > 0.1


def test_mutation_the_delta_of_a_removed_unit_must_go(tiny, small, run):
    params = slicing.masked(tiny.params, tiny.groups, tiny.kept)
    got = jax.jit(jl.lift(small_model))(*small, tiny.hidden, tiny.mask)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(got, run(params, tiny.adapter), atol=2e-5)


def test_all_kept_is_the_model_itself(tiny):
    every = {k: jnp.ones_like(m) for k, m in tiny.kept.items()}
    for change in (slicing.masked, slicing.sliced):
        jax.tree.map(np.testing.assert_array_equal, change(tiny.params, tiny.groups, every),
                     tiny.params)  # fmt: skip
    same = slicing.sliced_adapter(tiny.adapter, tiny.groups, every)
    assert same.sites == tiny.adapter.sites


def test_masks_may_be_traced(tiny):
    eager = slicing.masked(tiny.params, tiny.groups, tiny.kept)
    jitted = jax.jit(lambda kept: slicing.masked(tiny.params, tiny.groups, kept))(tiny.kept)
    jax.tree.map(np.testing.assert_array_equal, jitted, eager)


def test_refusals(tiny):
    p = tiny.params
    heads = tiny.kept["heads"]
    with pytest.raises(ValueError, match=r"kept: got \['heads'\], expected \['columns', 'heads'\]"):
        slicing.masked(p, tiny.groups, {"heads": heads})
    with pytest.raises(ValueError, match=r"kept: heads: got bool\(2, 3\), expected bool\(2, 4\)"):
        slicing.masked(p, tiny.groups, tiny.kept | {"heads": heads[:, :3]})
    odd = tiny.kept | {"heads": heads.at[0, 1].set(True)}
    with pytest.raises(ValueError, match=r"heads: got \[2, 3\] units per layer, expected one"):
        slicing.sliced(p, tiny.groups, odd)
    packed = {"up": jl.quantize(jnp.ones((4, 4)), block=2), "down": jnp.ones((4, 4))}
    group = linked("columns", packed, 4, ["up"], ["down"])
    with pytest.raises(ValueError, match="up: got Quantized, expected an array; quantise after"):
        slicing.masked(packed, (group,), {"columns": jnp.ones(4, bool)})
    (site, method), *rest = tiny.adapter.sites
    plain = tiny.adapter.replace(trainable={**tiny.adapter.trainable, site.path: {}})
    with pytest.raises(ValueError, match="expected a method with a and b, LoRA"):
        slicing.masked_adapter(plain, tiny.groups, tiny.kept)
    flipped = dataclasses.replace(site, kinds="soi")
    with pytest.raises(ValueError, match=r"got the layout 'soi', expected \[\*stack, in, out\]"):
        slicing.masked_adapter(tiny.adapter.replace(sites=((flipped, method), *rest)), tiny.groups,
                               tiny.kept)  # fmt: skip
