"""Coverage-guided fuzzing of the reader of PEFT's directories, by atheris (libFuzzer).

Run by a developer, where atheris is installed alongside the test extras; not part of CI:

    python tests/golden/fuzz_peft.py [-max_total_time=180] [libFuzzer's other options] [corpus]

An input is one byte that picks a model, four of the config's length, the config, the weights' file.
The corpus starts from the golden adapters; three of four mutations change the config, the header or
the body and keep the lengths right. Every input is refused with `FormatError` or gives the
arrays of the sites it names, all finite; any other exception, a warning too, is a crash. Lines of
`Counter` tell how many inputs were refused and accepted.
"""

from __future__ import annotations

import struct
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import atheris
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "io")]

with atheris.instrument_imports(include=["jlora.io"]):
    from jlora import io

import conftest  # noqa: E402
import jax  # noqa: E402
import lycoris_conv_test as wide  # noqa: E402

FILES = ("adapter_config.json", "adapter_model.safetensors")
REPORT = 10_000  # inputs
SMALL = 2**14  # bytes; larger seeds are left out
MODELS = {kind: conftest._load(kind) for kind in ("bert", "llama")}
READERS = [(model.path, model.names, model.params) for model in MODELS.values()]
READERS += [(wide.GOLDEN, wide.NAMES, wide.SITES[fn]) for fn in wide.FORMS]
COUNTS = Counter()
SCRATCH = Path(tempfile.gettempdir()) / "jlora_fuzz_peft"  # libFuzzer leaves without cleaning up


def seeds(folder: Path) -> None:
    """The golden adapters as inputs, one file each."""
    for number, (path, _, _) in enumerate(READERS):
        for adapter in sorted(p.parent for p in path.glob(f"*/{FILES[0]}")):
            config, weights = ((adapter / name).read_bytes() for name in FILES)
            data = bytes([number]) + struct.pack("<I", len(config)) + config + weights
            if len(data) <= SMALL:
                (folder / f"{number}_{adapter.name}").write_bytes(data)


def check(adapter) -> None:
    """Arrays of the sites, finite, with the sites' stack axes first."""
    for site, _ in adapter.sites:
        own, _ = adapter.arrays(site)
        assert own, site.path
        for name, array in own.items():
            assert array.shape[: len(site.stack)] == site.stack, (site.path, name)
    for array in jax.tree.leaves(adapter):
        assert np.isfinite(np.asarray(array, np.float64)).all()


def one(data: bytes) -> None:
    if len(data) < 5:
        return
    _, names, params = READERS[data[0] % len(READERS)]
    (length,) = struct.unpack("<I", data[1:5])
    (SCRATCH / FILES[0]).write_bytes(data[5 : 5 + length])
    (SCRATCH / FILES[1]).write_bytes(data[5 + length :])
    COUNTS["inputs"] += 1
    try:
        check(io.load_peft(SCRATCH, names, params, extras="leave", layout="in_out"))
        io.peft_extras(SCRATCH)
    except io.FormatError:
        COUNTS["refused"] += 1
    else:
        COUNTS["accepted"] += 1
    if COUNTS["inputs"] % REPORT == 0:
        print(COUNTS, flush=True)


def mutated(data: bytes, size: int, seed: int) -> bytes:
    """Another input: any bytes, or one part of it with the lengths put right."""
    if seed % 4 == 0 or len(data) < 13:
        return atheris.Mutate(data, size)
    (told,) = struct.unpack("<I", data[1:5])
    config, weights = data[5 : 5 + told], data[5 + told :]
    length = int.from_bytes(weights[:8], "little")
    parts = [config, weights[8 : 8 + length], weights[8 + length :]]
    changed = seed % 4 - 1
    parts[changed] = atheris.Mutate(parts[changed], len(parts[changed]) + 64)
    sizes = struct.pack("<I", len(parts[0])), struct.pack("<Q", len(parts[1]))
    return (data[:1] + sizes[0] + parts[0] + sizes[1] + parts[1] + parts[2])[:size]


def main() -> None:
    options = sys.argv[1:] or ["-max_total_time=180"]
    SCRATCH.mkdir(exist_ok=True)
    if all(option.startswith("-") for option in options):
        corpus = SCRATCH / "corpus"
        corpus.mkdir(exist_ok=True)
        seeds(corpus)
        options.append(str(corpus))
    warnings.simplefilter("error")
    limits = [f"-max_len={2 * SMALL}", "-timeout=20", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *limits, *options], one, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
