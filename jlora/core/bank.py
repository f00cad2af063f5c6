"""One adapter or a bank of them: size, length, items, a short text.

A bank of N adapters is an adapter whose arrays have one more leading axis, [N, *stack, ...].
Nothing is stored that says so (under `jax.vmap` the same object is one adapter): the number of axes
of a site's arrays does.

Deviates: nothing.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.site import InitContext
from jlora.types import Dynamic


class Banked:
    """Base of `Adapter`."""

    trainable: Dynamic  # path -> name -> array
    sites: Dynamic  # ((Site, Method), ...)

    def arrays(self, site: Dynamic) -> tuple[Dynamic, Dynamic]:
        """The arrays of a site.

        Args:
          site: one of `sites`.

        Returns:
          (own, shared), by name.
        """
        raise NotImplementedError

    @property
    def size(self) -> int:
        """How many numbers are trained."""
        return sum(math.prod(jnp.shape(t)) for t in jax.tree.leaves(self.trainable))

    @property
    def bank_shape(self) -> tuple[int, ...] | None:
        """Sizes of the axes before those of one adapter: () of one, (N,) of a bank of N.

        Known by a site's scale, or else by what its method's `init` makes; None without either.
        """
        rows = [(site, method, *self.arrays(site)) for site, method in self.sites]
        for site, method, own, shared in sorted(rows, key=lambda row: "scale" not in row[2]):
            axes = {"scale": len(site.stack)}
            if "scale" not in own:
                members = tuple(s for s, *_ in rows if s.group == site.group)
                axes = _axes(site, method, shared, members)
            for name in own.keys() & axes:
                shape = jnp.shape(own[name])
                return shape[: max(0, len(shape) - axes[name])]
        return None

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        """How many adapters a bank holds; TypeError of one adapter."""
        shape = self.bank_shape
        if not shape:
            raise TypeError(
                f"got one adapter of {len(self.sites)} sites, expected a bank of jl.stack"
            )
        return shape[0]

    def __iter__(self) -> Iterator[Self]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, i: Dynamic) -> Self:
        """Adapter(s) `i` of a bank; a slice, an array, or traced (then it is not checked).

        Raises IndexError for an integer that the bank does not have, TypeError of one adapter.
        """
        shape = self.bank_shape
        if shape == ():
            raise TypeError(
                f"got one adapter of {len(self.sites)} sites, expected a bank of jl.stack"
            )
        if shape and isinstance(i, int | np.integer) and not -shape[0] <= i < shape[0]:
            raise IndexError(f"adapter {i}: the bank has {shape[0]}")
        return jax.tree.map(lambda t: t[i], self)

    def __repr__(self) -> str:
        paths: dict[str, list[str]] = {}
        for site, method in self.sites:
            paths.setdefault(repr(method), []).append(site.path)
        shape = self.bank_shape
        bank = f"bank of {' x '.join(map(str, shape))}, " if shape else ""
        head = f"Adapter({bank}{len(self.sites)} sites, {self.size:,} trainable parameters)"
        return "\n".join([head, *(f"  {method}: {_few(at)}" for method, at in paths.items())])


def _axes(site: Dynamic, method: Dynamic, shared: Dynamic, siblings: Dynamic) -> dict[str, int]:
    """{name: number of axes} of what `method.init` makes at a site; {} where it needs more."""

    single = site.slice()

    def init(key, w):
        return method.init(key, single, InitContext(single, w, 0, shared, siblings))

    w = jax.ShapeDtypeStruct(single.shape, site.dtype)
    try:
        shapes = jax.eval_shape(init, jax.random.key(0), w)
    except Exception:  # a method whose arrays init does not make, or that reads values
        return {}
    return {name: len(site.stack) + t.ndim for part in shapes for name, t in part.items()}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])


def one_adapter(adapter: Banked, what: str) -> None:
    """Refuses a bank where one adapter is wanted.

    Args:
      adapter: what was given.
      what: the name of the caller, for the message.

    Raises:
      ValueError: it is a bank.
    """
    shape = adapter.bank_shape
    if shape:
        count = " x ".join(map(str, shape))
        raise ValueError(
            f"{what}: got a bank of {count} adapters, expected one adapter, as bank[i]"
        )
