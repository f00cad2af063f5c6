"""`jlora inspect ADAPTER --check-names TREE --names MAP`: what matches nothing, and what is near.

A name map ties three lists together: the leaves of a parameter tree, its own rules, and the modules
of an adapter's file. What is in one list and leads nowhere in the next is listed:

    modules of the file without a leaf    they would be refused by the reader
    modules whose shapes differ           d_in or d_out of the factors, against those of the leaf
    rules without a leaf                  a pattern that is misspelt, or a part the model lacks
    leaves without a rule                 matrices that no adapter could be read for
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jlora.cli import files
from jlora.core.lift import path_string
from jlora.core.site import Site
from jlora.io import FormatError, NameMap
from jlora.io.errors import near
from jlora.io.json_file import read_json
from jlora.io.model_sites import model_sites
from jlora.io.peft.directory import WEIGHTS
from jlora.io.peft.read import ROOT
from jlora.io.safetensors_file import header
from jlora.types import Dynamic

ENDS = re.compile(
    r"(.+?)\.(lora_[AB]\.weight|lora_(?:down|up)\.weight|lora_embedding_[AB]|lora_E|[a-z0-9_]+)"
)
FIRST = ("lora_A.weight", "lora_down.weight")  # [r, in]
SECOND = ("lora_B.weight", "lora_up.weight")  # [out, r]
PLAIN = re.compile(r"[^\w/]+")  # what paths do not have
MOST = 40  # lines of each list
Leaves = Mapping[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Found:
    """What the three lists say of each other."""

    modules: int  # of the file
    lost: tuple[str, ...]  # modules without a leaf
    differ: tuple[str, ...]  # modules of other shapes, and leaves that do not fit their rule
    unused: tuple[str, ...]  # rules without a leaf
    unnamed: tuple[str, ...]  # matrices without a rule

    @property
    def good(self) -> bool:
        """Whether the file can be read for the tree."""
        return not self.lost and not self.differ

    def text(self) -> str:
        """Returns a paragraph per list, and a summary."""
        parts = []
        for title in ("lost", "differ", "unused", "unnamed"):
            lines = getattr(self, title)
            if lines:
                left = [f"  and {len(lines) - MOST} more"] if len(lines) > MOST else []
                parts.append("\n".join([TITLES[title], *(f"  {x}" for x in lines[:MOST]), *left]))
        parts.append(
            f"{self.modules - len(self.lost)} of {self.modules} modules of the file have a leaf; "
            f"{len(self.differ)} differ; {len(self.unused)} rules and {len(self.unnamed)} matrices "
            "match nothing"
        )
        return "\n\n".join(parts)


TITLES = {
    "lost": "modules of the file without a leaf:",
    "differ": "other shapes:",
    "unused": "rules that match no leaf:",
    "unnamed": "matrices without a rule:",
}


def tree_of(path: Path) -> Leaves:
    """The leaves of a parameter tree in a file.

    Args:
      path: a safetensors file; an Orbax checkpoint; or a JSON file ``{path: [dtype, *shape]}``,
        also under the key ``tree``.

    Returns:
      Path -> shape; the dtype is always float32, as only shapes are compared.

    Raises:
      FormatError: none of these.
    """
    if path.is_dir():
        return _orbax(path)
    if not path.is_file():
        raise FormatError(path, "no such file or directory")
    if path.suffix != ".json":
        dtype = jnp.dtype("float32")  # only shapes are compared
        return {k: jax.ShapeDtypeStruct(shape, dtype) for k, (shape, _) in header(path).items()}
    data = read_json(path)
    data = data.get("tree", data)
    if not isinstance(data, dict):
        raise FormatError(path, f"got {type(data).__name__}, expected {{path: [dtype, *shape]}}")
    tree = {}
    for key, row in data.items():
        sizes = row[1:] if isinstance(row, list) and row else [None]
        if not isinstance(row[0] if row else None, str) or not all(
            type(n) is int and n >= 0 for n in sizes
        ):
            raise FormatError(path, f"{key}: got {str(row)[:80]}, expected [dtype, *shape]")
        tree[key] = jax.ShapeDtypeStruct(tuple(sizes), jnp.dtype("float32"))
    return tree


def _orbax(path: Path) -> Leaves:
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            metadata: Dynamic = checkpointer.metadata(path.absolute())
        metadata = getattr(metadata, "item_metadata", metadata)
        metadata = getattr(metadata, "tree", metadata)
        leaves = jax.tree_util.tree_flatten_with_path(
            metadata, is_leaf=lambda x: hasattr(x, "shape") and hasattr(x, "dtype")
        )[0]
        tree = {
            path_string(keys): jax.ShapeDtypeStruct(tuple(leaf.shape), jnp.float32)
            for keys, leaf in leaves
            if hasattr(leaf, "shape")
        }
    except Exception as error:  # Orbax raises whatever its layers do
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FormatError(path, f"no Orbax checkpoint of a tree: {first[:200]}") from error
    if not tree:
        inside = sorted(p.name for p in path.iterdir() if p.is_dir())[:6]
        raise FormatError(path, f"got no arrays, expected a tree's checkpoint; folders: {inside}")
    return tree


def modules_of(path: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """The modules of an adapter's file, by the file's own names.

    Args:
      path: of an adapter in any format but Orbax and GGUF.

    Returns:
      Module -> suffix -> shape.

    Raises:
      FormatError: not an adapter, or of another format.
    """
    if (kind := files.detect(path)) in ("orbax", "gguf"):
        raise FormatError(path, f"got {kind}, expected a format with the names of torch modules")
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, (shape, _) in header(path / WEIGHTS if path.is_dir() else path).items():
        match = ENDS.fullmatch(key.removeprefix(ROOT))
        if match is not None and match[2] != "alpha":
            modules.setdefault(match[1], {})[match[2]] = tuple(shape)
    return modules


def check(path: Path, tree: Leaves, names: NameMap, start: str = "") -> Found:
    """Compares the leaves of a tree, the rules of a name map and the modules of a file.

    Args:
      path: the adapter.
      tree: the leaves.
      names: the map.
      start: the module prefix of a kohya file, or the component of a diffusers file; "" for others.

    Returns:
      What of each list leads nowhere.

    Raises:
      FormatError: the file is not an adapter.
      ValueError: two slices of the tree get one name.
    """
    sites, differ = [], []
    for leaf in tree:
        try:
            sites += model_sites({leaf: tree[leaf]}, names).sites.values()
        except ValueError as error:
            differ.append(str(error))
    known: dict[str, Site] = {}
    for name, (where, _) in names.table(sites).items():
        known[_spelt(name, path, start)] = next(s for s in sites if s.path == where).slice()
    modules = modules_of(path)
    lost = [f"{m}; nearest: {near(m, known)}" for m in modules if m not in known]
    for module, shapes in modules.items():
        if module in known:
            differ += _differences(module, shapes, known[module])
    matched = [names.find(leaf) for leaf in tree]
    used = {m.order for m in matched if m is not None}
    unused = [
        f"{pattern}; nearest: {near(PLAIN.sub('', pattern), tree)}"
        for order, pattern in enumerate(names.rules)
        if order not in used
    ]
    unnamed = [
        f"{leaf} {tuple(tree[leaf].shape)}; nearest: {near(leaf, names.rules)}"
        for leaf, match in zip(tree, matched, strict=True)
        if match is None and len(tree[leaf].shape) > 1
    ]
    return Found(len(modules), tuple(lost), tuple(differ), tuple(unused), tuple(unnamed))


def _spelt(name: str, path: Path, start: str) -> str:
    """A module's name as the file's format has it."""
    kind = files.detect(path)
    if kind == "kohya":
        return f"{start}_{name.replace('.', '_')}"
    return f"{start}.{name}" if kind == "diffusers" and start else name


def _differences(module: str, shapes: Mapping[str, tuple[int, ...]], site: Site) -> list[str]:
    """What the factors of LoRA say against the leaf, of matrices."""
    if "gather" in site.ops:
        return []
    lines = []
    for what, keys, axis, want in (
        ("inputs", FIRST, 1, site.d_in),
        ("outputs", SECOND, 0, site.d_out),
    ):
        for key in keys:
            shape = shapes.get(key, ())
            if len(shape) == 2 and shape[axis] != want:
                lines.append(
                    f"{module}: {key} has {shape[axis]} {what}, {site.path} {site.kinds!r} "
                    f"{site.shape} has {want}"
                )
    return lines
