"""A weight that has not been merged: the base in the layout the model gave it, and the adapter.

The axes of a leaf are its first *atoms*. Reshapes split atoms, views permute and group them, slices
and scans take stack atoms away; so the matrix [d_in, d_out] can always be recovered:
atoms of kind 'i' in their order are d_in, atoms of kind 'o' are d_out.

Deviates: nothing.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from jlora.core.atoms import Atom, regroup
from jlora.core.method import Method
from jlora.core.site import (
    Arrays,
    Site,
    at_least_float32,
    fold,
    inverse_permutation,
    transposed,
    unfold,
)
from jlora.types import Dynamic

SIDE = "ctx:"  # prefix of the side inputs of a site among its arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lazy:
    """`base` seen through a view, to be merged with `own` and `shared` only by whoever must."""

    base: Dynamic  # array in the current layout, not yet cast; or something with `dequantize()`
    own: Arrays  # arrays of the method and side inputs, [*stack atoms left, ...]
    shared: Arrays  # arrays of the method without stack axes
    site: Site = dataclasses.field(metadata={"static": True})
    method: Method | None = dataclasses.field(metadata={"static": True})  # None: the base alone
    atoms: tuple[Atom, ...] = dataclasses.field(metadata={"static": True})
    dims: tuple[tuple[int, ...], ...] = dataclasses.field(
        metadata={"static": True}
    )  # atoms an axis
    casts: tuple[Dynamic, ...] = dataclasses.field(default=(), metadata={"static": True})
    views: tuple[tuple[str, frozenset], ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )  # while the kinds are being found out: (operation, the axes of leaves that it changed)
    leaves: tuple[tuple[Site, float], ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )  # the same, of a value made from several leaves: (site, its share of the elements)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes, as the model sees them."""
        return tuple(math.prod(self.atoms[a].size for a in d) for d in self.dims)

    @property
    def ndim(self) -> int:
        """How many axes it has, as the model sees it."""
        return len(self.dims)

    @property
    def dtype(self) -> Dynamic:
        """Of the weight as the model has cast it."""
        return self.casts[-1] if self.casts else self.base.dtype

    def replace(self, **changes: Dynamic) -> "Lazy":
        """Returns the same weight with other fields, as `dataclasses.replace`.

        Args:
          changes: fields and their new values.
        """
        return dataclasses.replace(self, **changes)

    def of(self, kind: str) -> list[int]:
        """Returns the positions in `atoms` of one kind, in the order of the matrix.

        Args:
          kind: 's', 'i' or 'o'.
        """
        return [a for a, atom in enumerate(self.atoms) if atom.kind == kind]

    def size(self, kind: str) -> int:
        """Returns how many rows ('i'), columns ('o') or slices ('s') are in view.

        Args:
          kind: 's', 'i' or 'o'.
        """
        return math.prod(self.atoms[a].size for a in self.of(kind))

    def sources(self, axis: int) -> tuple[tuple[str, int], ...]:
        """Returns the axes of leaves, (path, axis), that an axis comes from.

        Args:
          axis: of the view.
        """
        return tuple(dict.fromkeys(s for a in self.dims[axis] for s in self.atoms[a].sources))

    def stacks(self, axis: int) -> bool:
        """Returns whether an axis is made of stack atoms only; False for an axis without atoms.

        Args:
          axis: of the view.
        """
        return bool(self.dims[axis]) and all(self.atoms[a].kind == "s" for a in self.dims[axis])

    def opened(self) -> "Lazy":
        """Returns the same with a base that is an array; a quantised one is dequantised."""
        if hasattr(self.base, "dequantize"):
            return self.replace(base=self.base.dequantize())
        return self

    def _ready(self, *axes: int) -> "Lazy":
        """Quantised bases can be cut along any axis but the last, which they keep in blocks."""
        return self.opened() if self.ndim - 1 in axes else self

    def cast(self, w: Shaped[jax.Array, "*axes"]) -> Shaped[jax.Array, "*axes"]:
        """Returns a matrix of this weight in the dtype of the leaf, then as the model casts it.

        Args:
          w: of any axes.
        """
        for dtype in self.casts or (self.base.dtype,):
            w = w.astype(dtype)
        return w

    def view(self) -> jax.Array:
        """Returns the base weight as the model sees it now, [*shape] in `dtype`."""
        return self.cast(self.opened().base)

    def matrix(self) -> Shaped[jax.Array, "*stack d_in d_out"]:
        """Returns the base as [*stack, d_in, d_out], in the dtype it is stored in."""
        order = [a for d in self.dims for a in d]
        w = self.opened().base.reshape([self.atoms[a].size for a in order])
        return fold(
            transposed(w, inverse_permutation(order)), "".join(atom.kind for atom in self.atoms)
        )

    def parameters(self) -> Arrays:
        """Returns the arrays of the method alone, [*stack, ...] by name."""
        return {name: t for name, t in self.own.items() if not name.startswith(SIDE)}

    def side(self) -> Arrays:
        """Returns the side inputs of this site (`jlora.core.context`), [*stack, ...] by name."""
        return {name[len(SIDE) :]: t for name, t in self.own.items() if name.startswith(SIDE)}

    def prepared(self) -> Arrays:
        """Returns its arrays as `Method.prepare` has them, shared ones too; without stack axes."""
        assert self.method is not None
        return self.method.prepare({**self.shared, **self.parameters()})

    def merged(self) -> jax.Array:
        """Returns merge(w, p) in the current view, [*shape] in `dtype`."""
        if self.method is None:
            return self.view()
        stack = len(self.of("s"))
        w = merged(self.method, self.matrix(), self.parameters(), self.shared, stack)
        w = unfold(w, "".join(a.kind for a in self.atoms), [a.size for a in self.atoms])
        w = transposed(w, [a for d in self.dims for a in d])
        return self.cast(w.reshape(self.shape).astype(self.base.dtype))

    def unstack(self, axis: int) -> tuple[tuple[Dynamic, Arrays], Dynamic] | None:
        """Takes a stack axis off, for a scan or `jax.vmap`.

        Args:
          axis: of the view.

        Returns:
          (arrays with that axis in front, a function from one slice of them to a `Lazy`); None
          where the
          axis is not made of stack atoms only.
        """
        self, atoms = self._ready(axis), self.dims[axis]
        if not atoms or any(self.atoms[a].kind not in "s?" for a in atoms):
            return None
        n = self.shape[axis]
        stack = [a for a, atom in enumerate(self.atoms) if atom.kind == "s"]

        def front(t):
            t = jnp.moveaxis(t, [stack.index(a) for a in atoms], range(len(atoms)))
            return t.reshape(n, *t.shape[len(atoms) :])

        base = jax.tree.map(lambda t: jnp.moveaxis(t, axis, 0), self.base)
        arrays = (base, jax.tree.map(front, self.own))
        dims = self.dims[:axis] + self.dims[axis + 1 :]
        return arrays, self._without(atoms, dims)

    def cut(self, axis: int, take: Dynamic) -> "Lazy | None":
        """A part of a stack axis.

        Args:
          axis: of the view.
          take: `take(array, axis)` cuts base and adapter alike.

        Returns:
          The part; None where the axis is not one stack atom.
        """
        self, atoms = self._ready(axis), self.dims[axis]
        if len(atoms) != 1 or self.atoms[atoms[0]].kind not in "s?":
            return None
        (a,) = atoms
        base = jax.tree.map(lambda t: take(t, axis), self.base)
        own = jax.tree.map(lambda t: take(t, self._stack_axis(a)), self.own)
        cut = self.atoms[a]._replace(size=base.shape[axis])
        return self.replace(base=base, own=own, atoms=(*self.atoms[:a], cut, *self.atoms[a + 1 :]))

    def _stack_axis(self, atom: int) -> int:
        return sum(self.atoms[a].kind == "s" for a in range(atom))

    def select(self, axis: int, take: Dynamic, lead: tuple[int, ...], take_own: Dynamic) -> "Lazy":
        """Trades a stack axis for leading stack axes.

        Args:
          axis: of the view, of one stack atom.
          take: `take(array, axis)` does so with the base.
          lead: sizes of the new axes.
          take_own: `take_own(array, axis)` does so with the adapter's arrays.

        Returns:
          The selected slices, [*lead, ...].
        """
        self, (a,) = self._ready(axis), self.dims[axis]
        base = jax.tree.map(lambda t: take(t, axis), self.base)
        own = jax.tree.map(lambda t: take_own(t, self._stack_axis(a)), self.own)
        dims = self.dims[:axis] + self.dims[axis + 1 :]
        rest = self._without((a,), dims)((base, own))
        n = len(lead)
        return rest.replace(
            atoms=tuple(Atom("s", size, self.atoms[a].sources) for size in lead) + rest.atoms,
            dims=tuple((k,) for k in range(n)) + tuple(tuple(b + n for b in d) for d in rest.dims),
        )

    def squeezed(self, axes: Dynamic) -> "Lazy":
        """Returns the same weight without some axes of size one.

        Args:
          axes: of the view.
        """
        self = self._ready(*axes)
        gone = tuple(a for k in axes for a in self.dims[k])
        stack = tuple(self._stack_axis(a) for a in gone if self.atoms[a].kind == "s")
        base = jax.tree.map(lambda t: jnp.squeeze(t, tuple(axes)), self.base)
        own = jax.tree.map(lambda t: jnp.squeeze(t, stack), self.own) if stack else self.own
        dims = tuple(d for k, d in enumerate(self.dims) if k not in axes)
        return self._without(gone, dims)((base, own))

    def reshaped(self, shape: Dynamic) -> "Lazy | None":
        """Returns the same weight in another shape; None where that cuts through its axes.

        Args:
          shape: the new sizes.
        """
        groups = regroup([(a, self.atoms[a].size) for d in self.dims for a in d], shape)
        if groups is None:
            return None
        pieces = sorted(
            (a, g, k) for g, group in enumerate(groups) for k, (a, _) in enumerate(group)
        )
        order = {(g, k): new for new, (_, g, k) in enumerate(pieces)}
        atoms = tuple(self.atoms[a]._replace(size=groups[g][k][1]) for a, g, k in pieces)
        dims = tuple(
            tuple(order[g, k] for k in range(len(group))) for g, group in enumerate(groups)
        )
        old, new = (len(self.of("s")), tuple(t.size for t in atoms if t.kind == "s"))
        own = jax.tree.map(lambda t: t.reshape(*new, *t.shape[old:]), self.own)
        return self.replace(base=self.base.reshape(tuple(shape)), own=own, atoms=atoms, dims=dims)

    def _without(self, gone: tuple[int, ...], dims: tuple[tuple[int, ...], ...]) -> Dynamic:
        keep = [a for a in range(len(self.atoms)) if a not in gone]
        atoms = tuple(self.atoms[a] for a in keep)
        dims = tuple(tuple(keep.index(a) for a in d) for d in dims)

        def rebuild(arrays):
            base, own = arrays
            return self.replace(base=base, own=own, atoms=atoms, dims=dims)

        return rebuild


def merged(
    method: Method,
    w: Shaped[jax.Array, "*stack d_in d_out"],
    own: Arrays,
    shared: Arrays,
    stack: int,
) -> Float[jax.Array, "*stack d_in d_out"]:
    """`method.merge` mapped over stack axes, in at least float32.

    Args:
      method: the method.
      w: base matrices.
      own: arrays of the method, [*stack, ...] by name.
      shared: arrays without stack axes, by name.
      stack: how many leading axes `w` and `own` have before those of one matrix.

    Returns:
      [*stack, d_in, d_out].
    """
    dtype = at_least_float32(w.dtype)

    def cast(t):
        floating = jnp.issubdtype(t.dtype, jnp.floating)
        return t.astype(dtype) if floating else t

    def one(w, own):
        p = jax.tree.map(cast, method.prepare({**shared, **own}))
        return method.merge(w.astype(dtype), p)

    for _ in range(stack):
        one = jax.vmap(one)
    with jax.default_matmul_precision("highest"):  # accelerators round the operands of others
        return one(w, own)


def leaf(w: Dynamic, site: Site, method: Method | None, own: Arrays, shared: Arrays) -> Lazy:
    """A leaf of the parameters, nothing done to it yet.

    Args:
      w: the array, or something with `dequantize()`.
      site: its site.
      method: its method; None: the base alone.
      own: arrays of the method and side inputs, [*stack, ...] by name.
      shared: arrays of the method without stack axes, by name.

    Returns:
      A lazy weight whose view is the leaf itself.
    """
    atoms = tuple(
        Atom(k, n, ((site.path, axis),))
        for axis, (k, n) in enumerate(zip(site.kinds, site.shape, strict=True))
    )
    return Lazy(w, own, shared, site, method, atoms, tuple((a,) for a in range(len(atoms))))
