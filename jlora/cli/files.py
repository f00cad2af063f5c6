"""Adapter files of any format, for commands: which format it is, reading, writing.

Six formats: ``peft`` (a directory), ``orbax`` (a checkpoint directory of an adapter or a bank),
``kohya`` and ``diffusers`` (one safetensors file each), ``gguf`` (one file for llama.cpp),
``leaves`` (parameters of a JAX package that hold its own LoRA: a checkpoint or a safetensors file).
Reading an adapter needs the sites of its model. They come from, in this order: an adapter or a tree
of parameters that has them (`like`), the Hugging Face directory of the base model, or the shapes of
the LoRA factors in the file itself.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jlora import io
from jlora.cli import leaves
from jlora.cli.merge import documents
from jlora.cli.merge import read as merge_read
from jlora.cli.merge.base import Base
from jlora.cli.merge.config import NAMES, PLAIN
from jlora.cli.merge.layout import site_of
from jlora.core.adapter import Adapter
from jlora.core.site import Site
from jlora.io import FormatError, GgufBase, NameMap
from jlora.io.gguf.base import TABLE, modules, tensor_names
from jlora.io.gguf.files import shapes
from jlora.io.gguf.reader import is_gguf
from jlora.io.lora_leaves import PACKAGES, is_leaf
from jlora.io.peft import config as peft_config
from jlora.io.peft.directory import CONFIG
from jlora.io.safetensors_file import header
from jlora.types import Dynamic

Format = Literal["peft", "orbax", "kohya", "diffusers", "gguf", "leaves"]
FORMATS: tuple[Format, ...] = get_args(Format)
PREFIXES = (
    "lora_unet",
    "lora_te1",
    "lora_te2",
    "lora_te3",
    "lora_te",
    "lora_transformer",
    "lycoris",
)
KOHYA_DOWN, KOHYA_UP = ".lora_down.weight", ".lora_up.weight"
DIFFUSERS_DOWN, DIFFUSERS_UP = ".lora_A.weight", ".lora_B.weight"


def detect(path: Path) -> Format:
    """The format of an adapter.

    Args:
      path: a directory or a safetensors file.

    Returns:
      Its name.

    Raises:
      FormatError: there is nothing, or nothing that is known.
    """
    if path.is_dir():
        if (path / CONFIG).is_file():
            return "peft"
        return "leaves" if leaves.is_tree(path) else "orbax"
    if not path.is_file():
        raise FormatError(path, "no such file or directory")
    if is_gguf(path):
        return "gguf"
    keys = list(header(path))
    if any("/" in key and is_leaf(key) for key in keys):
        return "leaves"
    if any(key.endswith((KOHYA_DOWN, ".hada_w1_a", ".lokr_w1", ".lokr_w1_a")) for key in keys):
        return "kohya"
    if any(key.endswith(DIFFUSERS_DOWN) for key in keys):
        return "diffusers"
    raise FormatError(path, f"got keys like {keys[:3]}, expected a kohya or diffusers file")


def start_of(path: Path, kind: Format, given: str | None) -> str:
    """The prefix of a kohya file's modules, or the component of a diffusers file.

    Args:
      path: the file.
      kind: its format.
      given: what the user wants, or None: the only one in the file.

    Returns:
      The prefix or component; "" for formats without one.

    Raises:
      FormatError: nothing is given and the file holds several, which are named.
    """
    if given is not None or kind in ("peft", "orbax", "gguf", "leaves"):
        return given or ""
    heads = [name.partition(".")[0] for name in header(path)]
    if kind == "kohya":
        present = {next((p for p in PREFIXES if h.startswith(f"{p}_")), h) for h in heads}
        flag = "--prefix"
    else:
        present, flag = set(heads), "--component"
    if len(present) != 1:
        raise FormatError(path, f"holds {sorted(present)[:6]}: choose one with {flag}")
    return present.pop()


def names_of(value: str | None, prefix: str = "") -> NameMap:
    """A name map by the word of a command line.

    Args:
      value: the name of a built-in map; a JSON or YAML file ``{pattern: template, ...}``, or of
        ``pattern: [template, kinds]``; or None: sites are called as the torch modules.
      prefix: put before every module name.

    Returns:
      The map from paths of sites to torch modules.

    Raises:
      FormatError: the file is no name map.
      ConfigError: it is no YAML.
      ValueError: neither a built-in map nor a file.
    """
    if value is None:
        return PLAIN.replace(prefix=prefix)
    if value in NAMES:
        named = NAMES[value]()
        return named.replace(prefix=prefix + named.prefix)
    path = Path(value)
    if not path.is_file():
        raise ValueError(f"names: got {value!r}, expected a file or one of {', '.join(NAMES)}")
    rules = documents.read(path)
    try:
        return NameMap(rules, prefix)
    except ValueError as error:
        raise FormatError(path, str(error)) from error


def inferred(path: Path, kind: Format, start: str) -> list[Site]:
    """The sites of a kohya or diffusers file, by the shapes of its LoRA factors; float32.

    Args:
      path: the file.
      kind: its format.
      start: the kohya prefix with its underscore, or the diffusers component with its dot.

    Returns:
      One site per module.

    Raises:
      FormatError: no LoRA factors below `start`.
    """
    down, up = (KOHYA_DOWN, KOHYA_UP) if kind == "kohya" else (DIFFUSERS_DOWN, DIFFUSERS_UP)
    shapes = {name: shape for name, (shape, _) in header(path).items()}
    sites = []
    for name, shape in shapes.items():
        if name.endswith(down) and name.startswith(start):
            module = name.removesuffix(down)
            first, second = shape, shapes.get(module + up)
            if second:
                full = (second[0], *first[1:])
                sites.append(site_of(module.removeprefix(start), full, jnp.dtype("float32")))
    if not sites:
        raise FormatError(path, f"no LoRA factors of {start!r}; a base model (--base) is needed")
    return sites


def inferred_gguf(path: Path, names: NameMap, base: GgufBase | None) -> list[Site]:
    """The sites of a llama.cpp adapter, by the shapes of its factors; float32.

    Args:
      path: the file.
      names: from the paths of the sites to torch modules.
      base: of the adapter; None: sites are called as llama.cpp calls them.

    Returns:
      One site per module.

    Raises:
      FormatError: not such a file.
    """
    there = (
        {name: module for module, name in tensor_names(path, base, modules(base)).items()}
        if base
        else {}
    )
    prefix = names.prefix
    return [
        site_of(
            there.get(name, name).removeprefix(prefix), shape, jnp.dtype("float32"), name == TABLE
        )
        for name, shape in shapes(path).items()
    ]


def read(
    path: Path,
    kind: Format,
    names: NameMap,
    *,
    base: Base | None = None,
    like: Adapter | Mapping[str, jax.ShapeDtypeStruct] | None = None,
    start: str = "",
    gguf: GgufBase | None = None,
    alpha: float | None = None,
) -> tuple[Adapter, dict[str, np.ndarray]]:
    """An adapter, and the weights of the base model that its file brings along.

    Args:
      path: the file or directory.
      kind: its format.
      names: from the paths of the sites to torch modules; not used for Orbax.
      base: the base model, whose modules are the sites.
      like: an adapter whose sites are those of the model, or the forms of its parameters by path.
      start: the module prefix of a kohya file, or the component of a diffusers file.
      gguf: the base of a llama.cpp file; None: its modules keep llama.cpp's names.
      alpha: of qwix's rule, for leaves; None for everything else.

    Returns:
      the adapter, and ``{"classifier.weight": [out, in], ...}`` (PEFT's extras; empty for most).

    Raises:
      FormatError: whatever is not understood, with the path.
    """
    if kind == "orbax":
        return io.restore_adapter(path), {}
    if kind == "leaves":
        if isinstance(like, Adapter):
            shapes = {s.path: jax.ShapeDtypeStruct(s.shape, s.dtype) for s, _ in like.sites}
        else:
            shapes = like or {}
        return leaves.read(path, names, alpha, shapes), {}
    if like is not None:
        where: Dynamic = [s for s, _ in like.sites] if isinstance(like, Adapter) else like
    elif base is not None:
        where = base.params()
    elif kind == "gguf":
        where = inferred_gguf(path, names, gguf)
    elif kind == "peft":
        where = list(merge_read.inferred(path, merge_read.factors(path, names)).values())
    else:
        where = inferred(path, kind, start and start + ("_" if kind == "kohya" else "."))
    if kind == "peft":
        adapter = io.load_peft(path, names, where, extras="leave")
        return adapter, io.peft_extras(path)
    if kind == "gguf":
        return io.load_gguf(path, names, where, gguf), {}
    if kind == "kohya":
        return io.load_kohya(path, names, where, start, others="leave"), {}
    return io.load_diffusers(path, names, where, start, others="leave"), {}


def write(
    path: Path,
    kind: Format,
    adapter: Adapter,
    names: NameMap,
    *,
    extras: Mapping[str, np.ndarray],
    start: str = "",
    base_model_name: str | None = None,
    task_type: str | None = None,
    gguf: GgufBase | None = None,
    package: str | None = None,
) -> None:
    """Writes an adapter.

    Args are those of `read`.

    Args:
      adapter: the adapter.
      extras: weights of the base model that are written along, by torch name; PEFT only.
      base_model_name: what a PEFT directory names as its base; None: nothing.
      task_type: PEFT's task; None: none.
      gguf: the base, which a llama.cpp file needs.
      package: whose leaves are written, for that format.

    Raises:
      FormatError: the format has no words for what the adapter is, or for `extras`.
    """
    if extras and kind != "peft":
        raise FormatError(path, f"{kind} has no place for the base's {sorted(extras)[:3]}")
    if kind == "peft":
        io.save_peft(path, adapter, names, base_model_name, task_type, extras=extras or None)
    elif kind == "orbax":
        io.save_adapter(path, adapter)
    elif kind == "kohya":
        io.save_kohya(path, adapter, names, start)
    elif kind == "leaves":
        if package is None:
            raise FormatError(path, f"whose leaves? expected a package: {PACKAGES}")
        leaves.write(path, adapter, package)
    elif kind == "gguf":
        if gguf is None:
            raise FormatError(path, "llama.cpp's names depend on the base model: it is required")
        io.save_gguf(path, adapter, names, gguf)
    else:
        io.save_diffusers(path, adapter, names, start)


@contextlib.contextmanager
def whole_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """A path to write a file to, which becomes `path` at the end; nothing is left of a failure.

    Args:
      path: the target.
      overwrite: whether a file that is there may be replaced.

    Returns:
      The path to write to.

    Raises:
      FormatError: something is there that may not be replaced: without `overwrite` anything, else a
        folder or a link.
    """
    if os.path.lexists(path):
        if not overwrite:
            raise FormatError(path, "exists already; --overwrite replaces it")
        if path.is_symlink() or not path.is_file():
            raise FormatError(path, "got a folder or a link, expected a file to replace")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.partial")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def base_name(path: Path) -> tuple[str | None, str | None]:
    """What a PEFT directory says of its base.

    Args:
      path: of an adapter of any format.

    Returns:
      (base model, task type); (None, None) for other formats.
    """
    file = path / CONFIG
    if not file.is_file():
        return None, None
    config = peft_config.read(file)
    return config.get("base_model_name_or_path"), config.get("task_type")
