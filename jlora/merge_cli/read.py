"""Adapters from files on the sites of one base, and what of them needs the base's weights.

Source: our reading.
Deviates: nothing.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import io
from jlora.core.adapter import Adapter, Method, Site, unfold
from jlora.io import NameMap, safetensors_file
from jlora.io.peft import CONFIG, WEIGHTS
from jlora.merge_cli.base import Base
from jlora.merge_cli.config import Config, ConfigError
from jlora.merging.convert import factored, to_lora

FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")


def adapters(config: Config, base: Base | None) -> list[Adapter]:
    """The adapters of a configuration, in its order, each with a factored delta.

    PEFT directories are read on the sites of the Orbax checkpoints if there are some, else on those
    of the base, else on the shapes of their own LoRA factors.

    Raises ConfigError or FormatError: a path without an adapter, a file that is not understood, a
    method that needs the base where none is given.
    """
    paths = [m.path for m in config.models]
    for k, path in enumerate(paths):
        if not path.is_dir():
            raise ConfigError(f"models[{k}].model: {path} is no directory")
    found = {p: io.restore_adapter(p) for p in dict.fromkeys(paths) if not is_peft(p)}
    sites: dict[str, Site] = {}
    for a in found.values():
        sites |= {s.path: dataclasses.replace(s, group="") for s, _ in a.sites}
    where: Any = list(sites.values())
    if not found and base:
        where = base.params()
    elif not found:
        for p in dict.fromkeys(paths):
            sites = _joined(sites, inferred(p, config.names), p)
        where = list(sites.values())
    for path in dict.fromkeys(paths):
        if is_peft(path):
            found[path] = io.load_peft(path, config.names, where, extras="refuse")
    ready = {path: closed(a, base, config.names, path) for path, a in found.items()}
    return [ready[p] for p in paths]


def is_peft(path: Path) -> bool:
    """Whether a directory is PEFT's."""
    return (path / CONFIG).is_file()


def inferred(path: Path, names: NameMap) -> dict[str, Site]:
    """The sites of a PEFT LoRA, by the shapes of its factors; float32."""
    tensors, _ = safetensors_file.read(path / WEIGHTS)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, array in tensors.items():
        match = FACTOR.fullmatch(name)
        if match and array.ndim == 2:
            shapes.setdefault(match[1].removeprefix(names.prefix), {})[match[2]] = array.shape
    whole = {m: f for m, f in shapes.items() if len(f) == 2}
    if not whole:
        raise ConfigError(f"base_model: {path} is no plain LoRA; a base is needed to read it")
    sites = [
        Site(f"{m}/kernel", (f["A"][1], f["B"][0]), "io", jnp.dtype(jnp.float32), ("dot",))
        for m, f in whole.items()
    ]
    return {site.path: site for site in sites}


def closed(adapter: Adapter, base: Base | None, names: NameMap, where: Path) -> Adapter:
    """The adapter; sites whose delta depends on the weight are made LoRA, exactly, one by one."""
    trainable, frozen = dict(adapter.trainable), dict(adapter.frozen)
    rows: list[tuple[Site, Method]] = []
    for site, method in adapter.sites:
        if factored(adapter, site, method):
            rows.append((site, method))
            continue
        if base is None:
            name = type(method).__name__
            raise ConfigError(f"base_model: {where}: {site.path}: {name} needs the base's weights")
        keys = (site.path, site.group)
        own = {key: adapter.trainable[key] for key in keys if key in adapter.trainable}
        held = {key: adapter.frozen[key] for key in keys if key in adapter.frozen}
        weight = unfolded(base.kernel(site, names), site)
        made = to_lora(Adapter(own, held, ((site, method),)), {site.path: weight}).adapter
        trainable[site.path], frozen[site.path] = made.trainable[site.path], made.frozen[site.path]
        rows.append(made.sites[0])
    kept = {key for site, _ in rows for key in (site.path, site.group)}
    return Adapter(
        {p: t for p, t in trainable.items() if p in kept},
        {p: t for p, t in frozen.items() if p in kept},
        tuple(rows),
    )


def unfolded(kernel: np.ndarray, site: Site) -> jnp.ndarray:
    """[*stack, in, out] in the layout of the leaf."""
    return unfold(jnp.asarray(kernel), site.kinds, site.shape)


def _joined(a: Mapping[str, Site], b: Mapping[str, Site], path: Path) -> dict[str, Site]:
    for name in a.keys() & b.keys():
        if a[name] != b[name]:
            got, expected = b[name].shape, a[name].shape
            raise ConfigError(f"{path}: {name}: got {got}, expected {expected}: other bases")
    return {**a, **b}
