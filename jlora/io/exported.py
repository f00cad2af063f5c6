"""Adapters as arguments of functions that `jax.export` writes.

The sites and methods of an adapter are part of the type of its argument. They are written as JSON,
as in an Orbax checkpoint; only methods of `jlora.methods` are read back, by name.

Original to jlora; the form is that of `jlora.io.adapter_json`.
Deviates: nothing.
"""

import json
from pathlib import Path

from jax import export

from jlora.core.adapter import Adapter
from jlora.io.adapter_json import Sites, site_json, sites_of
from jlora.io.json_file import parse_json

NAME = "jlora.Adapter"


def to_bytes(static: tuple[Sites]) -> bytes:
    """The static part of an adapter as JSON.

    Args:
      static: (sites,), as JAX hands it over.

    Returns:
      UTF-8.

    Raises:
      FormatError: a hyper-parameter cannot be written as JSON.
    """
    (sites,) = static
    return json.dumps([site_json(Path(NAME), *row) for row in sites]).encode()


def from_bytes(data: bytes) -> tuple[Sites]:
    """The inverse of `to_bytes`.

    Args:
      data: UTF-8.

    Returns:
      (sites,).

    Raises:
      FormatError: not a description of sites, or a method that is not of `jlora.methods`.
    """
    return (sites_of(Path(NAME), parse_json(NAME, data)),)


def register() -> None:
    """Registers with `jax.export` how adapters are written; once per process."""
    export.register_pytree_node_serialization(
        Adapter, serialized_name=NAME, serialize_auxdata=to_bytes, deserialize_auxdata=from_bytes
    )


register()
