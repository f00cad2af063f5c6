"""Base L continues real texts that it was not trained on: four kinds, packed into rows.

A document is one text of a corpus. Its hash says whether it is for training, for choosing rates or
for testing, so no sentence is in more than one of them. The documents of a kind follow each other,
each before an end token, and are cut into rows of `LENGTH` + 1 tokens.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from experiments.data import corpora
from experiments.pretraining import base_l as model
from experiments.pretraining import texts, tokens
from experiments.variant_study.bench import Bench, of_rows
from jlora.models import decoder
from jlora.types import Dynamic, Tree

KINDS = ("friends", "imdb", "20newsgroups", "vader_amazon")  # dialogue, reviews, posts, products
LENGTH, ROWS = 32, {"train": 256, "validation": 24, "test": 64}
SHARES = {"test": 25, "validation": 40}  # of 100 documents: below 25, from there to 40, the rest


def base_l(workdir: Path, cache: Path | None, *, toy: bool) -> Bench:
    """The four kinds of text.

    Args:
      workdir: not read; nothing is kept.
      cache: of downloads; None: the default.
      toy: a tiny random decoder and random tokens.
    """
    del workdir
    if toy:
        return _toy()
    base = model.load()
    parts: dict[str, list[np.ndarray]] = {split: [] for split in ROWS}
    for kind in KINDS:
        documents = _documents(kind, cache)
        for split, ids in packed(base.tokenizer, documents).items():
            parts[split].append(ids)
    rows = {split: np.stack(ids) for split, ids in parts.items()}
    blob = json.dumps([KINDS, LENGTH, ROWS, SHARES, base.card["files"]], sort_keys=True)
    return of_rows("base_l", logits(base.config), base.params, rows, KINDS, _hash(blob))


def packed(tokenizer: Dynamic, documents: list[texts.Document]) -> dict[str, np.ndarray]:
    """Rows of each split, tokens [rows, LENGTH + 1].

    Args:
      tokenizer: of the base.
      documents: of one kind.

    Raises:
      ValueError: too few texts for the rows.
    """
    out = {}
    for split, count in ROWS.items():
        own = [d for d in documents if split_of(d) == split]
        parts = [tokens.stream(tokenizer, own, held) for held in sorted({d.held_out for d in own})]
        ids = np.concatenate([*parts, np.zeros(0, np.uint16)])
        if len(ids) < count * (LENGTH + 1):
            raise ValueError(f"{documents[0].source}: {split}: got {len(ids)} tokens, expected at "
                             f"least {count * (LENGTH + 1)}")  # fmt: skip
        # rows from all over the stream, so that a long document does not fill them all
        starts = np.linspace(0, len(ids) - LENGTH - 1, count).astype(int)
        out[split] = np.stack([ids[s : s + LENGTH + 1] for s in starts]).astype(np.int32)
    return out


def split_of(document: texts.Document) -> str:
    """The split that a document is in, by the hash of its name."""
    blob = hashlib.sha256(f"variants/{document.source}/{document.name}".encode()).digest()
    share = int.from_bytes(blob[:8], "big") % 100
    return next((split for split, below in SHARES.items() if share < below), "train")


def _documents(kind: str, cache: Path | None) -> list[texts.Document]:
    if kind in texts.SOURCES:
        return texts.documents((kind,), cache)
    corpus = corpora.load(kind, cache, progress=False)
    rows = zip(corpus.units, corpus.texts, strict=True)
    return [texts.Document(kind, unit, text) for unit, text in rows]


@functools.cache
def logits(config: decoder.DecoderConfig) -> Callable[..., jax.Array]:
    """One function object per architecture: (params, ids [n, t]) -> [n, t, vocab]."""

    def apply(params: Tree, ids: Dynamic) -> jax.Array:
        return decoder.forward(params, ids, config=config).logits

    return apply


def _toy() -> Bench:
    config = decoder.DecoderConfig(
        model_type="llama", vocab=32, layers=1, width=48, heads=3, kv_heads=1, head_width=16,
        ffn=64, max_positions=16,
    )  # fmt: skip
    params = decoder.init(jax.random.key(0), config)
    draw = np.random.default_rng(0)
    rows = {split: draw.integers(0, 32, (2, n, 9)) for split, n in
            (("train", 20), ("validation", 4), ("test", 4))}  # fmt: skip
    return of_rows("base_l", logits(config), params, rows, ("first", "second"), "toy")


def _hash(blob: str) -> str:
    return hashlib.sha256(blob.encode()).hexdigest()
