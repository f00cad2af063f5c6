"""The merging methods by name, collected from the records of the files in the rooms of merging."""

import importlib
import pkgutil

from jlora import merging
from jlora.merging.engine.record import LAWS as LAWS
from jlora.merging.engine.record import Merging as Merging

ROOMS = ("exact", "elementwise", "spectral", "learned", "peft")


def _collected() -> dict[str, Merging]:
    by_name: dict[str, Merging] = {}
    for room in ROOMS:
        package = importlib.import_module(f"{merging.__name__}.{room}")
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = vars(importlib.import_module(info.name))
            records = module.get("SYSTEMS", module.get("SYSTEM", ()))
            for record in records if isinstance(records, tuple) else (records,):
                if isinstance(record, Merging):
                    by_name[record.name] = record
    return by_name


METHODS: dict[str, Merging] = _collected()
ROWS: tuple[Merging, ...] = tuple(METHODS.values())
