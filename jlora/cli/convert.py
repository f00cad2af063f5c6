"""`jlora convert SOURCE TARGET --to FORMAT`: an adapter from one file format to another.

    jlora convert adapters/math math.safetensors --to diffusers --component transformer
    jlora convert style.safetensors style --to peft --base models/sd15/unet
    jlora convert runs/adapter math --to peft --names llama          # Orbax -> PEFT
    jlora convert math runs/math --to orbax --names llama --like runs/adapter
    jlora convert adapters/math math.gguf --to gguf --base models/SmolLM2   # for llama.cpp

    jlora convert checkpoints/100 math --to peft --names tunix --alpha 16   # Tunix's own LoRA
    jlora convert math q.safetensors --to leaves --package qwix --names tunix --like checkpoints/0

Formats are peft, kohya, diffusers, gguf, orbax and leaves, in any direction; the source's is
recognised.
Rank, alpha and everything else is read from the files and never has to be typed in. Sites keep the
names of the torch modules unless ``--names`` maps the paths of a JAX model to them: then ``--like``
is an Orbax adapter of that model or a tree of its parameters (for its sites), or the source is one.
Leaves are the LoRA that a JAX package keeps among its parameters (qwix, gemma, flax, easydel,
keras); qwix has its alpha in its rule alone, so it has to be given. A kohya file writes the dots of
module names as underscores, so reading one needs the base (``--base``) or ``--like``. A
GGUF file has llama.cpp's names and order of heads, so that ``--base`` (the directory of the model,
or its GGUF file) is required in both directions.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jlora import algebra, io
from jlora.cli import files
from jlora.cli.check_names import tree_of
from jlora.cli.merge.base import Base
from jlora.cli.merge.write import whole
from jlora.core.adapter import Adapter
from jlora.io import FormatError
from jlora.io.gguf.reader import is_gguf
from jlora.io.lora_leaves import PACKAGES


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: the words after `jlora convert`; None: those of the process.

    Returns:
      The exit status: 0, or 2 with a message for what is refused.
    """
    parser = argparse.ArgumentParser(
        "jlora convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a directory or a safetensors file")
    parser.add_argument("target", type=Path, help="where to write")
    parser.add_argument("--to", required=True, choices=files.FORMATS, help="the target's format")
    parser.add_argument("--source_format", choices=files.FORMATS, help="instead of recognising it")
    parser.add_argument("--base", type=Path, help="directory of the base model (gguf: or its file)")
    parser.add_argument("--like", type=Path, help="an Orbax adapter or parameters, for the sites")
    parser.add_argument("--names", help="a built-in name map (llama, ...) or a YAML file")
    parser.add_argument("--module_prefix", default="", help="put before every torch module name")
    parser.add_argument("--prefix", help="module prefix of kohya files (lora_unet, ...)")
    parser.add_argument("--component", help="component of diffusers files (transformer, unet, ...)")
    parser.add_argument("--base_model_name", help="for PEFT's config, when the source has none")
    parser.add_argument("--task_type", help="for PEFT's config, such as CAUSAL_LM")
    parser.add_argument("--alpha", type=float, help="of qwix's LoraRule, for its leaves")
    parser.add_argument("--package", choices=PACKAGES, help="whose leaves are written")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at the target")
    args = parser.parse_args(argv)
    try:
        print(run(args))
    except (FormatError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> str:
    """Converts one adapter.

    Args:
      args: as the parser of `main` gives them.

    Returns:
      What was written, in a line.

    Raises:
      FormatError: a kohya file without a base.
      ValueError: what writers refuse, with the target's path.
    """
    source, target = args.source, args.target
    kind = args.source_format or files.detect(source)
    names = files.names_of(args.names, args.module_prefix)
    gguf = None
    if "gguf" in (kind, args.to):
        if args.base is None:
            raise FormatError(source, "GGUF files have the names of a base model: --base is needed")
        gguf = io.gguf_base(args.base)
    base = Base(args.base) if args.base and not is_gguf(args.base) else None
    like = None
    if args.like:
        adapters = args.like.is_dir() and files.detect(args.like) == "orbax"
        like = io.restore_adapter(args.like) if adapters else tree_of(args.like)
    if kind == "kohya" and base is None and like is None:
        raise FormatError(source, "kohya files write dots as underscores: --base is needed")
    start = files.start_of(source, kind, args.prefix if kind == "kohya" else args.component)
    adapter, extras = files.read(source, kind, names, base=base, like=like, start=start, gguf=gguf,
                                 alpha=args.alpha)  # fmt: skip
    model, task = files.base_name(source)
    written = {
        "kohya": "lora_unet" if args.prefix is None else args.prefix,
        "diffusers": "transformer" if args.component is None else args.component,
    }.get(args.to, "")
    model, task = args.base_model_name or model, args.task_type or task
    folder = args.to in ("peft", "orbax")
    with (whole if folder else files.whole_file)(target, args.overwrite) as new:
        try:
            files.write(new, args.to, adapter, names, extras=extras, start=written,
                        base_model_name=model, task_type=task, gguf=gguf,
                        package=args.package)  # fmt: skip
            check(new, args.to, adapter, names, written, gguf)
        except FormatError as error:  # name the target, not the temporary file
            raise ValueError(str(error).replace(str(new), str(target))) from error
    count = sum(t.size for t in jax.tree.leaves(adapter.trainable))
    return f"{target}: {args.to}, {len(adapter.sites)} sites, {count:,} trained parameters"


def check(
    path: Path,
    kind: files.Format,
    adapter: Adapter,
    names: io.NameMap,
    start: str,
    gguf: io.GgufBase | None = None,
) -> None:
    """Reads back what was written.

    Every trained array is there again bit for bit; or, where the format folds the scale into an
    array (LoKr in kohya files), the deltas are equal to 1e-6.

    Args:
      path: what was written.
      kind: its format.
      adapter: what it must hold.
      names: from the paths of the sites to torch modules.
      start: the module prefix of a kohya file, or the component of a diffusers file.
      gguf: the base of a llama.cpp file; None for other formats.

    Raises:
      FormatError: neither; nothing is left at the target then.
    """
    again, _ = files.read(path, kind, names, like=adapter, start=start, gguf=gguf)
    for site, _ in adapter.sites:
        for name, array in adapter.trainable[site.path].items():
            got = again.trainable.get(site.path, {}).get(name)
            same = got is not None and np.array_equal(np.asarray(got), np.asarray(array))
            if not same and not _equal_deltas(again, adapter):
                raise FormatError(path, f"{site.path}/{name}: {kind} does not give it back")


def _equal_deltas(a: Adapter, b: Adapter) -> bool:
    try:
        return bool(algebra.distance(a, b) <= 1e-6 * algebra.norm(b))
    except TypeError:  # without factors there is nothing to compare but the arrays
        return False
