"""PEFT's two files to an adapter: what must be there, what must not, and how slices join."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.adapter import Adapter
from jlora.core.method import Method, rank_of
from jlora.core.site import Site
from jlora.io import safetensors_file
from jlora.io.errors import FormatError
from jlora.io.names import near
from jlora.io.peft import config as peft_config
from jlora.io.peft.table import Arrays, Read, Table
from jlora.io.peft.tables import table_for

BASE = "base_model."
ROOT = "base_model.model."
OWN = ".base_layer.weight"
# What transformers calls input and output embeddings (`_input_embed_layer`, output heads).
EMBEDDINGS = frozenset(
    "embed_tokens embed_in embed_out lm_head wte word_embeddings word_embedding shared "
    "tok_embeddings token_embedding output_projection".split()
)
GROUP = "*0"  # key of the arrays that all sites share; one method, so one group
Modules = Mapping[str, tuple[str, tuple[int, ...]]]


def read_files(
    config_path: Path, weights_path: Path, tables: Sequence[Table]
) -> tuple[dict[str, Any], Table, Arrays]:
    """The config, the table that reads it, and all tensors."""
    config = peft_config.read(config_path)
    try:
        table = table_for(config, tables)
    except ValueError as error:
        raise FormatError(config_path, str(error)) from error
    if not weights_path.exists():
        old = sorted(p.name for p in weights_path.parent.glob("adapter_model.*"))[:4]
        raise FormatError(weights_path, f"missing; got {old} (pickles are never opened)")
    return config, table, safetensors_file.read(weights_path)[0]


def by_module(tensors: Arrays, table: Table) -> tuple[dict[str, Arrays], Arrays, Arrays]:
    """(module -> suffix -> tensor, tensors that modules share, tensors of no method)."""
    suffixes = {suffix for layout in table.layouts for suffix in layout}
    mine: dict[str, Arrays] = {}
    shared: Arrays = {}
    rest: Arrays = {}
    for key, tensor in tensors.items():
        if table.copied and _is_copy(key, tensor, table, tensors):
            continue
        suffix = next((s for s in suffixes if key.endswith(f".{s}")), None)
        if suffix is not None and key.startswith(ROOT):
            mine.setdefault(key[len(ROOT) : -len(suffix) - 1], {})[suffix] = tensor
        elif key.removeprefix(BASE) in table.shared:
            shared[key.removeprefix(BASE)] = tensor
        else:
            rest[key] = tensor
    return mine, shared, rest


def _is_copy(key: str, tensor: np.ndarray, table: Table, tensors: Arrays) -> bool:
    """Whether it is a shared tensor, the same, under a module."""
    whole = tensors.get(f"{BASE}{key.rpartition('.')[2]}")
    own = key.startswith(ROOT) and key.endswith(tuple(f".{name}" for name in table.shared))
    return own and whole is not None and np.array_equal(tensor, whole)


def regrown(
    reader: peft_config.Reader,
    table: Table,
    mine: Mapping[str, Arrays],
    modules: Modules,
    sites: Mapping[str, Site],
) -> Arrays:
    """Shared tensors of which the file has only a seed; none where something else is wrong."""
    whole = all(any(set(t) == set(layout) for layout in table.layouts) for t in mine.values())
    if table.regrow is None or not mine or not whole or not set(mine) <= set(modules):
        return {}
    known = [(sites[modules[module][0]].slice(), tensors) for module, tensors in mine.items()]
    return table.regrow(reader.config, known) or {}


def check_rest(
    path: Path,
    reader: peft_config.Reader,
    rest: Mapping[str, np.ndarray],
    extras: str,
    modules: Modules,
    sites: Mapping[str, Site],
) -> None:
    """Keys that are no adapter must be what the config announces, or a table or head.

    Biases, `modules_to_save`, or the weight itself of a target: PEFT adds that of a table or head.
    With ``save_embedding_layers`` it also saves those that are no targets, and the config does not
    say so; they are known by the site of their module, or else by the names transformers has.
    """
    for key, tensor in rest.items():
        name = key.removeprefix(ROOT)
        module, _, leaf = name.rpartition(".")
        bias = reader.config.get("bias", "none") != "none" and leaf == "bias"
        own = name.endswith(OWN) and reader.targets(name.removesuffix(OWN))
        where = modules[module][0] if module in modules else None
        table = where is not None and "gather" in sites[where].ops
        table = table or module.rpartition(".")[2] in EMBEDDINGS
        saved = table and tensor.ndim == (2 if leaf == "weight" else 1 if leaf == "bias" else 0)
        announced = bias or own or saved or reader.saved(module)
        if not key.startswith(ROOT) or not announced:
            raise FormatError(
                path,
                f"surplus tensor {key!r}, expected tensors of a {reader.table.type} adapter and "
                "what bias, modules_to_save and target_modules announce",
            )
    if rest and extras == "refuse":
        raise FormatError(
            path,
            f"replaces weights of the base model: {sorted(rest)[:4]}; load them with peft_extras "
            "and pass extras='leave', or extras='adapt' for biases and norms of the name map",
        )


def check_modules(
    path: Path,
    reader: peft_config.Reader,
    mine: dict[str, Arrays],
    shared: Arrays,
    modules: Modules,
    table: Table,
) -> None:
    """Every module is known, targeted and whole, and none that is targeted lacks."""
    if set(shared) != set(table.shared):
        raise FormatError(
            path, f"got shared tensors {sorted(shared)}, expected {list(table.shared)} to be saved"
        )
    for module, found in mine.items():
        if module not in modules:
            raise FormatError(
                path,
                f"module {module!r} is no site of this model and name map; nearest: "
                f"{near(module, modules) or 'none'}",
            )
        if not any(set(found) == set(layout) for layout in table.layouts):
            wanted = [list(layout) for layout in table.layouts]
            raise FormatError(path, f"{module!r} has {sorted(found)}, expected one of {wanted}")
        if not reader.targets(module):
            raise FormatError(path, f"has tensors of {module!r}, which the config does not target")
    if table.masks:
        field, suffix = table.masks
        strange = set(reader.config.get(field) or ()) - {f"{module}.{suffix}" for module in mine}
        if strange:
            raise FormatError(path, f"{field}: no tensors of {sorted(strange)[:4]}")
    lacking = peft_config.absent(reader, modules, mine)
    if lacking:
        raise FormatError(path, f"lacks tensors of the targets {lacking[:4]}")


def check_bias(
    path: Path, table: Table, method: Method, where: str, biases: Collection[str] | None
) -> None:
    """A method that in PEFT scales the bias as well needs a site that is known to have none."""
    if not table.biased(method):
        return
    if biases is None:
        raise FormatError(
            path, f"PEFT's {table.type} scales biases; pass params, to see that {where} has none"
        )
    if where in biases:
        raise FormatError(path, f"{where}: PEFT's {table.type} scales its bias too, ours does not")


def join(
    path: Path,
    table: Table,
    sites: Mapping[str, Site],
    slices: Mapping[str, Mapping[tuple[int, ...], Read]],
    shared: Arrays,
) -> Adapter:
    """The adapter of all slices read."""
    trainable: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    done = []
    group = ""
    if table.shared:
        try:
            common = table.read_shared(shared)
        except ValueError as error:
            raise FormatError(path, str(error)) from error
        group, part = GROUP, trainable if table.trains_shared else frozen
        part[GROUP] = {k: _device(path, k, v) for k, v in common.items()}
    for where in sorted(slices):
        site = Site(**{**_fields(sites[where]), "group": group})
        method, trainable[where], frozen[where] = stacked(path, site, slices[where], table.sparse)
        done.append((site, method))
    return Adapter(trainable, frozen, tuple(done))


def stacked(
    path: Path, site: Site, slices: Mapping[tuple[int, ...], Read], sparse: bool
) -> tuple[Method, dict[str, jax.Array], dict[str, jax.Array]]:
    """Slices of one site as (method, trainable, frozen) with leading stack axes.

    Layers that lack are zeros where the method allows it (`sparse`); smaller ranks are padded.
    """
    top = max(slices.values(), key=lambda read: rank_of(read.method))
    if len(slices) < np.prod(site.stack, dtype=int) and not sparse:
        raise FormatError(
            path,
            f"{site.path}: only {sorted(slices)} of the stack {site.stack} are adapted, which "
            f"{type(top.method).__name__} cannot be on a stacked site; unroll the layers",
        )
    parts = []
    for kind in ("trainable", "frozen"):
        like: Arrays = getattr(top, kind)
        whole = {k: np.zeros((*site.stack, *v.shape), v.dtype) for k, v in like.items()}
        for index, read in slices.items():
            got = getattr(read, kind)
            axes = top.method.rank_axes
            if _form(got, axes) != _form(like, axes):
                raise FormatError(
                    path,
                    f"{site.path}{list(index)}: {_form(got, axes)}, other layers have "
                    f"{_form(like, axes)}",
                )
            for name, array in got.items():
                whole[name][(*index, *(slice(0, n) for n in array.shape))] = array
        parts.append({name: _device(path, name, array) for name, array in whole.items()})
    return top.method, parts[0], parts[1]


def _form(arrays: Arrays, rank_axes: Mapping[str, int]) -> dict[str, str]:
    """Names, dtypes and shapes, the rank left open."""
    form = {}
    for name, array in arrays.items():
        shape: list[Any] = list(array.shape)
        if name in rank_axes:
            shape[rank_axes[name]] = "r"
        form[name] = f"{array.dtype}{shape}"
    return form


def _device(path: Path, name: str, array: np.ndarray) -> jax.Array:
    if array.dtype.itemsize == 8 and not jax.config.read("jax_enable_x64"):
        raise FormatError(path, f"{name} is {array.dtype}; needs jax_enable_x64")
    return jnp.asarray(array)


def _fields(site: Site) -> dict[str, Any]:
    return {key: getattr(site, key) for key in ("path", "shape", "kinds", "dtype", "ops", "flops")}
