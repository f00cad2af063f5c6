"""The check that most of the core's tests are: lifting equals merging, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl


def noisy(tree, seed=0, size=0.3):
    """Every floating leaf moved, so that no zero of an initialisation hides a mistake."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda t: jnp.asarray(np.asarray(t) + size * rng.normal(size=t.shape), t.dtype), tree
    )


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
        assert got.dtype == expected.dtype and got.shape == expected.shape
        got, expected = np.asarray(got), np.asarray(expected)
        assert np.abs(got - expected).max() <= tolerance * max(1e-3, np.abs(expected).max())


FAST = {"xla_backend_optimization_level": 0}  # compiles faster; the tests run each program once


def law_of(
    fn, params, methods, *args, structural=True, fresh=False, tolerance=1e-12, dtype=jnp.float64,
    made_for=None,
):  # fmt: skip
    """L3, L4 and with `fresh` L2 for one function; returns an adapter moved off its init.

    `made_for`: (another function, its args) whose sites the adapter has.
    """
    params, args = jax.tree.map(
        lambda t: jnp.asarray(t, dtype) if jnp.issubdtype(t.dtype, jnp.floating) else t,
        (params, args),
    )

    def init(params):
        source, given = made_for or (fn, args)
        return jl.init(jax.random.key(0), source, params, *given, methods=methods)

    made = jax.eval_shape(init, params)
    zeros = jax.tree.map(lambda t: np.zeros(t.shape, t.dtype), made.trainable)
    trainable = noisy(zeros)

    def loss(run):
        def value(trainable, adapter, params, args):
            out = run(params, adapter.replace(trainable=trainable), *args)
            leaves = [t for t in jax.tree.leaves(out) if jnp.issubdtype(t.dtype, jnp.floating)]
            return sum(jnp.sum(jnp.sin(t)) for t in leaves), out

        return jax.value_and_grad(value, has_aux=True)

    lifted = loss(jl.lift(fn))
    merged = loss(lambda p, a, *rest: fn(jl.merge(p, a), *rest))

    def everything(trainable, params, args):
        first = init(params)
        rest = (trainable, first, params, args)
        start = (fn(params, *args), jl.lift(fn)(params, first, *args)) if fresh else ()
        return first.frozen, lifted(*rest), merged(*rest), start

    run = jax.jit(everything, compiler_options=FAST)
    frozen, ((_, out1), g1), ((_, out2), g2), start = run(trainable, params, args)
    adapter = made.replace(trainable=trainable, frozen=frozen)
    if fresh:
        close(start[1], start[0], tolerance)
    close(out1, out2, tolerance)
    close(g1, g2, tolerance)
    assert max(np.abs(np.asarray(t)).max() for t in jax.tree.leaves(g2)) > 1e-6, "a void test"
    if structural:
        jaxpr = jax.make_jaxpr(lifted)(adapter.trainable, adapter, params, args).jaxpr
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
