"""Element-wise merges through `merge`: slices, options, keys that belong to adapters and sites."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.merging import METHODS, gather, merge
from jlora.merging.elementwise.dare import dare_ties
from jlora.merging.elementwise.ties import ties
from jlora.merging.engine.inputs import keys_of
from jlora.merging.engine.streamed import Solver

KEY = jax.random.key(5)


def product(adapter, path):
    low = jl.algebra.deltas(adapter)[path]
    return np.asarray(low.u @ low.v)


@pytest.fixture(scope="module")
def pair(adapters):
    """Two adapters with two sites, one of them stacked."""
    return [a.replace(sites=tuple(s for s in a.sites if s[0].path in ("lora", "stacked")))
            for a in adapters[:2]]  # fmt: skip


def test_methods_that_run_slice_by_slice_say_so():
    mapped = {name for name, row in METHODS.items() if row.loop == "map"}
    assert {"ties", "dare_linear", "della", "consensus", "peft_ties_svd"} <= mapped
    assert not {"concat", "truncated", "slerp"} & mapped


def test_every_slice_of_a_stack_is_merged_alone(pair):
    options = {"density": 0.4, "rank": 3, "solver": Solver(power=1, block=3)}
    merged = merge("ties", pair, [0.6, 0.4], options=options)
    bank = gather(pair, [0.6, 0.4]).bank["stacked"]
    for k in range(2):
        low = jax.tree.map(lambda t, k=k: t[:, k], bank)
        one = ties(low, jnp.asarray([0.6, 0.4]), **options)
        np.testing.assert_allclose(product(merged, "stacked")[k], one.u @ one.v, rtol=1e-4,
                                   atol=1e-4)  # fmt: skip
    assert merged.trainable["stacked"]["a"].shape == (2, 8, 3)


def check_keys(pair, fold):
    """The key of a mask is that of (site, slice, adapter), whatever else is merged alongside it."""
    merged = merge("dare_ties", pair, [0.6, 0.4], options={"density": 0.4}, key=KEY)
    bank = gather(pair, [0.6, 0.4]).bank["stacked"]
    keys = fold(KEY, "stacked", 2, 2)
    for k in range(2):
        low = jax.tree.map(lambda t, k=k: t[:, k], bank)
        one = dare_ties(low, jnp.asarray([0.6, 0.4]), keys=keys[k], density=0.4)
        np.testing.assert_allclose(product(merged, "stacked")[k], one.u @ one.v, rtol=1e-3,
                                   atol=1e-3)  # fmt: skip


def test_keys_of_sites_slices_and_adapters(pair):
    check_keys(pair, keys_of)


def test_mutation_one_key_for_all_slices(pair):
    with pytest.raises(AssertionError):
        check_keys(pair, lambda *a: keys_of(*a)[jnp.array([0, 0])])


def test_without_the_other_site_and_in_another_order(pair):
    options = {"density": 0.4}
    one = merge("dare_linear", pair, [0.6, 0.4], options=options, key=KEY)
    less = [a.replace(sites=a.sites[:1]) for a in pair]
    alone = merge("dare_linear", less[::-1], [0.4, 0.6], options=options, key=KEY, ids=[1, 0])
    np.testing.assert_allclose(product(alone, "lora"), product(one, "lora"), rtol=1e-3, atol=1e-4)


def test_errors(pair):
    with pytest.raises(ValueError, match="dare_ties: got no key"):
        merge("dare_ties", pair)
    with pytest.raises(ValueError, match="density: got 2"):
        merge("ties", pair, options={"density": 2.0})
    with pytest.raises(ValueError, match="rank: got 9, expected 1 to 8"):
        merge("ties", pair, options={"rank": 9})
