r"""Texts for transfer: SmolLM2 writes them after five rows of a task, once; or words by chance.

==========  ==============================================================================
seeds       rows of a task that are handed on, `SEEDS` texts
prompt      "- text" per seed, in an order of its own per batch, then "-"
==========  ==============================================================================

A written text is the rest of the prompt's last line. Empty ones, those of fewer than `LEAST` words,
copies of a seed and repetitions are left out. Each batch is a file of the workdir, so that a killed
run writes only what is missing.
"""

import functools
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import assets
from experiments.data.pinned import ASSETS
from experiments.workdir import read_json, write_json
from jlora.models import decoder
from jlora.transfer.written import write

SEEDS, LEAST = 5, 3
WORDS = 30  # of a seed that the prompt shows
PROMPT, STEPS, BATCH = 256, 24, 64  # tokens of a prompt at most, new tokens, texts at once
SAMPLER = decoder.Sampler(temperature=0.9, top_k=50)
REDO = "delete it, the texts are then written again"


class Writer(NamedTuple):
    """SmolLM2."""

    tokenizer: Any
    run: Any  # (prompt, length, key) -> Generated


@functools.cache
def writer() -> Writer:
    """The pinned decoder, loaded where texts are missing."""
    path = next(assets.fetch(ASSETS["smollm2"], None).rglob("*.gguf"))
    config, params = decoder.load_gguf(path)
    params = jax.tree.map(lambda t: jnp.asarray(t, jnp.float32), params)
    tokenizer = decoder.gguf_tokenizer(path)
    ends = tuple(n for token, n in tokenizer.get_vocab().items() if "Ċ" in token)  # of a line
    forward = functools.partial(decoder.forward, config=config)
    run = functools.partial(
        write, forward, config=config, count=BATCH, steps=STEPS, sampler=SAMPLER,
        end=(*ends, tokenizer.token_to_id("<|im_end|>")),
    )  # fmt: skip
    return Writer(tokenizer, functools.partial(jax.jit(run), params))


def plain(text: str, words: int | None = None) -> str:
    """A text on one line, cut to a number of words."""
    return " ".join(text.split()[:words])


def prompt(seeds: Sequence[str], batch: int) -> str:
    """The prompt of one batch."""
    order = np.random.default_rng([batch, 17]).permutation(len(seeds))
    return "".join(f"- {plain(seeds[int(i)], WORDS)}\n" for i in order) + "-"


def batch_of(seeds: Sequence[str], batch: int, key: jax.Array) -> list[str]:
    """The lines of one batch, as they were written."""
    tokenizer, run = writer()
    ids = tokenizer.encode(prompt(seeds, batch)).ids
    if len(ids) > PROMPT:
        raise ValueError(f"prompt: got {len(ids)} tokens, expected at most {PROMPT}")
    padded = np.zeros(PROMPT, np.int32)
    padded[: len(ids)] = ids
    out = run(jnp.asarray(padded), jnp.int32(len(ids)), key)
    rows = zip(np.asarray(out.ids), np.asarray(out.lengths), strict=True)
    return [plain(tokenizer.decode(row[len(ids) : n].tolist()).split("\n")[0]) for row, n in rows]


def usable(lines: Sequence[str], seeds: Sequence[str]) -> list[str]:
    """The different lines that are texts and no seeds, in their order."""
    known = {plain(s, k) for s in seeds for k in (None, WORDS)}
    return [t for t in dict.fromkeys(lines) if len(t.split()) >= LEAST and t not in known]


class Written(NamedTuple):
    """Texts of a task."""

    texts: tuple[str, ...]
    seconds: float  # that writing all batches took


def written(name: str, seeds: Sequence[str], count: int, workdir: Path) -> Written:
    """`count` texts of a task; batches that the workdir has are read back.

    Args:
      name: of the task; part of file names.
      seeds: its rows.
      count: of usable texts.
      workdir: where they are kept.

    Raises:
      ValueError: the prompt is too long, or twice as many texts as needed hold too few usable ones.
    """
    settings = [list(seeds), PROMPT, STEPS, BATCH, WORDS, list(SAMPLER.__dict__.values())]
    tag = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    root = workdir / "written_texts"
    root.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    seconds = 0.0
    for batch in range(2 * -(-count // BATCH)):
        path = root / f"{name}-{tag[:8]}-{batch}.json"
        if not path.is_file():
            start = time.perf_counter()
            key = jax.random.fold_in(jax.random.key(int(tag[:7], 16)), batch)
            made = batch_of(seeds, batch, key)
            write_json(path, {"texts": made, "seconds": round(time.perf_counter() - start, 1)})
        kept = read_json(path, dict, REDO)
        lines, seconds = [*lines, *kept["texts"]], seconds + kept["seconds"]
        if len(good := usable(lines, seeds)) >= count:
            return Written(tuple(good[:count]), seconds)
    raise ValueError(f"{name}: got {len(good)} usable texts of {len(lines)}, expected {count}")


def random_texts(vocabulary: Sequence[str], count: int, seed: int) -> list[str]:
    """Texts of 4 to 20 words by chance.

    Args:
      vocabulary: words.
      count: texts.
      seed: of the draws.
    """
    draw = np.random.default_rng([seed, 19])
    return [" ".join(draw.choice(vocabulary, draw.integers(4, 21))) for _ in range(count)]


def vocabulary(folder: Path) -> tuple[str, ...]:
    """The whole words of an encoder's vocabulary: letters only, three or more."""
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    return tuple(w for w in lines if w.isascii() and w.isalpha() and len(w) > 2)
