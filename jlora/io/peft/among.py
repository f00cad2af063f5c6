"""What the tensors of a module mean next to those of the other modules of a file.

Some types draw tensors that all modules share from a seed (`regrown`), and in some a module's
tensors mean nothing without its number or its name among the others (`related`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jlora.core.site import Site
from jlora.io.errors import FormatError
from jlora.io.peft import config as peft_config
from jlora.io.peft.read import Modules
from jlora.io.peft.table import Arrays, Table
from jlora.types import Json


def regrown(
    reader: peft_config.Reader,
    table: Table,
    per_module: Mapping[str, Arrays],
    modules: Modules,
    sites: Mapping[str, Site],
) -> Arrays:
    """Shared tensors of which the file has only a seed.

    Args:
      reader: of the config.
      table: of the method.
      per_module: module -> suffix -> tensor.
      modules: module -> (site path, stack index).
      sites: by path.

    Returns:
      By key; {} where something else is wrong, which `check_modules` reports.
    """
    whole = all(any(set(t) == set(layout) for layout in table.layouts) for t in per_module.values())
    if table.regrow is None or not per_module or not whole or not set(per_module) <= set(modules):
        return {}
    known = [(sites[modules[module][0]].slice(), tensors) for module, tensors in per_module.items()]
    return table.regrow(reader.config, known) or {}


def related(
    path: Path,
    table: Table,
    config: Mapping[str, Json],
    per_module: Mapping[str, Arrays],
    shared: Arrays,
    modules: Modules,
    sites: Mapping[str, Site],
) -> Mapping[str, Arrays]:
    """What a module's tensors mean next to those of the others.

    Args:
      path: of the file, for errors.
      table: of the method.
      config: its fields.
      per_module: module -> suffix -> tensor, all of them checked.
      shared: tensors that modules share, by key.
      modules: module -> (site path, stack index).
      sites: by path.

    Returns:
      Module -> further arrays, {} of most methods.

    Raises:
      FormatError: the modules do not fit each other.
    """
    if table.relate is None:
        return {}
    known = {name: (sites[modules[name][0]].slice(), own) for name, own in per_module.items()}
    try:
        return table.relate(config, known, shared)
    except ValueError as error:
        raise FormatError(path, str(error)) from error
