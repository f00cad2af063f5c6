"""The check that most of the core's tests are: lifting equals merging, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl


def noisy(tree, seed=0, size=0.3):
    """Every floating leaf moved, so that no zero of an initialisation hides a mistake."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda t: t + jnp.asarray(size * rng.normal(size=t.shape), t.dtype), tree)


def equations(jaxpr):
    """All equations of a jaxpr, those of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def dense_matmuls(jaxpr, adapter):
    """The matmuls of a jaxpr whose result has the shape of an adapted matrix, or of its leaf."""
    bad = set()
    for site, _ in adapter.sites:
        for shape in (site.shape, site.slice().shape, (site.d_in, site.d_out)):
            bad.add(tuple(sorted(shape)))
    dots = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    return [e for e in dots if tuple(sorted(e.outvars[0].aval.shape)) in bad]


def close(a, b, tolerance):
    for got, expected in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        top = max(1e-3, float(jnp.abs(expected).max()))
        assert float(jnp.abs(got - expected).max()) <= tolerance * top
        assert got.dtype == expected.dtype and got.shape == expected.shape


FAST = {"xla_backend_optimization_level": 0}  # compiles faster; the tests run each program once


def law_of(fn, params, methods, *args, structural=True, tolerance=1e-12, dtype=jnp.float64):
    """L2, L3 and L4 for one function; returns the adapter, its trainables moved off the init."""
    params, args = jax.tree.map(
        lambda t: jnp.asarray(t, dtype) if jnp.issubdtype(t.dtype, jnp.floating) else t,
        (params, args),
    )
    fresh = jl.init(jax.random.key(0), fn, params, *args, methods=methods)
    adapter = fresh.replace(trainable=noisy(fresh.trainable))

    def loss(run):
        def value(trainable):
            out = run(params, adapter.replace(trainable=trainable), *args)
            leaves = [t for t in jax.tree.leaves(out) if jnp.issubdtype(t.dtype, jnp.floating)]
            return sum(jnp.sum(jnp.sin(t)) for t in leaves), out

        return jax.value_and_grad(value, has_aux=True)

    lifted = loss(jl.lift(fn))
    merged = loss(lambda p, a, *rest: fn(jl.merge(p, a), *rest))

    def everything():
        start = jl.lift(fn)(params, fresh, *args)
        return fn(params, *args), start, lifted(adapter.trainable), merged(adapter.trainable)

    plain, start, ((_, out1), g1), ((_, out2), g2) = jax.jit(everything, compiler_options=FAST)()
    close(start, plain, tolerance)
    close(out1, out2, tolerance)
    close(g1, g2, tolerance)
    assert max(float(jnp.abs(t).max()) for t in jax.tree.leaves(g2)) > 1e-6, "a void test"
    if structural:
        jaxpr = jax.make_jaxpr(lifted)(adapter.trainable).jaxpr
        assert not dense_matmuls(jaxpr, adapter)
    return adapter


@pytest.fixture
def law():
    """`law_of` in float64."""
    with jax.enable_x64(True):
        yield law_of


@pytest.fixture
def law32():
    """`law_of` in float32, for libraries that mix dtypes in float64."""

    def check(*args, **kwargs):
        return law_of(*args, dtype=jnp.float32, tolerance=3e-5, **kwargs)

    return check
