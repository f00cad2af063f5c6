"""The result in files: whole, or not there at all.

Everything is written into a hidden directory alongside the target, which is renamed when it is
complete, and removed when anything goes wrong. A run that is killed outright leaves the target as
it was; the next run removes the hidden directory, and puts back what was about to be replaced.
`replaceable` says what may be replaced.

Deviates: nothing.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from jlora import io
from jlora.cli.merge import layout, replaceable
from jlora.cli.merge.base import INDEX, Base
from jlora.cli.merge.tied import concerned
from jlora.core.adapter import Adapter
from jlora.core.site import Site
from jlora.io import FormatError, NameMap, safetensors_file, whole_file
from jlora.io.inside import inside
from jlora.io.json_file import parse_json

Changed = dict[str, tuple[Site, tuple[int, ...]]]  # tensor of the base -> slice of a site
Change = Callable[[str, np.ndarray], np.ndarray]  # (tensor, its values, float32) -> new values


@contextlib.contextmanager
def whole(path: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """A path to write a folder to, which becomes `path` at the end.

    Args:
      path: the target.
      overwrite: whether a folder that this command wrote may be replaced.
      inputs: what the merge reads; it is never replaced. (): nothing.

    Yields:
      The path to write to.

    Raises:
      FormatError: something is there that may not be replaced.
    """
    path, inputs = path.absolute(), tuple(inputs)
    recover(path)
    check_free(path, overwrite, inputs)
    for hidden in _hidden(path):  # of a run that was killed
        shutil.rmtree(hidden, ignore_errors=True)
    partial = _hidden(path)[0]
    partial.mkdir(parents=True)
    try:
        yield partial / "new"
        replaceable.mark(partial / "new")
        check_free(path, overwrite, inputs)
        if path.exists():
            os.replace(path, partial / "old")
        os.replace(partial / "new", path)
    finally:
        abandon(path)


def abandon(path: Path) -> None:
    """What was there before is at `path` again, unless the result is; nothing is left alongside.

    Safe while another thread is still in `whole`: first the hidden directory gets another name, so
    that nothing of it can become the result any longer.

    Args:
      path: the target.
    """
    partial, stopped = _hidden(path)
    for _ in range(20):  # the other thread may still write
        with contextlib.suppress(OSError):
            os.replace(partial, stopped)
        with contextlib.suppress(OSError):
            recover(path)
        shutil.rmtree(stopped, ignore_errors=True)
        if not partial.exists() and not stopped.exists():
            return


def recover(path: Path) -> None:
    """Puts back what a run moved away from `path`, if it was killed before its last rename.

    Args:
      path: the target.
    """
    for hidden in _hidden(path):
        if (hidden / "old").exists() and not path.exists():
            os.replace(hidden / "old", path)


def check_free(path: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuses a target where something is that may not be replaced.

    Args:
      path: the target.
      overwrite: whether a folder that this command wrote may be replaced.
      inputs: what the merge reads; it is never replaced. (): nothing.

    Raises:
      FormatError: something is at `path`, or where its parts go.
    """
    for hidden in _hidden(path):
        if hidden.is_symlink() or (hidden.exists() and not hidden.is_dir()):
            raise FormatError(hidden, "expected a folder that an earlier run left; move it away")
        inner = [p.name for p in hidden.iterdir()] if hidden.exists() else []
        strange = sorted(name for name in inner if name != "old" and not name.startswith("new"))
        if strange:
            raise FormatError(hidden, f"holds {strange[:4]}, which no run left; move it away")
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FormatError(path, "exists already; --overwrite replaces it")
    replaceable.check(path, inputs)


def peft(
    path: Path, adapter: Adapter, names: NameMap, base: Base | None, dtype: str | None
) -> None:
    """Writes an adapter as a PEFT directory.

    Args:
      path: a new directory.
      adapter: of LoRAs.
      names: from site paths to torch modules.
      base: the base model, whose folder the config names; None: none.
      dtype: of its arrays; None: float32.

    Raises:
      FormatError: as `jl.io.save_peft`.
    """
    name = str(base.folder) if base else None
    io.save_peft(path, cast(adapter, dtype), names, base_model_name=name)


def orbax(path: Path, adapter: Adapter, dtype: str | None) -> None:
    """Writes an adapter as an Orbax checkpoint.

    Args:
      path: a new directory.
      adapter: of LoRAs.
      dtype: of its arrays; None: float32.

    Raises:
      FormatError: as `jl.io.save_adapter`.
    """
    io.save_adapter(path, cast(adapter, dtype))


def changed(base: Base, sites: Iterable[Site], names: NameMap) -> Changed:
    """Which tensors of the base the sites are.

    Args:
      base: the base model.
      sites: of the adapters.
      names: from site paths to torch modules.

    Returns:
      Tensor -> (site, index on its stack axes).

    Raises:
      FormatError: a site has no tensor of its shape; it is a bare parameter of a module; it is a
        table that is the output layer as well, or such an output layer.
      ValueError: a site has no name.
    """
    sites, tie = tuple(sites), base.tied()
    for site in sites:
        if names.is_parameter(site.path):
            raise FormatError(base.folder, f"{site.path}: got a bare parameter, expected a weight "
                              "of a module; merged weights have no layout of others")  # fmt: skip
        module, table = names.module(site.path, (0,) * len(site.stack)), "gather" in site.ops
        rows = site.d_in if table else site.d_out
        why = tie.why if tie is not None and concerned(tie, module, rows, table) else None
        if table and module.rpartition(".")[2] == "shared":  # T5, BART, ...
            why = why or "a table that encoder and decoder share"
        if why:
            raise FormatError(base.folder, f"{site.path}: got {why}, expected false: merged "
                              "weights would change the other use of that weight (table or output "
                              "layer) as well; out.format peft does not")  # fmt: skip
    by_path = {site.path: site for site in sites}
    table = names.table(sites).items()
    return {base.check(by_path[where], base.module(module, names)): (by_path[where], index)
            for module, (where, index) in table}  # fmt: skip


def merged(
    path: Path,
    change: Change,
    table: Collection[str],
    base: Base,
    dtype: str | None,
    done: Callable[[], None],
) -> None:
    """Writes the base with some tensors changed, shard by shard.

    Changed tensors are rounded once, to `dtype` or that of the base (for quantised weights: that of
    `config.json`). Other tensors are as they were, bit by bit, or cast to `dtype` where they are
    floating and not part of a quantised module; values that are NaN or infinite may be among them.

    Args:
      path: a new directory.
      change: (tensor, its values in float32) -> new values.
      table: the tensors that `change` is called for.
      base: the base model.
      dtype: what the user wants for floating point; None: that of the base.
      done: called after each shard.

    Raises:
      FormatError: a changed or cast tensor is not finite.
    """
    path.mkdir()
    for file in base.rest():
        shutil.copy(file, path / file.name)
    _settle(path, base, table, dtype)
    for file, tensors, metadata in base.shards():
        out = {}
        for name in list(tensors):
            old = tensors.pop(name)  # not held any longer than needed
            kind = base.written(name, dtype, table)
            if kind is None:
                continue
            bad = 0  # of an old tensor that is only cast
            if name in table:
                old = change(name, base.values(name, old))
            elif kind != old.dtype:
                bad = safetensors_file.not_finite(old)
            if name in table or kind != old.dtype:
                with np.errstate(over="ignore", invalid="ignore"):
                    old = old.astype(kind, copy=False)
                if safetensors_file.not_finite(old) > bad:
                    why = f"{name}: got NaN or infinite values in {kind}, expected finite ones"
                    raise FormatError(base.folder, why)
            out[name] = old
        target = inside(path, file, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        dtypes = safetensors_file.EVERY_DTYPE
        safetensors_file.write(target, out, metadata, dtypes=dtypes, finite=False)
        done()


def _settle(path: Path, base: Base, table: Collection[str], dtype: str | None) -> None:
    """Index and `config.json` of merged weights where modules are not quantised any longer."""
    written = {name: base.written(name, dtype, table) for name in base.where}
    if all(kind is not None for kind in written.values()):
        return
    kept = {name: file for name, file in base.where.items() if written[name] is not None}
    if (path / INDEX).is_file():
        record = parse_json(path / INDEX, (path / INDEX).read_bytes())
        _write_json(path / INDEX, record | {"weight_map": kept})
    config = base.config()
    how = config.get("quantization_config")
    if not isinstance(how, dict):
        return
    freed = {name.removesuffix(".weight") for name in table}
    if base.quantised.keys() <= freed:
        config = {k: v for k, v in config.items() if k != "quantization_config"}
    else:
        field, floats = "llm_int8_skip_modules", freed
        if how.get(field) is None:  # none: transformers chooses, by what the model has
            modules = {name.removesuffix(".weight") for name in kept if name.endswith(".weight")}
            floats = {m for m in modules if m not in base.quantised} | freed
        config["quantization_config"] = how | {field: sorted({*(how.get(field) or ()), *floats})}
    _write_json(path / "config.json", config)


def _write_json(path: Path, data: object) -> None:
    whole_file.write_bytes(path, (json.dumps(data, indent=2) + "\n").encode())


def adding(delta: Callable[[Site, tuple[int, ...]], np.ndarray], table: Changed) -> Change:
    """The change that adds a delta to its tensor, in place.

    Args:
      delta: (site, index on its stack axes) -> [d_in, d_out].
      table: tensor -> (site, index).

    Returns:
      What `merged` calls.
    """

    def change(name: str, old: np.ndarray) -> np.ndarray:
        site, index = table[name]
        old += layout.to_torch(site, delta(site, index))
        return old

    return change


def delta_of(
    adapter: Adapter, site: Site, index: tuple[int, ...]
) -> Float32[np.ndarray, "d_in d_out"]:
    """The delta of a slice of a site.

    Args:
      adapter: of LoRAs.
      site: one of its sites.
      index: on its stack axes.

    Returns:
      [d_in, d_out].
    """
    arrays, scale = adapter.trainable[site.path], adapter.frozen[site.path]["scale"]
    a, b = (np.asarray(arrays[k][index], np.float32) for k in "ab")
    return (float(scale[index]) * a) @ b


def cast(adapter: Adapter, dtype: str | None) -> Adapter:
    """An adapter with trainable arrays in another dtype.

    Args:
      adapter: any.
      dtype: its name; None: float32.

    Returns:
      The adapter; scales stay as they are.
    """
    kind = jnp.dtype(dtype or jnp.float32)
    new = {p: {k: t.astype(kind) for k, t in arrays.items()} for p, arrays in
           adapter.trainable.items()}  # fmt: skip
    return adapter.replace(trainable=new)


def _hidden(path: Path) -> tuple[Path, Path]:
    """Where the parts of `path` are written, and where they are moved to be removed."""
    path = path.absolute()
    return path.parent / f".{path.name}.partial", path.parent / f".{path.name}.stopped"
