"""Own components of rows: by numpy, what a row does not see, and how many operations there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.serving import diagonal as module
from jlora.serving.components import BASE, NOBODY
from jlora.serving.diagonal import inward, outward

ROWS, TOKENS, D_IN, D_OUT = 3, 2, 5, 6
OWNER = [*[0] * 8, *[2] * 4, *[NOBODY] * 4]  # row 1 has none
RNG = np.random.default_rng(0)
U, V = (RNG.normal(size=(len(OWNER), d)).astype("f4") for d in (D_IN, D_OUT))
X = RNG.normal(size=(ROWS, TOKENS, D_IN)).astype("f4")


def one(x, row, u, v, owner):
    return outward(inward(x, u, owner, row), v, owner, row)


run = jax.jit(jax.vmap(one, (0, 0, None, None, None)))


def outputs(numbers=(0, BASE, 2), u=U, owner=OWNER):
    ints = [jnp.asarray(t, jnp.int32) for t in (numbers, owner)]
    return run(jnp.asarray(X), ints[0], jnp.asarray(u), jnp.asarray(V), ints[1])


def by_numpy(numbers=(0, BASE, 2)):
    masks = [np.asarray(OWNER) == n for n in numbers]
    return [np.float64(x) @ U[m].T @ V[m] for x, m in zip(X, masks, strict=True)]


def test_value_by_numpy_in_any_order_of_rows():
    np.testing.assert_allclose(outputs(), by_numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(outputs()[1], 0.0)
    turned = (2, 0, BASE)
    np.testing.assert_allclose(outputs(turned), by_numpy(turned), rtol=1e-5, atol=1e-5)


def test_one_row_alone_is_the_masked_product():
    args = (jnp.asarray(t) for t in (U, V, np.asarray(OWNER, np.int32)))
    got = one(jnp.asarray(X[2]), jnp.int32(2), *args)
    np.testing.assert_allclose(got, by_numpy()[2], rtol=1e-5, atol=1e-5)


def test_what_is_infinite_in_a_row_reaches_no_other():
    u = U.copy()
    u[:8] = np.inf
    u[12:] = np.nan  # nobody's
    np.testing.assert_array_equal(outputs(u=u)[1:], outputs()[1:])
    assert not np.isfinite(outputs(u=u)[0]).any()


def test_factors_of_each_row_are_multiplied_row_by_row():
    us = jnp.stack([jnp.asarray(U)] * ROWS)
    numbers, owner = (jnp.asarray(t, jnp.int32) for t in ((0, BASE, 2), OWNER))
    each = jax.vmap(one, (0, 0, 0, None, None))
    np.testing.assert_allclose(
        each(jnp.asarray(X), numbers, us, jnp.asarray(V), owner), outputs(), rtol=1e-5, atol=1e-5
    )


def test_operations_do_not_grow_with_the_rows():
    def products(rows, fn):
        shapes = [(rows, 1, 64), (rows,), (256, 64), (256, 32), (256,)]
        kinds = ["f4", "i4", "f4", "f4", "i4"]
        args = [jax.ShapeDtypeStruct(s, k) for s, k in zip(shapes, kinds, strict=True)]
        jaxpr = jax.make_jaxpr(jax.vmap(fn, (0, 0, None, None, None)))(*args)
        dots = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
        return sum(dot_size(e) for e in dots)

    def shared(x, row, u, v, owner):
        return jnp.where((owner == row)[None], x @ u.T, jnp.zeros((), x.dtype)) @ v

    assert products(32, one) == products(8, one) == 256 * (64 + 32)
    assert products(32, shared) == 32 * 256 * (64 + 32)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def dot_size(eqn):
    """Multiply-adds: numbers of the result, times those that are summed for each."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    summed = np.prod([eqn.invars[0].aval.shape[k] for k in contracted], dtype=int)
    return int(eqn.outvars[0].aval.size * summed)


def break_places(patch):
    right = module._places
    patch.setattr(module, "_places", lambda o, r: ((right(o, r)[0] + 1) % ROWS, right(o, r)[1]))


def break_block(patch):
    patch.setattr(module, "BLOCK", 16)  # of more than one owner


@pytest.mark.parametrize("broken", [break_places, break_block])
def test_mutation_blocks_of_another_row(monkeypatch, broken):
    broken(monkeypatch)
    run.clear_cache()
    with pytest.raises(AssertionError):
        test_value_by_numpy_in_any_order_of_rows()
    run.clear_cache()
