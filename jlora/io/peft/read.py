"""PEFT's two files to an adapter: what must be there, what must not, and how slices join."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.adapter import Adapter
from jlora.core.method import Method, rank_of
from jlora.core.site import Site
from jlora.io import safetensors_file
from jlora.io.errors import FormatError, near
from jlora.io.peft import config as peft_config
from jlora.io.peft.table import Arrays, Read, Table
from jlora.io.peft.tables import table_for
from jlora.types import Dynamic, Json

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
) -> tuple[dict[str, Json], Table, Arrays]:
    """Config and tensors of an adapter.

    Args:
      config_path: of `adapter_config.json`.
      weights_path: of `adapter_model.safetensors`.
      tables: tried before the library's.

    Returns:
      (config, the table that reads it, all tensors by key).

    Raises:
      FormatError: a file is missing or damaged, or no table reads it.
    """
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
    """Tensors by what they belong to.

    Args:
      tensors: by key.
      table: of the method; its suffixes tell them apart.

    Returns:
      (module -> suffix -> tensor, tensors that modules share by key, tensors of no method by key).
    """
    every = {suffix for layout in table.layouts for suffix in layout}
    suffixes = sorted(every, key=lambda s: (-len(s), s))  # of two that fit, the longer one
    per_module: dict[str, Arrays] = {}
    shared: Arrays = {}
    rest: Arrays = {}
    for key, tensor in tensors.items():
        if table.copied and _is_copy(key, tensor, table, tensors):
            continue
        suffix = next((s for s in suffixes if key.endswith(f".{s}")), None)
        if suffix is not None and key.startswith(ROOT):
            per_module.setdefault(key[len(ROOT) : -len(suffix) - 1], {})[suffix] = tensor
        elif key.removeprefix(BASE) in table.shared or _family(key) in table.families:
            shared[key.removeprefix(BASE)] = tensor
        else:
            rest[key] = tensor
    return per_module, shared, rest


def _family(key: str) -> str:
    """The first part of a shared tensor's key, below ``base_model.``."""
    return "" if key.startswith(ROOT) else key.removeprefix(BASE).partition(".")[0]


def _is_copy(key: str, tensor: np.ndarray, table: Table, tensors: Arrays) -> bool:
    """Whether it is a shared tensor, the same, under a module."""
    whole = tensors.get(f"{BASE}{key.rpartition('.')[2]}")
    own = key.startswith(ROOT) and key.endswith(tuple(f".{name}" for name in table.shared))
    return own and whole is not None and np.array_equal(tensor, whole)


def check_rest(
    path: Path,
    reader: peft_config.Reader,
    rest: Mapping[str, np.ndarray],
    extras: str,
    modules: Modules,
    sites: Mapping[str, Site],
) -> None:
    """Refuses keys of no adapter, unless the config announces them, or they are of a table or head.

    Announced are biases, `modules_to_save`, and the weight itself of a target: PEFT adds that of a
    table or head. With ``save_embedding_layers`` it also saves those that are not targets, and the
    config does not say so; they are known by the site of their module, or else by the names
    transformers has.

    Args:
      path: of the file, for errors.
      reader: of the config.
      rest: the tensors of no method, by key.
      extras: "refuse" all of them; else announced ones may be there.
      modules: module -> (site path, stack index).
      sites: by path.

    Raises:
      FormatError: a tensor that nothing announces, or any with "refuse".
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
    per_module: dict[str, Arrays],
    shared: Arrays,
    modules: Modules,
    table: Table,
) -> None:
    """Refuses modules that are unknown, not targeted or not whole, and targets without tensors.

    Args:
      path: of the file, for errors.
      reader: of the config.
      per_module: module -> suffix -> tensor.
      shared: tensors that modules share, by key.
      modules: module -> (site path, stack index), of the whole model.
      table: of the method.

    Raises:
      FormatError: names the first module at fault.
    """
    alone = {key for key in shared if _family(key) not in table.families}
    if alone != set(table.shared) or {_family(key) for key in set(shared) - alone} != set(
        table.families
    ):
        wanted = [*table.shared, *(f"{name}.*" for name in table.families)]
        raise FormatError(
            path, f"got shared tensors {sorted(shared)}, expected {wanted} to be saved"
        )
    for module, arrays in per_module.items():
        if module not in modules:
            raise FormatError(
                path,
                f"module {module!r} is not a site of this model and name map; nearest: "
                f"{near(module, modules) or 'none'}",
            )
        if not any(set(arrays) == set(layout) for layout in table.layouts):
            wanted = [list(layout) for layout in table.layouts]
            raise FormatError(path, f"{module!r} has {sorted(arrays)}, expected one of {wanted}")
        if not reader.targets(module):
            raise FormatError(path, f"has tensors of {module!r}, which the config does not target")
    if table.masks:
        field, suffix = table.masks
        strange = set(reader.config.get(field) or ()) - {
            f"{module}.{suffix}" for module in per_module
        }
        if strange:
            raise FormatError(path, f"{field}: no tensors of {sorted(strange)[:4]}")
    lacking = peft_config.absent(reader, modules, per_module)
    if lacking:
        raise FormatError(path, f"lacks tensors of the targets {lacking[:4]}")


def check_bias(
    path: Path, table: Table, method: Method, where: str, biases: Collection[str] | None
) -> None:
    """Refuses a method that in PEFT scales the bias as well, unless its site is known to have none.

    Args:
      path: of the file, for errors.
      table: of the method.
      method: of the site.
      where: path of the site.
      biases: paths of sites with a bias next to them; None: unknown.

    Raises:
      FormatError: there is a bias, or nobody knows.
    """
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
    """The adapter of all slices read.

    Args:
      path: of the file, for errors.
      table: of the method.
      sites: by path.
      slices: site path -> stack index -> what was read.
      shared: tensors that modules share, by key.

    Returns:
      The adapter, sites sorted by path.

    Raises:
      FormatError: slices of a site that do not fit each other, or shared tensors of wrong shapes.
    """
    trainable: dict[str, Json] = {}
    frozen: dict[str, Json] = {}
    done = []
    group = ""
    if table.shared or table.families:
        try:
            common = table.read_shared(shared)
        except ValueError as error:
            raise FormatError(path, str(error)) from error
        if common:
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
    """Slices of one site as one stack.

    Args:
      path: of the file, for errors.
      site: with its stack axes.
      slices: stack index -> what was read; smaller ranks are padded with zeros.
      sparse: whether absent layers are zeros, which not every method allows.

    Returns:
      (method, trainable, frozen), arrays [*stack, ...].

    Raises:
      FormatError: absent layers of another method, slices of different forms, or 64-bit arrays
        while
        JAX has none.
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
        shape: list[Dynamic] = list(array.shape)
        if name in rank_axes:
            shape[rank_axes[name]] = "r"
        form[name] = f"{array.dtype}{shape}"
    return form


def _device(path: Path, name: str, array: np.ndarray) -> jax.Array:
    if array.dtype.itemsize == 8 and not jax.config.read("jax_enable_x64"):
        raise FormatError(path, f"{name} is {array.dtype}; needs jax_enable_x64")
    return jnp.asarray(array)


def _fields(site: Site) -> dict[str, Json]:
    return {key: getattr(site, key) for key in ("path", "shape", "kinds", "dtype", "ops", "flops")}
