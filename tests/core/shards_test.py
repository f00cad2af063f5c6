"""Weights inside of `shard_map`: lifting equals merging, gradients too, on a mesh of 2 x 2."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jlora as jl
from tests.core.views_test import METHODS, check, compared, w

X = w(8, 4, seed=0)  # [rows, d_in]
E = 4  # experts


def mapped(body, in_specs, out_specs, **options):
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options)


def column_parallel(w, x):
    return mapped(lambda w, x: jnp.tanh(x @ w), (P(None, "t"), P("d")), P("d", "t"))(w, x)


def row_parallel(w, x):
    def body(w, x):
        return lax.psum(x @ w, "t")

    return mapped(body, (P("t", None), P("d", "t")), P("d"))(w, x)


def gathered(w, x):
    """A weight in shards, gathered where it is used, as in fully sharded training."""

    def body(w, x):
        return x @ lax.all_gather(w, "d", axis=0, tiled=True)

    return mapped(body, (P("d", "t"), P("d")), P("d", "t"), check_vma=False)(w, x)


def experts(w, x):
    """As EasyDeL and MaxText run them: each device its experts, each expert its rows."""
    rows = x.reshape(E, -1, x.shape[1])

    def body(w, rows):
        return jnp.einsum("eti,eio->eto", rows, w)

    return mapped(body, (P("d"), P("d", "t")), P("d", "t"))(w, rows)


def ragged_experts(w, x):
    """Rows sorted by expert; the columns of all experts are in parts, too."""
    sizes = jnp.array([3, 1, 0, 2, 1, 1, 0, 0])  # of the 4 experts, on either half

    def body(w, x, sizes):
        return lax.ragged_dot(x, w, sizes)

    run = mapped(body, (P(None, None, "t"), P("d"), P("d")), P("d", "t"))
    return run(w, x, sizes)


def scanned(w, x):
    def body(w, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]

    return mapped(body, (P(), P("d")), P("d"))(w, x)


def views(w, x):
    def body(w, x):
        return x @ (0.5 * w[:, :2]) + x @ w.T[:2].T

    return mapped(body, (P(None, "t"), P("d")), P("d", "t"))(w, x)


def partly_manual(w, x):
    run = mapped(lambda w, x: x @ w, (P(None, "t"), P()), P(None, "t"), axis_names={"t"})
    return run(w, x)


FORMS = {  # name -> (function, shape of w)
    "columns": (column_parallel, (4, 6)),
    "rows": (row_parallel, (4, 6)),
    "gathered": (gathered, (4, 6)),
    "experts": (experts, (E, 4, 6)),
    "ragged experts": (ragged_experts, (E, 4, 6)),
    "scan": (scanned, (2, 4, 4)),
    "views": (views, (4, 6)),
    "partly manual": (partly_manual, (4, 6)),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_weights_in_shards(method):
    some = FORMS if method == "LoRA" else [n for n in FORMS if n not in ("rows", "scan", "views")]
    forms = {name: FORMS[name] for name in some}

    def fn(p, x):
        return {name: use(p[name], x) for name, (use, _) in forms.items()}

    params = {name: w(*shape) for name, (_, shape) in forms.items()}
    adapter, found = compared(fn, params, {"all-linear": METHODS[method]}, X)
    kinds = {s.path: s.kinds for s, _ in adapter.sites}
    assert len(kinds) == len(forms) and kinds["experts"] == kinds["ragged experts"] == "sio"
    check(found)


def test_the_table_and_what_is_refused():
    params, x = {"w": jnp.asarray(w(4, 6))}, jnp.asarray(X)

    def fn(p, x):
        return column_parallel(p["w"], x)

    (site,) = jl.sites(fn, params, x)
    assert (site.kinds, site.ops, site.views) == ("io", ("dot",), ("shard_map",))
    masked = jl.TokenMask(jl.LoRA(2))
    adapter = jl.init(jax.random.key(0), fn, params, x, methods={"w": masked})
    with pytest.raises(jl.DenseWeightError, match=r"w \(4, 6\): 'shard_map' at .*shards_test.py"):
        jl.lift(fn)(params, adapter, x, ctx={"mask": jnp.ones(8)})


def test_experts_are_not_merged():
    """A stack in parts keeps its method, even one without factors: nothing else is outside."""
    params, x = {"w": jnp.asarray(w(E, 4, 6))}, jnp.asarray(X)

    def fn(p, x):
        return experts(p["w"], x)

    adapter = jl.init(jax.random.key(0), fn, params, x, methods={"w": jl.DoRA(2)})
    jaxpr = jax.make_jaxpr(jl.lift(fn))(params, adapter, x).jaxpr
    assert {e.primitive.name for e in jaxpr.eqns} == {"reshape", "shard_map"}


def test_side_inputs_that_no_method_in_here_reads_stay_outside():
    params, x = {"w": jnp.asarray(w(4, 6))}, jnp.asarray(X)

    def fn(p, x):
        return column_parallel(p["w"], x)

    adapter = jl.init(jax.random.key(0), fn, params, x, methods={"w": jl.LoRA(2)})

    def run(key):
        return jl.lift(fn)(params, adapter, x, ctx={"key": key, "mask": jnp.ones(8)})

    assert "random" not in str(jax.make_jaxpr(run)(jax.random.key(1)))
