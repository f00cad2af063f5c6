"""PEFT's `adapter_config.json`: which modules are adapted, and with which hyper-parameters.

The rules of PEFT 0.21.2, stated without any method: a field has one value for the adapter, and a
pattern field may override it for some modules. A field that jlora knows nothing of must be neutral
(null, false, empty), else the file is refused: nothing that changes the maths is dropped.

Patterns come from untrusted sources, so every regular expression runs against a deadline.

Source: peft 0.21.2, read for its behaviour (`check_target_module_exists`, `get_pattern_key`).
Deviates: nothing.
"""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Collection, Mapping

import regex

from jlora.io import whole_file
from jlora.io.errors import FormatError
from jlora.io.fused import SUM, whole
from jlora.io.json_file import parse_json
from jlora.io.peft.fields import Fields
from jlora.types import Json

IGNORED = {"runtime_config"}  # how to run, not what to compute
MAX_BYTES = 2**20
MAX_PATTERNS = 4096
SECONDS = 10.0

# Fields every type has, with what PEFT writes for an adapter made elsewhere.
COMMON: dict[str, Json] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "peft_type": None,
    "peft_version": "0.21.2",
    "revision": None,
    "task_type": None,
}
TARGETS = {
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
}


def read(path: str | os.PathLike[str]) -> dict[str, Json]:
    """The config in a file.

    Args:
      path: of an `adapter_config.json`.

    Returns:
      The JSON object; it has a `peft_type`, other fields are not checked yet.

    Raises:
      FormatError: missing, too long, not JSON, or without a `peft_type`.
    """
    config = parse_json(path, whole_file.read_bytes(path, MAX_BYTES))
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise FormatError(path, "want a JSON object with the text field 'peft_type'")
    return config


def to_bytes(config: Mapping[str, Json]) -> bytes:
    """The bytes PEFT writes for a config.

    Args:
      config: its fields.

    Returns:
      UTF-8, keys sorted.
    """
    return json.dumps(dict(config), indent=2, sort_keys=True, allow_nan=False).encode()


class Reader:
    """Answers questions about one config; all its regular expressions share one deadline."""

    def __init__(self, source: str | os.PathLike[str], config: Mapping[str, Json], table: Fields):
        self.source, self.config, self.table = source, config, table
        self.deadline = time.monotonic() + SECONDS
        self._check_fields()

    def fields(self, module: str) -> dict[str, Json]:
        """The fields of one module, patterns applied.

        Args:
          module: its dotted name; the part of a fused module has the fields of the whole.

        Returns:
          Field of the table -> value.

        Raises:
          FormatError: a pattern that is not valid, or takes too long.
        """
        module = whole(module)
        values = {k: self.config.get(k, default) for k, default in self.table.fields.items()}
        for field, pattern_field in self.table.patterns.items():
            for pattern, value in (self.config.get(pattern_field) or {}).items():
                if self._match(rf"(.*\.)?({pattern})$", module):
                    values[field] = value
                    break
        if self.table.masks:
            field, suffix = self.table.masks
            values["mask"] = (self.config.get(field) or {}).get(f"{module}.{suffix}")
        return values

    def targets(self, module: str) -> bool:
        """Whether PEFT would adapt a module; 'all-linear' says yes to every one.

        Args:
          module: its dotted name.

        Returns:
          Of a sum of modules: whether it would adapt any of them.

        Raises:
          FormatError: a pattern that is not valid, or takes too long.
        """
        module = whole(module)
        if SUM in module:
            return any(self.targets(one) for one in module.split(SUM))
        get = self.config.get
        wanted, excluded = get("target_modules"), get("exclude_modules")
        if excluded and self._listed(excluded, module):
            return False
        if any(self._match(rf"(^|.*\.){m}($|\..*)", module) for m in get("modules_to_save") or ()):
            return False
        if isinstance(wanted, str):
            return wanted == "all-linear" or self._listed(wanted, module)
        if not wanted or not self._listed(wanted, module):
            return False
        layers = get("layers_to_transform")
        if module in wanted or layers is None or layers == []:
            return True
        layer = self._layer(module)
        return layer is not None and layer in ([layers] if isinstance(layers, int) else layers)

    def saved(self, module: str) -> bool:
        """Whether a module is one of `modules_to_save`, or lies in one.

        Args:
          module: its dotted name.

        Returns:
          False without such a field.

        Raises:
          FormatError: a pattern that is not valid, or takes too long.
        """
        names = self.config.get("modules_to_save") or ()
        return any(self._match(rf"(^|.*\.){name}($|\..*)", module) for name in names)

    def _listed(self, wanted: str | list[str], module: str) -> bool:
        if isinstance(wanted, str):
            return self._match(rf"(?:{wanted})\Z", module)
        return any(module == name or module.endswith(f".{name}") for name in wanted)

    def _layer(self, module: str) -> int | None:
        patterns = self.config.get("layers_pattern") or [r".*?\.[^.]*"]
        whole = not self.config.get("layers_pattern")
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            text = (
                rf"{pattern}\.(?P<idx>\d+)\." if whole else rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
            )
            match = self._search(text, module)
            if match is not None:
                return int(match["idx"][:9])
        return None

    def _match(self, pattern: str, text: str) -> bool:
        return self._search(pattern, text) is not None

    def _search(self, pattern: str, text: str):
        left = self.deadline - time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                re.compile(pattern)  # `regex` accepts more than PEFT's `re` does.
                return regex.match(pattern, text, timeout=max(left, 1e-3))
        except TimeoutError:
            raise FormatError(self.source, f"pattern {pattern[:80]!r} takes too long") from None
        except (re.error, regex.error, Warning, RecursionError, OverflowError) as error:
            raise FormatError(self.source, f"bad pattern {pattern[:80]!r} ({error})") from None

    def _check_fields(self) -> None:
        config, table = self.config, self.table
        if config["peft_type"] != table.type:
            raise FormatError(self.source, f"{config['peft_type']=}, expected {table.type!r}")
        known = {*COMMON, *TARGETS, *IGNORED, *table.fields, *table.free, *table.choose}
        known.update(table.patterns.values())
        for name, value in config.items():
            if name in table.allowed and value not in table.allowed[name]:
                why = f"; {table.reasons[name]}" if name in table.reasons else ""
                text = f"{name} = {repr(value)[:80]}, expected {table.allowed[name]}{why}"
                raise FormatError(self.source, text)
            if name in known:
                continue
            neutral = table.fixed.get(name)
            if value != neutral and not (value is None or value is False or value in ({}, [])):
                raise FormatError(
                    self.source,
                    f"{name} = {repr(value)[:80]} changes the maths and cannot be represented; "
                    f"expected {neutral!r}",
                )
        lost = [name for name in table.needs if name not in config]
        if lost:
            raise FormatError(self.source, f"lacks {lost}, of which PEFT has changed the default")
        for name, default in table.fields.items():
            self._check_value(name, config.get(name, default), default)
        for field, name in table.patterns.items():
            pattern = config.get(name) or {}
            if not isinstance(pattern, dict) or len(pattern) > MAX_PATTERNS:
                raise FormatError(self.source, f"{name}: want at most {MAX_PATTERNS} pairs")
            for key, value in pattern.items():
                self._check_value(f"{name}[{key[:80]!r}]", value, table.fields[field])
        for name in TARGETS:
            self._check_list(name, config.get(name))
        if table.masks:
            masks = config.get(table.masks[0]) or {}
            good = isinstance(masks, dict) and len(masks) <= MAX_PATTERNS
            if not good or not all(_is_mask(m) for m in masks.values()):
                raise FormatError(self.source, f"{table.masks[0]}: want booleans by module")

    def _check_value(self, name: str, value: Json, default: Json) -> None:
        """Booleans, whole numbers (or several), numbers and text, as the default is one."""
        if isinstance(default, bool):
            good = isinstance(value, bool)
        elif isinstance(default, int | float):
            whole = isinstance(default, int) and "alpha" not in name
            good = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            good = good and abs(value) <= 2**31
        elif isinstance(default, tuple):
            good = isinstance(value, list | tuple) and all(type(one) is int for one in value)
        else:
            good = value is None or isinstance(value, str | int | bool)
        if not good:
            raise FormatError(
                self.source, f"{name} = {repr(value)[:80]}, expected e.g. {default!r}"
            )

    def _check_list(self, name: str, value: Json) -> None:
        kind = int if name == "layers_to_transform" else str
        items = value if isinstance(value, list) else [] if value is None else [value]
        if len(items) > MAX_PATTERNS or not all(type(item) is kind for item in items):
            raise FormatError(self.source, f"{name}: want {kind.__name__} or a list of them")


def _is_mask(value: Json) -> bool:
    return isinstance(value, list) and all(type(x) is bool for x in value)


def combine(
    source: str | os.PathLike[str],
    table: Fields,
    modules: Mapping[str, Mapping[str, Json]],
    common: Mapping[str, Json],
    parameters: Collection[str] = (),
) -> dict[str, Json]:
    """The config whose `Reader.fields` gives every module its own fields.

    Args:
      source: named in errors.
      table: the method's fields.
      modules: module name -> its fields; at least one.
      common: values for `COMMON` fields and the like.
      parameters: those of `modules` that are parameters of modules, not targets; () for most
        adapters.

    Returns:
      All fields of the type.

    Raises:
      FormatError: modules differ in a field for which PEFT has no pattern.
    """
    config = {**COMMON, **TARGETS, **table.free, **table.fixed, **table.choose}
    config.update(table.fields)
    config.update({name: {} for name in table.patterns.values()}, **common)
    config = {name: value for name, value in config.items() if name not in table.lacks}
    config.update(peft_type=table.type, target_modules=sorted(set(modules) - set(parameters)))
    for name in table.fields:
        usual = Counter(fields[name] for fields in modules.values()).most_common(1)[0][0]
        config[name] = usual
        others = {module: f[name] for module, f in modules.items() if f[name] != usual}
        if others and name not in table.patterns:
            module, value = next(iter(sorted(others.items())))
            raise FormatError(
                source,
                f"PEFT's {table.type} has one {name} for all modules; got {usual!r} and, at "
                f"{module!r}, {value!r}",
            )
        if others:
            config[table.patterns[name]] = dict(sorted(others.items()))
    reader = Reader(source, config, table)
    for module, fields in modules.items():
        targeted = module in parameters or reader.targets(module)
        if reader.fields(module) != dict(fields) or not targeted:
            raise FormatError(source, f"PEFT's patterns cannot tell {module!r} from other modules")
    return config


def absent(
    reader: Reader, known: Mapping[str, tuple[str, tuple[int, ...]]], present: Collection[str]
) -> list[str]:
    """Modules that the config says are adapted but the file lacks.

    "all-linear" leaves the model's head out, whatever it is called; so there only the modules of
    stacked sites, which no head is, must be present.

    Args:
      reader: of the config.
      known: module -> (site path, stack index), of the whole model.
      present: the modules with tensors.

    Returns:
      Their names, sorted.
    """
    every = reader.config.get("target_modules") == "all-linear"
    return sorted(
        module
        for module, (_, index) in known.items()
        if module not in present and (index or not every) and reader.targets(module)
    )
