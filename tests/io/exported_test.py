"""A function of an adapter goes through `jax.export` and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jlora as jl
from jlora.io import exported


def fn(p, x):
    return jnp.tanh(x @ p["u"]) @ p["v"]


PARAMS, X = {"u": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}, jnp.ones((2, 3))


def made(methods):
    a = jl.init(jax.random.key(0), fn, PARAMS, X, methods=methods)
    return a.replace(trainable=jax.tree.map(lambda t: t + 0.1, a.trainable))


def test_a_function_of_an_adapter_is_exported():
    pytest.importorskip("flatbuffers")  # jax.export's own need
    adapter = made({"u": jl.LoRA(2), "v": jl.Decomposed(jl.LoHa(2))})
    written = export.export(jax.jit(jl.lift(fn)))(PARAMS, adapter, X).serialize()
    back = export.deserialize(written)
    got = back.call(PARAMS, adapter, X)
    np.testing.assert_allclose(got, fn(jl.merge(PARAMS, adapter), X), rtol=1e-5)


def test_sites_and_methods_come_back():
    adapter = made({"u": jl.LoRA(2), "v": jl.Decomposed(jl.LoHa(2))})
    leaves, tree = jax.tree.flatten(adapter)
    _, static = tree.node_data()  # what jax.export hands over
    assert exported.from_bytes(exported.to_bytes(static)) == static
    assert jax.tree.unflatten(tree, leaves).sites == static[0]


def test_methods_of_others_are_refused():
    class Mine(jl.LoRA):
        pass

    adapter = made({"u": Mine(2)})
    data = exported.to_bytes((adapter.sites,))
    with pytest.raises(jl.io.FormatError, match="Mine"):
        exported.from_bytes(data)
