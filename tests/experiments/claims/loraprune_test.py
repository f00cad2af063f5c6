"""LoRAPrune on a decoder: what is masked, and that the sliced model is the masked one."""

import dataclasses

import jax
import numpy as np
import pytest

import jlora as jl
from experiments.claims import decoder_domains as lib
from experiments.claims import loraprune as file
from jlora.models import decoder
from jlora.pruning import slicing


@pytest.fixture
def world(domains, monkeypatch):
    """A decoder of two heads of the keys, and a short schedule."""
    config = dataclasses.replace(domains.config, heads=4, kv_heads=2, head_width=4)
    params = decoder.init(jax.random.key(0), config)
    changed = domains._replace(config=config, params=params)
    monkeypatch.setattr(lib, "world", lambda: changed)
    for name, value in {"STEPS": 20, "RANK": 2}.items():
        monkeypatch.setattr(file, name, value)
    file.trained.cache_clear()
    yield changed
    file.trained.cache_clear()


def test_half_of_the_units_go_and_each_way_takes_others(world):
    masks = {how: file.trained(how, 1e-2, 0)[1] for how in (file.OURS, file.WEIGHTS, file.CHANCE)}
    for kept in masks.values():
        assert [(kept[n].shape[1], *kept[n].sum(1)) for n in ("heads", "columns")] == [
            (2, 1, 1), (16, 8, 8)]  # fmt: skip
    ours, others = masks[file.OURS], (masks[file.WEIGHTS], masks[file.CHANCE])
    assert all((ours["columns"] != kept["columns"]).any() for kept in others)
    norm = np.square(np.asarray(world.params["layers"]["ffn"]["down"]["kernel"])).sum(-1)
    norm += sum(np.square(np.asarray(world.params["layers"]["ffn"][n]["kernel"])).sum(-2)
                for n in ("gate", "up"))  # fmt: skip
    want = norm.argsort(1).argsort(1) >= 8
    np.testing.assert_array_equal(masks[file.WEIGHTS]["columns"], want)


def test_the_sliced_model_says_what_the_masked_one_says(world):
    adapter, kept = file.trained(file.OURS, 1e-2, 0)
    groups = file.units()
    base = slicing.masked(world.params, groups, kept)
    whole = jl.merge(base, slicing.masked_adapter(adapter, groups, kept))
    want = np.asarray(file._loss(world.config)(whole, world.test.ids))
    got = file.measured(file.OURS, 1e-2, 0, world.test)
    np.testing.assert_allclose(got, want, atol=1e-4)
    untrained = lib.measured(None, world.test)[0]
    assert np.abs(got - untrained).max() > 1e-2
    assert file.small(world.config).heads == 2 and file.small(world.config).ffn == 8
