"""The laws of dtypes: they are kept, and what is computed is exact up to their rounding."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jlora.contract.case import (
    ROUNDING,
    Case,
    cast,
    close,
    projected,
    projected_apart,
    scaled,
    scanned,
)
from jlora.core.adapter import Adapter
from jlora.core.block import BlockMethod
from jlora.core.site import Arrays
from jlora.core.sites import init


def dtypes_kept(case: Case) -> None:
    """dtypes are kept, float32 adapters on bfloat16 bases

    Args:
      case: a method on the small model.
    """
    start = functools.partial(init, jax.random.key(0), scanned, methods={case.pattern: case.method})
    for base in (jnp.float32, jnp.bfloat16):
        params, x = jax.tree.map(lambda t: t.astype(base), (case.params, case.x))  # noqa: B023
        fresh = jax.eval_shape(start, params, x)
        floats = [t for t in jax.tree.leaves(fresh) if jnp.issubdtype(t.dtype, jnp.floating)]
        assert all(t.dtype == jnp.float32 for t in floats)
        y = jax.eval_shape(lambda a, p, x: case.forward(a, x, p), fresh, params, x)
        assert y.dtype == base
        if case.merges:
            merged = jax.eval_shape(case.merge, params, fresh)
            assert all(t.dtype == base for t in jax.tree.leaves(merged))


def precise(case: Case) -> None:
    """whatever dtypes base, adapter and activation have, it is what float64 merges

    Args:
      case: a method on the small model.
    """
    kinds = list(ROUNDING)
    apart = isinstance(case.method, BlockMethod)
    model = projected_apart if apart else projected
    name, model = ("gain", scaled) if type(case.method).vectors else ("up", model)
    # nine trials, in which every pair of dtypes occurs
    trials = [(b, a, kinds[(i + j) % 3]) for i, b in enumerate(kinds) for j, a in enumerate(kinds)]
    if not case.merges:  # what a router chooses may depend on how the activation is rounded
        trials = [(base, kept, "float32") for base, kept, _ in trials]

    def run(base, adapter, x):
        y = case.forward(adapter, x, base, model)
        return y, case.merge(base, adapter)[name] if case.merges else ()

    def definition(base, adapter, x):
        if not case.merges:
            return run(base, adapter, x)
        merged = case.merge(base, adapter)
        return model(merged, x), merged[name]

    adapters = {d: _stored(case.noisy[1], name, d) for d in kinds}
    bases, xs = ({d: t.astype(d) for d in kinds} for t in (case.params["layers"][name], case.x))
    given = [({name: bases[base]}, adapters[kept], xs[kind]) for base, kept, kind in trials]
    results = case.jit(lambda given: [run(*each) for each in given])(given)
    with jax.enable_x64(True):
        one = case.jit(definition)
        exact = [one(*cast(each, jnp.float64)) for each in given]
    for trial, (y, merged), (want, total) in zip(trials, results, exact, strict=True):
        what = "base {}, adapter {}, activation {}".format(*trial)
        assert y.dtype == trial[2], what
        tol = ROUNDING[trial[2]]
        if name == "gain":  # the model is given the merged vector, in the dtype of its leaf
            tol = max(tol, ROUNDING[trial[0]])
        close(y, want, tol, what)
        if case.merges:
            assert merged.dtype == trial[0], what
            close(merged, total, ROUNDING[trial[0]] / 2, what)


def _stored(adapter: Adapter, name: str, dtype: str) -> Adapter:
    """Of one site, as from a file of `dtype`: the scale is float32, all else in `dtype`."""
    ((site, method),) = (row for row in adapter.sites if row[0].path == f"layers/{name}")
    site = dataclasses.replace(site, path=name, dtype=jnp.dtype(dtype))

    def kept(part: Mapping[str, Arrays]) -> dict[str, dict[str, jax.Array]]:
        names = {f"layers/{name}": name, site.group: site.group}
        named = {names[path]: arrays for path, arrays in part.items() if path in names}
        return {
            path: {k: t if k == "scale" else cast(t, dtype) for k, t in arrays.items()}
            for path, arrays in named.items()
        }

    return Adapter(kept(adapter.trainable), kept(adapter.frozen), ((site, method),))
