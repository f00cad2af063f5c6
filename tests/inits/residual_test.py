"""Adapters that carry their start: the two ways out, files of PEFT, a start from an adapter."""

import dataclasses

import jax
import numpy as np
import pytest

import jlora as jl
from jlora.methods.low_rank.pissa import PiSSA


def moved(adapter):
    """As after training."""
    rng = np.random.default_rng(3)
    new = jax.tree.map(
        lambda t: t + np.asarray(0.2 * rng.normal(size=t.shape), "f4"), adapter.trainable
    )
    return adapter.replace(trainable=new)


@pytest.fixture(scope="module")
def trained(world):
    return moved(jl.inits.pissa(world.fn, world.params, world.batches, methods=world.methods))


def check_ways_out(world, adapter, tolerance=1e-5):
    """LoRA of rank 2r on the base, and LoRA of rank r on what is left, are the same function."""
    want = jl.merge(world.params, adapter)
    left = {**world.params, **dict(jl.inits.residual_leaves(world.params, adapter))}
    short = jl.inits.without_start(adapter)
    for got in (jl.merge(world.params, jl.inits.fold(adapter)), jl.merge(left, short)):
        for path, w in want.items():
            np.testing.assert_allclose(got[path], w, atol=tolerance)
    assert np.abs(np.asarray(left["head"]) - np.asarray(world.params["head"])).max() > 0.1


def test_the_two_ways_out(world, trained):
    check_ways_out(world, trained)


def test_mutation_a_sign_that_is_lost_is_seen(world, trained):
    p = trained.frozen["head"]
    other = {**trained.frozen, "head": {**p, "b0": -p["b0"]}}
    want = jl.merge(world.params, trained)["head"]
    got = jl.merge(world.params, jl.inits.fold(trained.replace(frozen=other)))["head"]
    assert np.abs(np.asarray(got) - np.asarray(want)).max() > 0.1


def test_pissa_and_rslora(world, trained):
    as_pissa = tuple((site, PiSSA(rank=2, alpha=6.0)) for site, _ in trained.sites)
    check_ways_out(world, trained.replace(sites=as_pissa))
    methods = {"head": jl.LoRA(rank=2, alpha=6.0, rslora=True)}
    adapter = moved(jl.inits.pissa(world.fn, world.params, world.batches, methods=methods))
    check_ways_out(world, adapter)
    (_, method), = jl.inits.fold(adapter).sites  # fmt: skip
    assert method == jl.LoRA(rank=4) and method.rslora
    assert dataclasses.replace(method).alpha == pytest.approx(6 * 2**0.5)


def test_the_folded_adapter_is_one_that_peft_reads(world, trained, tmp_path):
    names = jl.io.NameMap({"layers": "layers.{i}", "head": "head"})
    jl.io.save_peft(tmp_path, jl.inits.fold(trained), names)
    sites = jl.sites(world.fn, world.params, world.batches[0])
    back = jl.io.load_peft(tmp_path, names, sites)
    for path, w in jl.merge(world.params, trained).items():
        np.testing.assert_allclose(jl.merge(world.params, back)[path], w, atol=1e-5)


def test_a_start_from_another_adapter(world, trained):
    source = jl.inits.fold(trained)
    assert jl.inits.from_adapter(source) is source
    adapter = jl.inits.from_adapter(source, residual=True)
    world.unchanged(adapter)
    for path, t in source.trainable.items():
        np.testing.assert_array_equal(adapter.trainable[path]["a"], t["a"])
    check_ways_out(world, moved(adapter))


def test_other_methods_leave_what_they_subtracted(world):
    """A square matrix in the middle: the base without it, and the method inside."""
    methods = {"layers": jl.LoRA(rank=2, alpha=6.0)}
    adapter = moved(jl.inits.nlora(world.fn, world.params, world.batches, methods=methods))
    left = dict(jl.inits.residual_leaves(world.params, adapter))
    got = jl.merge({**world.params, **left}, jl.inits.without_start(adapter))["layers"]
    np.testing.assert_allclose(got, jl.merge(world.params, adapter)["layers"], atol=1e-4)


def test_refusals(world, trained):
    plain = jl.inits.fold(trained)
    for way in (jl.inits.fold, jl.inits.without_start):
        with pytest.raises(ValueError, match=r"head: got the method LoRA.*expected PiSSA"):
            way(plain)
    with pytest.raises(ValueError, match=r"got the method LoRA.*expected PiSSA"):
        next(jl.inits.residual_leaves(world.params, plain))
    with pytest.raises(ValueError, match="fold: got a bank of 2 adapters"):
        jl.inits.fold(jl.stack([trained, trained]))
