"""Linked axes: blocks of every axis, values of units on entries, what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.pruning.linked_axes import Axis, along, entries, linked
from tests.pruning.conftest import ATTENTION, FFN, OUTPUTS


def test_heads_and_columns_of_an_encoder(tiny):
    heads, columns = tiny.groups
    assert (heads.units, heads.stack, {a.block for a in heads.axes}) == (4, (2,), {2})
    assert [a.path for a in heads.axes] == [*OUTPUTS, f"{ATTENTION}/out/kernel"]
    assert [a.axis for a in columns.axes] == [-1, -1, -2] and columns.axes[0].block == 1
    assert hash(heads) != hash(columns)


def test_grouped_queries_have_larger_blocks():
    params = {"q": jnp.ones((3, 8)), "k": jnp.ones((3, 4)), "o": jnp.ones((8, 3))}
    group = linked("heads", params, 2, ["q", "k"], ["o"])
    assert group.axes == (Axis("q", -1, 4), Axis("k", -1, 2), Axis("o", -2, 4))
    np.testing.assert_array_equal(entries(jnp.asarray([5, 7]), group.axes[1]), [5, 5, 7, 7])
    assert along(jnp.ones((2, 4)), -2, 3).shape == (2, 4, 1)


def test_values_of_units_meet_a_leaf_on_their_axis():
    axis = Axis("o", -2, 3)
    values = along(entries(jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), axis), axis.axis, 3)
    leaf = np.ones((2, 6, 4))
    np.testing.assert_array_equal((leaf * values)[1, :, 0], [3, 3, 3, 4, 4, 4])
    with pytest.raises(AssertionError):  # a block of another size mixes units
        other = along(entries(jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), Axis("o", -2, 1)), -2, 3)
        assert other.shape == values.shape


def test_refusals(tiny):
    p, out = tiny.params, [f"{ATTENTION}/out/kernel"]
    with pytest.raises(ValueError, match="heads: units: got 1, expected at least 2"):
        linked("heads", p, 1, out, out)
    with pytest.raises(ValueError, match=r"heads: got outputs \[\]"):
        linked("heads", p, 2, [], out)
    with pytest.raises(ValueError, match="heads: nothing: got none, expected one of"):
        linked("heads", p, 2, ["nothing"], out)
    with pytest.raises(ValueError, match=r"got shape \(2, 8, 6\), expected 4 equal blocks on axis"):
        linked("heads", p, 4, [f"{FFN}/up/kernel"], out)
    with pytest.raises(ValueError, match="expected every path once"):
        linked("heads", p, 4, out, out)
    with pytest.raises(ValueError, match=r"got shape \(3, 8\), expected the stack"):
        linked("heads", {"a": jnp.ones((3, 8)), "b": jnp.ones((2, 8, 8))}, 4, ["a"], ["b"])
