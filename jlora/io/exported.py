"""Adapters as arguments of functions that `jax.export` writes.

The sites and methods of an adapter are part of the type of its argument. They are written as JSON,
as in an Orbax checkpoint; only methods of `jlora.methods` are read back, by name.

Source: ours; the form is that of `jlora.io.orbax`.
Deviates: nothing.
"""

import json
from pathlib import Path
from typing import Any

from jax import export

from jlora.core.adapter import Adapter
from jlora.io import orbax
from jlora.io.json_file import parse_json

NAME = "jlora.Adapter"


def to_bytes(static: Any) -> bytes:
    """The static part of an adapter, (sites,), as JSON."""
    (sites,) = static
    return json.dumps([orbax._site_json(Path(NAME), *row) for row in sites]).encode()


def from_bytes(data: bytes) -> Any:
    """The inverse of `to_bytes`.

    Raises:
      FormatError: no description of sites, or a method that is not of `jlora.methods`.
    """
    return (orbax.sites_of(Path(NAME), parse_json(NAME, data)),)


def register() -> None:
    """Tells `jax.export` how adapters are written; once a process."""
    export.register_pytree_node_serialization(
        Adapter, serialized_name=NAME, serialize_auxdata=to_bytes, deserialize_auxdata=from_bytes
    )


register()
