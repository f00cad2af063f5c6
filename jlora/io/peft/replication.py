"""PEFT's layer replication: layers of the base used several times, with an adapter for each use.

``layer_replication: [[0, 2], [1, 3]]`` makes a model of layers 0, 1, 1, 2. Here the parameters are
expanded by it first, so that the adapter lies on an ordinary stack of four layers; files say what
their model was expanded by, and reading or writing them asks for the same.

Source: peft 0.21.2, read for its behaviour (`replicate_layers`).
Deviates: the expanded parameters are copies, where PEFT shares them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jlora.core.lift import path_string
from jlora.core.site import Site
from jlora.io.errors import FormatError
from jlora.types import Dynamic, Json, Tree

FIELD = "layer_replication"
Replication = Sequence[Sequence[int]]


def order_of(replication: Replication) -> list[int]:
    """The layers in use.

    Args:
      replication: pairs [start, stop].

    Returns:
      [[0, 2], [1, 3]] -> [0, 1, 1, 2].

    Raises:
      ValueError: anything else than pairs 0 <= start < stop.
    """
    order: list[int] = []
    for pair in replication:
        if len(pair) != 2 or not 0 <= pair[0] < pair[1]:
            raise ValueError(
                f"{FIELD}: got {list(pair)}, expected [start, stop], 0 <= start < stop"
            )
        order.extend(range(*pair))
    return order


def replicate_layers(params: Tree, replication: Replication, layers: str = "layers") -> Tree:
    """The parameters with the stacks [n, ...] of all leaves below a key `layers` expanded.

    Args:
      params: a tree with layers stacked on their leading axis.
      replication: pairs [start, stop].
      layers: the key above the stacked leaves; "layers", as in `jlora.models`.

    Returns:
      A new tree; other leaves are the same objects.

    Raises:
      ValueError: bad pairs, a layer that does not exist, no leaf below `layers`.
    """
    order, seen = order_of(replication), []

    def expand(path: Dynamic, leaf: Dynamic) -> Dynamic:
        if layers not in path_string(path).split("/"):
            return leaf
        if max(order) >= leaf.shape[0]:
            raise ValueError(
                f"{path_string(path)}: has {leaf.shape[0]} layers, {FIELD} asks for {max(order)}"
            )
        seen.append(path)
        return jnp.take(leaf, jnp.asarray(order), axis=0)

    out = jax.tree_util.tree_map_with_path(expand, params)
    if not seen:
        raise ValueError(f"no leaf lies below {layers!r}")
    return out


def check_sites(path: str | os.PathLike[str], sites: Iterable[Site], given: Replication) -> None:
    """Refuses sites that are not stacked on as many layers as there are uses.

    Args:
      path: of the file, for errors.
      sites: the adapted ones.
      given: pairs [start, stop].

    Raises:
      FormatError: another stack, or bad pairs.
    """
    try:
        count = len(order_of(given))
    except ValueError as error:
        raise FormatError(path, str(error)) from error
    for site in sites:
        if site.stack[:1] != (count,):
            raise FormatError(
                path, f"{site.path}: stack {site.stack}, expected {count} replicated layers first"
            )


def settled(
    path: str | os.PathLike[str], config: Mapping[str, Json], given: Replication | None
) -> dict[str, Json]:
    """A config without its `layer_replication`, which must be the one given.

    Args:
      path: of the config, for errors.
      config: its fields.
      given: pairs [start, stop]; None: none.

    Returns:
      The other fields.

    Raises:
      FormatError: it is another one.
    """
    declared = config.get(FIELD)
    want = None if given is None else [list(pair) for pair in given]
    if declared != want and not (want is None and declared in ([], False)):
        raise FormatError(
            path,
            f"{FIELD} is {repr(declared)[:80]}, expected {want}; expand the parameters with "
            f"replicate_layers(params, {FIELD}) and pass {FIELD}",
        )
    return {name: None if name == FIELD else value for name, value in config.items()}
