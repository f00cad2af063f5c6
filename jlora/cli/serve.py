"""`jlora serve`: many adapters over one language model, by OpenAI's protocol.

    jlora serve --base models/smollm --adapters adapters
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
         -d '{"model": "math", "prompt": "2 + 2 =", "max_tokens": 8}'

`--base` is a checkpoint directory of Hugging Face with its tokenizer, or a .gguf file; `--adapters`
a folder of PEFT directories, each of which is a `model`. `pip install 'jlora[serve]'` brings what
it needs.
"""

import argparse
import dataclasses
import functools
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from jlora.io.json_file import read_json
from jlora.io.presets import llama
from jlora.models import decoder
from jlora.serving import forward, pages, parallel, schedule, shelf
from jlora.serving.paged_pool import pages_of_component
from jlora.serving.state import HALVES, Engine
from jlora.types import Dynamic, Tree


class Base(NamedTuple):
    """A base model with its tokenizer."""

    config: decoder.DecoderConfig
    params: Tree
    tokenizer: Dynamic  # fast, of transformers
    ends: tuple[int, ...]  # tokens that end an answer


def parser() -> argparse.ArgumentParser:
    """The flags.

    Returns:
      Their parser.
    """
    p = argparse.ArgumentParser(
        "jlora serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", type=Path, required=True, help="checkpoint directory, or .gguf file")
    p.add_argument("--adapters", type=Path, required=True, help="folder of PEFT directories")
    p.add_argument("--name", default="", help="of the base as a model; default: that of its folder")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on")
    p.add_argument("--port", type=int, default=8000, help="0: any free one, which is printed")
    targets = "regex of the weights that adapters may change; fewer make adapters smaller in memory"
    p.add_argument("--targets", default=r"layers/.*kernel", help=targets)
    p.add_argument("--max_rank", type=int, default=64, help="of an adapter")
    p.add_argument("--memory", type=int, default=512, help="MiB of pages, for adapters and caches")
    p.add_argument("--devices", type=int, default=1, help="that base and pages are split over")
    p.add_argument("--rows", type=int, default=8, help="requests that run at once")
    p.add_argument("--max_adapters", type=int, default=8, help="different ones that run at once")
    p.add_argument("--queue", type=int, default=256, help="requests that wait at most")
    p.add_argument("--patience", type=float, default=60.0, help="seconds until the first token")
    p.add_argument("--timeout", type=float, default=300.0, help="seconds of an answer")
    p.add_argument(
        "--drain", type=float, default=60.0, help="seconds for running answers at the end"
    )
    p.add_argument("--max_tokens", type=int, default=1024, help="new tokens of a request at most")
    p.add_argument("--max_body", type=int, default=2**20, help="bytes of a request")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    half = "of the adapters in a running batch, half the bytes of float32; default: as --dtype"
    p.add_argument("--component_dtype", choices=HALVES, help=half)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command until SIGTERM or SIGINT, then ends what runs.

    Args:
      argv: the words after `jlora serve`; None: those of the process.

    Returns:
      The exit status: 0, or 2 with a message for what is refused.
    """
    args = parser().parse_args(argv)
    try:
        return _serve(args)
    except ModuleNotFoundError as error:
        why = f"got no module {error.name!r}, expected pip install 'jlora[serve]'"
    except (ValueError, OSError) as error:
        why = str(error).partition("\n")[0]
    print(f"error: {why}", file=sys.stderr)
    return 2


def read_base(path: Path, dtype: str) -> Base:
    """A base model.

    Args:
      path: a checkpoint directory of Hugging Face, or a .gguf file.
      dtype: of weights, activations and pages.

    Returns:
      Architecture, weights, tokenizer and end tokens.

    Raises:
      ValueError: it cannot be read, or its tokenizer is of another model.
    """
    import jax

    read: Callable[[], Tree]
    if path.suffix == ".gguf":
        from transformers import PreTrainedTokenizerFast

        config, read = decoder.gguf_config(path), lambda: decoder.load_gguf(path)[1]
        fast: Dynamic = PreTrainedTokenizerFast(
            tokenizer_object=decoder.gguf_tokenizer(path), eos_token="<|im_end|>"
        )
        fast.chat_template = decoder.chat_template(path)
    else:
        from transformers import AutoTokenizer

        if not (path / "config.json").is_file():
            raise ValueError(f"base: got {path}, expected a folder with config.json, or .gguf")
        config, read = decoder.config_from_hf(path), lambda: decoder.load(path)[1]
        try:
            fast = AutoTokenizer.from_pretrained(path, local_files_only=True, use_fast=True)
        except Exception as error:  # the library below raises bare exceptions for a damaged file
            raise ValueError(f"{path}: tokenizer: cannot be read ({error})") from error
    top = max(fast.get_vocab().values(), default=-1)
    if not 0 <= top < config.vocab:
        raise ValueError(f"{path}: tokenizer: got tokens up to {top}, expected below "
                         f"{config.vocab}: it is of another model")  # fmt: skip
    params = jax.tree.map(lambda t: t.astype(dtype), read())
    return Base(dataclasses.replace(config, dtype=dtype), params, fast, _ends(path, fast))


def _ends(path: Path, tokenizer: Dynamic) -> tuple[int, ...]:
    ends = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if (file := path / "generation_config.json").is_file():
        given = read_json(file).get("eos_token_id")
        ends |= {n for n in (given if isinstance(given, list) else [given]) if type(n) is int}
    return tuple(sorted(ends))


def engine_of(args: argparse.Namespace, base: Base) -> tuple[Engine, shelf.Shelf]:
    """Engine and shelf of the flags.

    Args:
      args: of `parser`.
      base: the model.

    Returns:
      The engine and the shelf.

    Raises:
      ValueError: no folder, no such weights, a limit below 1, too little memory for one adapter of
        the largest rank, or devices that are not there or do not divide the base's heads.
    """
    if not args.adapters.is_dir():
        raise ValueError(f"adapters: got {args.adapters}, expected a folder of PEFT directories")
    for name in ("max_rank", "memory", "devices", "rows", "max_adapters", "queue", "max_tokens",
                 "max_body", "patience", "timeout", "drain"):  # fmt: skip
        if getattr(args, name) <= 0:
            raise ValueError(f"{name}: got {getattr(args, name)}, expected above 0")
    sites = forward.adaptable(base.config, base.params, args.targets)
    width = forward.width(base.config)
    item = pages.empty_pool(2, 1, base.config.dtype).dtype.itemsize
    count = args.memory * 2**20 // (width * item)
    need = args.max_rank * pages_of_component(sites, width) + 2
    if count < need:
        raise ValueError(f"memory: got {args.memory} MiB or {count} pages, expected at least "
                         f"{need} pages for an adapter of rank {args.max_rank}")  # fmt: skip
    limits = schedule.Limits(args.rows, args.max_adapters, args.queue, args.patience)
    files = shelf.Shelf(args.adapters, sites, llama(), args.max_rank)
    fetch = functools.partial(shelf.read, files)
    layout, params = None, base.params
    if args.devices > 1:
        layout = parallel.over(args.devices)
        params = parallel.place(layout, base.config, params)
    half = args.component_dtype
    return Engine(base.config, params, sites, fetch, count, limits, layout, half), files


def service_of(args: argparse.Namespace) -> Dynamic:
    """The whole service of the flags: `jlora.serving.server.app` makes an application of it.

    Args:
      args: of `parser`.

    Returns:
      A `jlora.serving.server.Service`, whose worker starts with the application.

    Raises:
      ValueError: as `read_base` and `engine_of`, or an adapter that has the name of the base.
    """
    from jlora.serving import server
    from jlora.serving.worker import Worker

    base = read_base(args.base, args.dtype)
    engine, files = engine_of(args, base)
    bounds = server.Bounds(
        body=args.max_body, most=args.max_tokens, default=min(128, args.max_tokens),
        seconds=args.timeout, drain=args.drain,
    )  # fmt: skip
    name = args.name or args.base.resolve().name
    if name in shelf.listed(files):
        raise ValueError(f"name: got {name!r}, which is an adapter; choose another by --name")
    return server.Service(Worker(engine, files), base.tokenizer, name, base.ends, bounds)


def _serve(args: argparse.Namespace) -> int:
    import uvicorn

    from jlora.serving import server

    service = service_of(args)
    worker = service.worker
    config = uvicorn.Config(
        server.app(service), log_config=None, access_log=False,
        timeout_graceful_shutdown=int(args.drain) or 1,
        limit_concurrency=args.queue + args.rows + 64,
    )  # fmt: skip
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    sock = socket.create_server((args.host, args.port), family=family, backlog=2048)
    host, port = sock.getsockname()[:2]
    signal.signal(signal.SIGTERM, _quiet)  # uvicorn drains at it, then raises it once more
    signal.signal(signal.SIGINT, _quiet)
    count = len(shelf.listed(worker.shelf))
    print(f"serving {service.base} and {count} adapters on http://{host}:{port}/v1", flush=True)
    uvicorn.Server(config).run(sockets=[sock])
    print(f"ended: {worker.state.measures.tokens} tokens generated", flush=True)
    return 1 if worker.failed else 0


def _quiet(*_: Dynamic) -> None:
    """What is left to do at the signal: nothing, the server has drained."""


if __name__ == "__main__":
    sys.exit(main())
