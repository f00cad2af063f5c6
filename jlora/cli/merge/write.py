"""The result in files: whole, or not there at all.

Everything is written into a hidden directory beside the target, which is renamed when it is
complete, and removed when anything goes wrong. A run that is killed outright leaves the target as
it was; the next run removes the hidden directory, and puts back what was about to be replaced.

Source: our reading.
Deviates: nothing.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jlora import io
from jlora.cli.merge import layout
from jlora.cli.merge.base import Base
from jlora.core.adapter import Adapter, Site
from jlora.io import FormatError, NameMap, safetensors_file

Changed = dict[str, tuple[Site, tuple[int, ...]]]  # tensor of the base -> slice of a site
Change = Callable[[str, np.ndarray], np.ndarray]  # (tensor, its values, float32) -> new values


@contextlib.contextmanager
def whole(path: Path, overwrite: bool) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end. Raises FormatError where it exists."""
    path = path.absolute()
    recover(path)
    check_free(path, overwrite)
    partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial / "new"
        if path.exists():
            os.replace(path, partial / "old")
        os.replace(partial / "new", path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def recover(path: Path) -> None:
    """Puts back what a run moved away from `path`, if it was killed before its last rename."""
    old = _partial(path.absolute()) / "old"
    if old.exists() and not path.exists():
        os.replace(old, path)


def check_free(path: Path, overwrite: bool) -> None:
    """FormatError where something is at `path` that may not be replaced."""
    if path.exists() and not overwrite:
        raise FormatError(path, "exists already; --overwrite replaces it")


def peft(
    path: Path, adapter: Adapter, names: NameMap, base: Base | None, dtype: str | None
) -> None:
    """The adapter as a PEFT directory."""
    name = str(base.folder) if base else None
    io.save_peft(path, cast(adapter, dtype), names, base_model_name=name)


def orbax(path: Path, adapter: Adapter, dtype: str | None) -> None:
    """The adapter as an Orbax checkpoint."""
    io.save_adapter(path, cast(adapter, dtype))


def changed(base: Base, sites: Iterable[Site], names: NameMap) -> Changed:
    """Which tensors of the base the sites are.

    Raises FormatError or ValueError: a site has no name, or no tensor of its shape; it is a bare
    parameter of a module; it is a table that is the output layer as well.
    """
    sites, tied = tuple(sites), base.tied()
    for site in sites:
        if names.is_parameter(site.path):
            raise FormatError(base.folder, f"{site.path}: got a bare parameter, expected a weight "
                              "of a module; merged weights have no layout of others")  # fmt: skip
        names.module(site.path, (0,) * len(site.stack))
        if "gather" in site.ops and site.d_in == tied:
            raise FormatError(base.folder, f"{site.path}: got tie_word_embeddings true in "
                              "config.json, expected false: merged weights would change the output "
                              "layer as well; out.format peft does not")  # fmt: skip
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
    """The base with the tensors of `table` changed, shard by shard; `done` is called after each.

    Weights are changed in float32 and rounded once, to `dtype` or that of the base; tensors that
    are not changed are as they were, or cast to `dtype` where they are floating.
    """
    path.mkdir()
    for file in base.rest():
        shutil.copy(file, path / file.name)
    for file, tensors, metadata in base.shards():
        out = {}
        for name in list(tensors):
            old = tensors.pop(name)  # not held any longer than needed
            floating = jnp.issubdtype(old.dtype, jnp.floating)
            kind = np.dtype(jnp.dtype(dtype)) if dtype and floating else old.dtype
            if name in table:
                old = change(name, old.astype(np.float32))
            out[name] = old.astype(kind, copy=False)
        safetensors_file.write(path / file, out, metadata)
        done()


def adding(delta: Callable[[Site, tuple[int, ...]], np.ndarray], table: Changed) -> Change:
    """The change that adds `delta` [d_in, d_out] of a slice of a site to its tensor, in place."""

    def change(name: str, old: np.ndarray) -> np.ndarray:
        site, index = table[name]
        old += layout.to_torch(site, delta(site, index))
        return old

    return change


def delta_of(adapter: Adapter, site: Site, index: tuple[int, ...]) -> np.ndarray:
    """[d_in, d_out] of a slice of a site, of an adapter of LoRAs."""
    arrays, scale = adapter.trainable[site.path], adapter.frozen[site.path]["scale"]
    a, b = (np.asarray(arrays[k][index], np.float32) for k in "ab")
    return (float(scale[index]) * a) @ b


def cast(adapter: Adapter, dtype: str | None) -> Adapter:
    """With trainable arrays in `dtype`."""
    kind = jnp.dtype(dtype or jnp.float32)
    new = {p: {k: t.astype(kind) for k, t in arrays.items()} for p, arrays in
           adapter.trainable.items()}  # fmt: skip
    return adapter.replace(trainable=new)


def _partial(path: Path) -> Path:
    return path.parent / f".{path.name}.partial"
