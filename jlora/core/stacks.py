"""Weights that differ in their values alone: one weight with a stack axis, whatever the method.

Every slice keeps its own arrays of the method, so this costs nothing.

Deviates: nothing.
"""

import dataclasses
from collections.abc import Sequence

import jax
from jax import lax

from jlora.core.atoms import Atom
from jlora.core.lazy import Lazy
from jlora.core.site import Site


def joint(ws: Sequence[Lazy]) -> Site:
    """A name for a value computed from several weights.

    Args:
      ws: the weights.

    Returns:
      The site of the first one, with all paths joined by "+".
    """
    path = "+".join(dict.fromkeys(w.site.path for w in ws))
    return dataclasses.replace(ws[0].site, path=path)


def alike(ws: Sequence[Lazy], axis: int | None = None, branches: bool = False) -> bool:
    """Whether weights differ in their arrays only, and in their size along a stack axis.

    Args:
      ws: the weights.
      axis: of the view, along which sizes may differ; None: none.
      branches: whether arrays that sites share may be two of one form, as outputs of branches are;
        else they are the same.

    Returns:
      False, too, where a base is quantised.
    """

    def form(w):
        free = w.dims[axis] if axis is not None else ()
        shared = {k: (t.shape, t.dtype) if branches else id(t) for k, t in w.shared.items()}
        atoms = [(a.kind, None if k in free else a.size) for k, a in enumerate(w.atoms)]
        own = {k: (t.dtype, t.shape[len(w.of("s")) :]) for k, t in w.own.items()}
        base = (w.base.dtype, w.base.ndim)
        return w.method, atoms, w.dims, own, base, w.casts, shared

    return all(not hasattr(w.base, "dequantize") and form(w) == form(ws[0]) for w in ws)


def stacked(ws: Sequence[Lazy], axis: int) -> Lazy | None:
    """Weights laid along a stack axis.

    Args:
      ws: the weights; of any method.
      axis: of the view: a stack axis of each, or one of size one without atoms.

    Returns:
      One weight; None where they are not `alike`, or the axis is another one.
    """
    if not alike(ws, axis) or not (ws[0].stacks(axis) or not ws[0].dims[axis]):
        return None
    if len(ws[0].dims[axis]) > 1:
        return None
    if not ws[0].dims[axis]:
        ws = [_with_slice(w, axis) for w in ws]
    (atom,) = ws[0].dims[axis]
    at = ws[0].of("s").index(atom)
    base = lax.concatenate([w.base for w in ws], axis)
    own = jax.tree.map(lambda *t: lax.concatenate(t, at), *(w.own for w in ws))
    atoms = list(ws[0].atoms)
    atoms[atom] = Atom("s", base.shape[axis], ())
    return ws[0].replace(base=base, own=own, atoms=tuple(atoms), site=joint(ws))


def _with_slice(w: Lazy, axis: int) -> Lazy:
    """An axis of size one as a stack of one slice."""
    dims = [tuple(a + 1 for a in dim) for dim in w.dims]
    dims[axis] = (0,)
    own = jax.tree.map(lambda t: t[None], w.own)
    return w.replace(own=own, atoms=(Atom("s", 1, ()), *w.atoms), dims=tuple(dims))
