"""Lookups with ids outside the table: what merging gives, in value and gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora as jl

ROWS = 7
OUTSIDE = np.array([[0, 9, 1], [-9, -1, 6]], np.int32)  # 9 and -9 are, -1 is the last row
MODES = {
    "clip": lambda w, i: jnp.take(w, i, axis=0, mode="clip"),
    "fill with a number": lambda w, i: jnp.take(w, i, axis=0, mode="fill", fill_value=2.0),
    "promised": lambda w, i: w[i],
    "of columns": lambda w, i: jnp.take(w.T, i, axis=1, mode="clip").transpose(1, 2, 0),
    "under vmap": lambda w, i: jax.vmap(lambda i: w[i])(i.ravel()),
}


def w(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("method", [jl.LoRA(2), jl.DoRA(2)], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(law, mode, method):
    def fn(p, ids):
        return MODES[mode](p["w"], ids)

    law(fn, {"w": w(ROWS, 6)}, {"w": method}, OUTSIDE, structural=False)


TABLES = {  # of two tables [2, ROWS, 6] or in another order, ids [2, 3]; kinds
    "rows of each": (lambda w, i: jax.vmap(lambda w, i: w[i])(w, i), "sio"),
    "one row of each": (lambda w, i: jax.vmap(lambda w, i: w[i])(w, i[:, 0]), "sio"),
    "taken": (lambda w, i: jax.vmap(lambda w, i: jnp.take(w, i, axis=0, mode="clip"))(w, i), "sio"),
    "filled": (
        lambda w, i: jax.vmap(lambda w, i: jnp.take(w, i, 0, mode="fill", fill_value=2.0))(w, i),
        "sio",
    ),
    "another axis": (
        lambda w, i: jax.vmap(lambda w, i: w[i], in_axes=(1, 0))(jnp.swapaxes(w, 0, 1), i),
        "sio",
    ),
    "the same rows of all": (lambda w, i: jax.vmap(lambda w: w[i])(w), "oio"),
}


@pytest.mark.parametrize("method", [jl.LoRA(2), jl.DoRA(2)], ids=["LoRA", "DoRA"])
def test_tables_under_vmap(law, method):
    def fn(p, ids):
        return {name: use(p[name], ids) for name, (use, _) in TABLES.items()}

    params = {name: w(2, ROWS, 6) for name in TABLES}
    a = law(fn, params, {"": method}, OUTSIDE, structural=False)
    assert {s.path: s.kinds for s, _ in a.sites} == {name: k for name, (_, k) in TABLES.items()}


@pytest.mark.parametrize("method", [jl.LoRA(2), jl.DoRA(2)], ids=["LoRA", "DoRA"])
def test_padding_that_is_masked_later(law, method):
    """`jnp.take` and `nn.Embed` give NaN rows; masked, they must not reach any gradient."""

    def fn(p, ids):
        rows = jnp.take(p["w"], ids, axis=0) @ p["v"]
        return jnp.where(((ids >= -ROWS) & (ids < ROWS))[..., None], rows, 0.0)

    params = {"w": w(ROWS, 6), "v": w(6, 4)}
    law(fn, params, {"w": method}, OUTSIDE, structural=False)


def test_padding_gives_nan_as_the_merged_table_does():
    def fn(p, ids):
        return jnp.take(p["w"], ids, axis=0)

    params = {"w": jnp.asarray(w(ROWS, 6), jnp.float32)}
    a = jl.init(jax.random.key(0), fn, params, OUTSIDE, methods={"w": jl.LoRA(2)})
    got = jl.lift(fn)(params, a, OUTSIDE)
    np.testing.assert_array_equal(
        np.isnan(got[..., 0]), [[False, True, False], [True, False, False]]
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint32])
def test_ids_of_every_integer_dtype(dtype):
    """Bounds are compared in the dtype of the ids, which may not hold the table's size."""

    def fn(p, ids):
        return lax.gather(
            p["w"],
            ids[:, None],
            lax.GatherDimensionNumbers((1,), (0,), (0,)),
            (1, 2),
            mode=lax.GatherScatterMode.CLIP,
        )

    params = {"w": jnp.asarray(w(300, 2), jnp.float32)}
    ids = np.array([0, 3, 120], dtype)
    a = jl.init(jax.random.key(0), fn, params, ids, methods={"w": jl.LoRA(2)})
    a = a.replace(trainable=jax.tree.map(lambda t: t + 0.3, a.trainable))
    expected = np.asarray(jl.merge(params, a)["w"])[[0, 3, 120]]
    np.testing.assert_allclose(jl.lift(fn)(params, a, ids), expected, rtol=1e-5, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Common(jl.Method):
    """delta = (u * t) v with one t for all slices."""

    def shared(self, key, sites):
        return {"t": jnp.ones(2, sites[0].param_dtype)}, {}

    def init(self, key, site, context):
        u = jax.random.normal(key, (site.d_in, 2), site.param_dtype)
        return {"u": u, "v": jnp.ones((2, site.d_out), site.param_dtype)}, {}

    def factors(self, p):
        return p["u"] * p["t"][None], p["v"]


def test_slices_outside_a_stack_do_not_reach_shared_tensors(law):
    def fn(p, x, ids):
        y = jnp.einsum("bi,bio->bo", x, jnp.take(p["w"], ids, axis=0))
        return jnp.where((ids < 3)[:, None], y, 0.0)

    law(fn, {"w": w(3, 6, 4)}, {"w": Common()}, w(3, 6), np.array([2, 5, 0], np.int32))


def test_a_vector_a_layer_is_no_table():
    params, x = {"scale": jnp.ones((3, 6))}, jnp.ones((2, 6))

    def fn(p, x):
        def step(h, i):
            return h * jnp.take(p["scale"], i, axis=0)[None], None

        return lax.scan(step, x, jnp.arange(3))[0]

    (site,) = jl.sites(fn, params, x)
    assert (site.kinds, site.ops) == ("so", ("mul",))


def test_a_gather_that_is_no_lookup_is_called_otherwise():
    """Single entries of a matrix: no method can stay lazy there, and the table says so."""
    (site,) = jl.sites(lambda p, i: p["w"][i, i], {"w": jnp.ones((4, 4))}, np.arange(3))
    assert site.ops == ("gather of entries",)
    with pytest.raises(ValueError, match=r"consumes whole: \['w \(gather of entries\)'\]"):
        jl.sites(lambda p, i: p["w"][i, i], {"w": jnp.ones((4, 4))}, np.arange(3)).select(
            {"w": jl.LoRA()}
        )
