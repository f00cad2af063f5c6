"""Adapters from files on the sites of one base, and what of them needs the base's weights.

Deviates: nothing.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jlora import io
from jlora.cli.merge.base import Base
from jlora.cli.merge.config import Config, ConfigError
from jlora.cli.merge.layout import site_of
from jlora.core.adapter import Adapter
from jlora.core.method import Method
from jlora.core.site import Site, unfold
from jlora.io import FormatError, NameMap, safetensors_file
from jlora.io.peft import config as peft_config
from jlora.io.peft.directory import CONFIG, WEIGHTS
from jlora.io.peft.tables import table_for
from jlora.io.peft.vera_oft_ia3 import LN_TUNING
from jlora.merging.convert import factored, to_lora
from jlora.types import Dynamic, Tree

FIRST, SECOND = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")
ROWS = "token_adapter.trainable_tokens_delta"
FACTOR = re.compile(
    rf"base_model\.model\.(.+)\.({'|'.join(map(re.escape, (*FIRST, *SECOND, ROWS)))})"
)
Shapes = dict[str, dict[str, tuple[int, ...]]]  # module -> suffix of the key -> shape


def adapters(config: Config, base: Base | None) -> list[Adapter]:
    """The adapters of a configuration, each with a factored delta.

    PEFT directories are read on the sites of the Orbax checkpoints if there are some, else on those
    of the base, else on the shapes of their own LoRA factors.

    Args:
      config: of the merge.
      base: the base model; None: none is given.

    Returns:
      In the order of the configuration; equal paths give one object.

    Raises:
      ConfigError: a path without an adapter, or a method that needs the base where none is given.
      FormatError: a file that is not understood.
    """
    paths = [m.path for m in config.models]
    for k, path in enumerate(paths):
        if not path.is_dir():
            raise ConfigError(f"models[{k}].model: {path} is no directory")
    for path in dict.fromkeys(paths):
        if is_peft(path):
            _check_type(path)
    restored = {p: io.restore_adapter(p) for p in dict.fromkeys(paths) if not is_peft(p)}
    sites: dict[str, Site] = {}
    for a in restored.values():
        sites |= {s.path: dataclasses.replace(s, group="") for s, _ in a.sites}
    files = {p: factors(p, config.names) for p in dict.fromkeys(paths) if is_peft(p)}
    where: Dynamic = list(sites.values())
    if not restored and base:
        where = base.params({m for shapes in files.values() for m in shapes if is_table(shapes[m])})
    elif not restored:
        for p, shapes in files.items():
            sites = _joined(sites, inferred(p, shapes), p)
        where = list(sites.values())
    for path in files:
        restored[path] = load(path, config.names, where, base)
    if base is None:
        check_bases(restored, {p: base_name(p) for p in files}, config.missing)
    ready = {path: closed(a, base, config.names, path) for path, a in restored.items()}
    return [ready[p] for p in paths]


def base_name(path: Path) -> str | None:
    """The base of a PEFT adapter as its configuration says it.

    Args:
      path: the directory.

    Returns:
      Without folder or owner, in lower case; None: not said.

    Raises:
      FormatError: the config cannot be read.
    """
    name = peft_config.read(path / CONFIG).get("base_model_name_or_path")
    return str(name).rstrip("/").rpartition("/")[2].lower() if name else None


def check_bases(
    restored: Mapping[Path, Adapter], named: Mapping[Path, str | None], missing: str
) -> None:
    """Refuses adapters that are not of one base, where only the user's word relates them.

    Where each adapter has the sites of all, names and shapes relate them. With `missing: zero` they
    need not: then adapters of other bases would be put together silently.

    Args:
      restored: the adapters.
      named: the base that each says it is of; None or absent: not said.
      missing: of the configuration.

    Raises:
      ConfigError: two say other bases, or one has no site with any other and does not say that it
        is of
        the same base.
    """
    if missing != "zero":
        return
    (first, adapter), *others = restored.items()
    sites, name = {site.path for site, _ in adapter.sites}, named.get(first)
    for path, adapter in others:
        own, declared = {site.path for site, _ in adapter.sites}, named.get(path)
        if name and declared and name != declared:
            raise ConfigError(
                f"{path}: got an adapter of {declared!r}, expected one of {name!r} as {first} is; "
                "give base_model if both are of it"
            )
        if not own & sites and not (name and declared):
            raise ConfigError(
                f"{path}: got no site in common with {first} ({min(own)}, {min(sites)}), expected "
                "adapters of one base; give base_model if both are of it"
            )
        sites, name = sites | own, name or declared


def is_peft(path: Path) -> bool:
    """Whether a directory is PEFT's.

    Args:
      path: a directory.

    Returns:
      False for Orbax checkpoints and full models.
    """
    return (path / CONFIG).is_file()


def _check_type(path: Path) -> None:
    """Raises FormatError for an adapter that no base would make readable: prompts, norms, ..."""
    file = path / CONFIG
    try:
        table = table_for(peft_config.read(file))
    except ValueError as error:
        raise error if isinstance(error, FormatError) else FormatError(file, str(error)) from error
    if table is LN_TUNING:
        raise FormatError(
            file,
            f"got peft_type {table.type!r}, whole vectors of norms; expected an adapter that "
            "changes matrices, as a merge is of these",
        )


def factors(path: Path, names: NameMap) -> Shapes:
    """The shapes of the LoRA factors and trained rows of a PEFT directory.

    Args:
      path: the directory.
      names: the map, for its prefix.

    Returns:
      Module of the base -> suffix -> shape.

    Raises:
      FormatError: factors of a grouped convolution, which are no change of its weight.
    """
    file, tensors = path / WEIGHTS, Shapes()
    for name, (shape, _) in (safetensors_file.header(file) if file.is_file() else {}).items():
        match = FACTOR.fullmatch(name)
        if match:
            tensors.setdefault(match[1].removeprefix(names.prefix), {})[match[2]] = shape
    for module, shapes in tensors.items():
        first, second = (shapes.get(keys[0], ()) for keys in (FIRST, SECOND))
        expected = (*second[:1], *first[:1], *(1 for _ in first[2:]))
        if len(first) > 2 and second and second != expected:
            raise FormatError(
                file,
                f"{module}: got lora_B.weight {second}, expected {expected}; a smaller one is of a "
                "grouped convolution: PEFT's LoRA of it reads all groups, and has no merged weight",
            )
    return tensors


def is_table(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the tensors of a module are those of an embedding table.

    Args:
      shapes: suffix -> shape.

    Returns:
      False for linear layers and convolutions.
    """
    return bool({FIRST[1], SECOND[1], ROWS} & shapes.keys())


def inferred(path: Path, shapes: Shapes) -> dict[str, Site]:
    """The sites of a PEFT LoRA, by the shapes of its factors.

    Args:
      path: the directory, for messages.
      shapes: as `factors` gives them.

    Returns:
      By path; float32.

    Raises:
      ConfigError: rows that are trained, or no LoRA at all: the base is needed.
    """
    sites: dict[str, Site] = {}
    for module, by_name in shapes.items():
        if ROWS in by_name:
            raise ConfigError(f"base_model: {path}: {module}: rows that are trained need the base")
        table = is_table(by_name)
        first, second = (by_name.get(keys[table], ()) for keys in (FIRST, SECOND))
        if len(first) == len(second) >= 2:
            shape = (first[1], second[0]) if table else (second[0], *first[1:])
            site = site_of(module, shape, jnp.dtype(jnp.float32), table)
            sites[site.path] = site
    if not sites:
        raise ConfigError(f"base_model: {path} is no plain LoRA; a base is needed to read it")
    return sites


def load(path: Path, names: NameMap, where: Tree, base: Base | None) -> Adapter:
    """The adapter of a PEFT directory.

    PEFT writes the weights of adapted tables and heads alongside some adapters; they must be those
    of the base.

    Args:
      path: the directory.
      names: from site paths to torch modules.
      where: the sites, or what `Base.params` returns.
      base: the base model; None: none is given.

    Returns:
      The adapter; its delta may still depend on the weight.

    Raises:
      ConfigError: weights alongside cannot be compared, or the base keeps matrices as [in, out].
      FormatError: they are not those of the base, or a file that is not understood.
    """
    if base and peft_config.read(path / CONFIG).get("fan_in_fan_out") is True:
        raise ConfigError(
            f"base_model: {path / CONFIG}: got fan_in_fan_out true, weights kept as [in, out] "
            "(transformers' Conv1D); expected false with a base; out.format peft needs none"
        )
    for module in factors(path, names) if base is not None else ():
        assert base is not None
        if base.packed(name := base.module(module, names)):
            base.readable(name)  # says which layout it is
    adapter = io.load_peft(path, names, where, extras="leave")
    for name, array in io.peft_extras(path).items():
        if base is None:
            raise ConfigError(f"base_model: {path} has the base's {name} as well; a base is needed "
                              "to see that it is unchanged")  # fmt: skip
        module, _, leaf = name.rpartition(".")
        old = base.tensor(f"{base.module(module, names)}.{leaf}")
        if old.shape != array.shape or (old.astype(np.float64) != array.astype(np.float64)).any():
            raise FormatError(
                path / WEIGHTS,
                f"replaces a weight of the base model: {name} is not that of {base.folder}; "
                "expected an adapter alone",
            )
    return adapter


def closed(adapter: Adapter, base: Base | None, names: NameMap, where: Path) -> Adapter:
    """An adapter of factored deltas; the other sites become LoRA, exactly, one by one.

    Args:
      adapter: of any methods.
      base: the base model, whose weights the other methods read; None: none is given.
      names: from site paths to torch modules.
      where: the file, for messages.

    Returns:
      The adapter.

    Raises:
      ConfigError: a method needs the base's weights, and there is none.
    """
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
        lora = to_lora(Adapter(own, held, ((site, method),)), {site.path: weight}).adapter
        trainable[site.path], frozen[site.path] = lora.trainable[site.path], lora.frozen[site.path]
        rows.append(lora.sites[0])
    kept = {key for site, _ in rows for key in (site.path, site.group)}
    return Adapter(
        {p: t for p, t in trainable.items() if p in kept},
        {p: t for p, t in frozen.items() if p in kept},
        tuple(rows),
    )


def unfolded(kernel: Float[np.ndarray, "*stack d_in d_out"], site: Site) -> jnp.ndarray:
    """A weight in the layout of its leaf.

    Args:
      kernel: matrices.
      site: whose leaf it is.

    Returns:
      [*leaf].
    """
    return unfold(jnp.asarray(kernel), site.kinds, site.shape)


def _joined(a: Mapping[str, Site], b: Mapping[str, Site], path: Path) -> dict[str, Site]:
    kinds = {site.path.rpartition("/")[0]: site for site in a.values()}
    for name, site in b.items():
        other = kinds.get(name.rpartition("/")[0], site)
        if (other, other.ops) != (site, site.ops):
            got, expected = (f"{''.join(s.ops)} {s.shape}" for s in (site, other))
            raise ConfigError(f"{path}: {name}: got {got}, expected {expected}: other bases")
    return {**a, **b}
