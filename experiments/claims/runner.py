"""Runs claims and keeps their records, ``docs/results/claims/<name>.json``.

A record holds what anyone needs to believe or repeat the figures: the statement, sha256 of every
asset, of the claim file and of the code that it shares with other claims, seeds, figures per unit,
intervals, verdict, seconds and versions. It is written whole (temporary file and rename). A claim
without pinned assets is refused.
"""

import hashlib
import importlib
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.claims.protocol import MIN_SEEDS, Claim, verdict
from experiments.data.pinned import ASSETS
from experiments.workdir import write_json
from jlora.registry import HARNESS, shared_code

FOLDER = Path(__file__).parent
PACKAGES = ("jax", "jaxlib", "numpy", "optax")


def names() -> tuple[str, ...]:
    """All claims: files of this folder that assign CLAIM."""
    files = sorted(FOLDER.glob("*.py"))
    return tuple(f.stem for f in files if f.stem not in HARNESS and "\nCLAIM = " in f.read_text())


def load(name: str) -> Claim:
    """The claim of a name.

    Raises:
      ValueError: there is none, its name is not its file's, or its assets are not pinned.
    """
    if name not in names():
        raise ValueError(f"claim: got {name!r}, expected one of {', '.join(names())}")
    claim = importlib.import_module(f"experiments.claims.{name}").CLAIM
    if claim.name != name:
        raise ValueError(f"{name}.py: CLAIM.name: got {claim.name!r}, expected {name!r}")
    check_assets(claim)
    return claim


def check_assets(claim: Claim) -> None:
    """Raises ValueError: a claim on no assets (random data), or on one that is not pinned."""
    if not claim.assets:
        raise ValueError(f"{claim.name}: assets: got none, expected pinned real data")
    for asset in claim.assets:
        if asset not in ASSETS:
            raise ValueError(f"{claim.name}: assets: got {asset!r}, expected one of {list(ASSETS)}")


def sha256(name: str) -> str:
    """Of a claim file as it is now."""
    return hashlib.sha256((FOLDER / f"{name}.py").read_bytes()).hexdigest()


def pin(name: str) -> dict[str, str]:
    """What identifies an asset."""
    asset = ASSETS[name]
    return {"package": asset.name, "version": asset.version, "sha256": asset.sha256}


def measure(claim: Claim, seeds: Sequence[int], workdir: Path) -> dict[str, Any]:
    """Runs a claim and returns its record.

    Args:
      claim: what to run.
      seeds: at least three different ones.
      workdir: what seeds share is kept here (trained adapters, ...), so a killed run resumes.

    Raises:
      ValueError: too few seeds, assets that are not pinned, figures that do not fit together.
    """
    check_assets(claim)
    if len(set(seeds)) < MIN_SEEDS:
        raise ValueError(f"seeds: got {list(seeds)}, expected at least {MIN_SEEDS} different ones")
    code: dict[str, Any] = {"claim_sha256": sha256(claim.name)}
    code |= {"shared_sha256": shared_code(claim.name, FOLDER.parents[1])}
    start, found = time.perf_counter(), []
    for seed in tqdm(seeds, desc=claim.name, unit="seed"):
        found.append(claim.run(seed, workdir))
    judged = verdict(claim, found)
    return {
        "claim": claim.name,
        **code,
        "systems": list(claim.systems),
        "statement": claim.statement,
        "reference": claim.reference,
        "baseline": claim.baseline,
        "control": claim.control,
        "unit": claim.unit,
        "less_is_better": claim.less_is_better,
        "margin": claim.margin,
        "assets": {n: pin(n) for n in claim.assets},
        "seeds": list(seeds),
        "figures": [
            {"units": list(f.units), "system": list(f.system), "baseline": list(f.baseline),
             "control": list(f.control), "more": dict(f.more)}
            for f in found
        ],
        "difference": dict(judged.difference),
        "system_minus_control": dict(judged.control),
        "verdict": judged.verdict,
        "seconds": round(time.perf_counter() - start, 1),
        "environment": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    }  # fmt: skip


def keep(record: dict[str, Any], folder: Path) -> Path:
    """Writes a record; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['claim']}.json"
    write_json(path, record)
    return path


def summary(record: dict[str, Any]) -> str:
    """A record in one line."""
    d, c = record["difference"], record["system_minus_control"]
    return (
        f"{record['claim']}: {record['verdict']}; {record['unit']}, minus {record['baseline']}: "
        f"{d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}], minus control: "
        f"{c['mean']:+.4f} [{c['low']:+.4f}, {c['high']:+.4f}], "
        f"{d['n']} units, {len(record['seeds'])} seeds, {record['seconds']} s"
    )
