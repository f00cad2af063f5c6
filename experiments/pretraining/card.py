"""The checkpoint directory of a run and its quality card.

The card says how well held-out documents are predicted, next to a unigram and an interpolated
n-gram model of the same training tokens on the same held-out tokens. Everything is measured on the
weights as written, in float16. A row of the decoder starts without a context; the n-grams are given
the tokens before it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from experiments.pretraining import ngram, tokens
from experiments.pretraining.settings import Settings
from experiments.pretraining.train import losses
from experiments.workdir import digest, write_json
from jlora.models import decoder

ORDER = 4  # of the longest n-gram
ROWS = 8  # of the decoder at once
PROMPTS = ("The Congress of the United States", "The whale", "There was once a king")
NAME = "card.json"
_losses = jax.jit(losses, static_argnums=2)


def measured_rows(settings: Settings, size: int) -> np.ndarray:
    """Where the measured rows start in a stream: all its rows, or as many evenly spread over it.

    Args:
      settings: of the run.
      size: tokens of the stream.

    Returns:
      int64 [rows].
    """
    starts = np.arange(0, size - settings.context, settings.context)
    count = min(settings.eval_rows, len(starts))
    return starts[np.linspace(0, len(starts) - 1, count).round().astype(int)]


def row_losses(
    params: Any, stream: np.ndarray, starts: np.ndarray, config: decoder.DecoderConfig, context: int
) -> np.ndarray:
    """Cross-entropy of all tokens but the first of some rows of a stream.

    Args:
      params: of the decoder; read as float32.
      stream: tokens.
      starts: of the rows.
      config: the architecture.
      context: tokens of a row that are predicted from.

    Returns:
      float32 [rows, context], nats.
    """
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    ids = stream[starts[:, None] + np.arange(context + 1)[None]].astype(np.int32)
    spare = -len(ids) % ROWS
    ids = np.concatenate([ids, np.repeat(ids[:1], spare, 0)])
    parts = [np.asarray(_losses(params, part, config)) for part in np.split(ids, len(ids) // ROWS)]
    return np.concatenate(parts)[: len(starts)]


def figures(nats: np.ndarray, size: int) -> dict[str, float]:
    """What losses mean.

    Args:
      nats: of each token.
      size: bytes of all of them together.

    Returns:
      "loss" (nats per token), "perplexity" (per token), "bits_per_byte".
    """
    mean = float(np.mean(nats, dtype=np.float64))
    bits = float(np.sum(nats, dtype=np.float64) / np.log(2) / size)
    return {
        "loss": round(mean, 4), "perplexity": round(float(np.exp(mean)), 2),
        "bits_per_byte": round(bits, 4),
    }  # fmt: skip


def write(
    folder: Path,
    settings: Settings,
    params: Any,
    tokenizer: Tokenizer,
    train: np.ndarray,
    held_out: np.ndarray,
    documents: dict[str, list[int]],
    seconds: float,
    steps: int,
) -> dict[str, Any]:
    """Writes the directory whole (temporary folder and rename) and returns the card.

    Args:
      folder: replaced if it exists.
      settings: of the run.
      params: trained, float32.
      tokenizer: of the texts.
      train: tokens of the training documents.
      held_out: tokens of the held-out documents.
      documents: source -> documents trained on, held out, characters of both.
      seconds: that training took.
      steps: of training.
    """
    temp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    half = jax.tree.map(lambda x: np.asarray(x, np.float16), params)
    decoder.save(temp, settings.config(), half)
    tokenizer.save(str(temp / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokens.END}
    write_json(temp / "tokenizer_config.json", words)
    card: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "parameters": sum(x.size for x in jax.tree.leaves(half)),
        "steps": steps,
        "seconds": seconds,
        "tokens_read": steps * settings.batch * settings.context,
        "train_tokens": len(train),
        "held_out_tokens": len(held_out),
        "documents": documents,
        "quality": _quality(settings, half, tokenizer, train, held_out),
        "snippet": _snippet(settings, half, tokenizer, train, held_out),
        "words": continuations(settings.config(), half, tokenizer),
    }
    card["files"] = {p.name: digest(p) for p in sorted(temp.iterdir())}
    write_json(temp / NAME, card)
    (temp / "README.md").write_text(page(card), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temp, folder)
    return card


def _quality(
    settings: Settings, params: Any, tokenizer: Tokenizer, train: np.ndarray, held_out: np.ndarray
) -> dict[str, Any]:
    starts = measured_rows(settings, len(held_out))
    context = settings.context
    targets = starts[:, None] + 1 + np.arange(context)[None]
    size = int(tokens.lengths(tokenizer)[held_out[targets]].sum())
    kinds = {
        "decoder": row_losses(params, held_out, starts, settings.config(), context),
        "unigram": ngram.unigram(train, held_out, settings.vocab)[targets],
    }
    for order in range(2, ORDER + 1):
        nats = ngram.interpolated(train, held_out, settings.vocab, order)
        kinds[f"{order}-gram"] = nats[targets]
    measured = {"tokens": targets.size, "bytes": size}
    return measured | {name: figures(nats, size) for name, nats in kinds.items()}


def _snippet(
    settings: Settings, params: Any, tokenizer: Tokenizer, train: np.ndarray, held_out: np.ndarray
) -> dict[str, Any]:
    """The first held-out row with its losses, which a test measures again."""
    start = np.array([0])
    nats = row_losses(params, held_out, start, settings.config(), settings.context)
    best = ngram.interpolated(train, held_out, settings.vocab, ORDER)[1 : settings.context + 1]
    row = held_out[: settings.context + 1]
    plain = ngram.unigram(train, row[1:], settings.vocab)
    return {
        "text": tokenizer.decode(row.tolist(), skip_special_tokens=False),
        "ids": row.tolist(),
        "loss": float(nats.mean()),
        "unigram_loss": float(plain.mean()),
        "ngram_loss": float(best.mean()),
    }


@functools.cache
def _continued(config: decoder.DecoderConfig) -> Any:
    forward: Any = functools.partial(decoder.forward, config=config)
    return jax.jit(
        functools.partial(
            decoder.generate, forward, config=config, steps=40, end=(0,),
            sampler=decoder.Sampler(0.7, top_k=40),
        )
    )  # fmt: skip


def continuations(config: decoder.DecoderConfig, params: Any, tokenizer: Tokenizer) -> list[str]:
    """What a decoder says after each of PROMPTS, at temperature 0.7.

    Args:
      config: the architecture.
      params: of the decoder; read as float32.
      tokenizer: of it.
    """
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    encoded = [tokenizer.encode(p, add_special_tokens=False).ids for p in PROMPTS]
    sizes = np.array([len(ids) for ids in encoded], np.int32)
    rows = np.zeros((len(encoded), sizes.max()), np.int32)
    for row, ids in zip(rows, encoded, strict=True):
        row[: len(ids)] = ids
    tokens = _continued(config)(params, rows, sizes, jax.random.key(0))
    return [
        tokenizer.decode(row[:end].tolist())
        for row, end in zip(np.asarray(tokens.ids), np.asarray(tokens.lengths), strict=True)
    ]


def page(card: dict[str, Any]) -> str:
    """The model card, Markdown.

    Args:
      card: of `write`.
    """
    s, quality = card["settings"], card["quality"]
    lines = [
        "# Base L", "",
        f"A decoder of the Llama family with {card['parameters']:,} parameters: {s['layers']}"
        f" layers of width {s['width']}, {s['heads']} query and {s['kv_heads']} key heads, ffn"
        f" {s['ffn']}, a tied head, context {s['context']}, byte-level BPE of {s['vocab']} tokens."
        " Weights in float16. It is a base for experiments with adapters, not a model to use.",
        "", "Trained from nothing by",
        "`python -m experiments.pretrain --flagfile=experiments/flags/base_l.flags`:",
        f"{card['steps']} steps of {s['batch']} x {s['context']} tokens ({card['tokens_read']:,}"
        f" tokens, {card['tokens_read'] / card['train_tokens']:.2f} of the training text) in"
        f" {card['seconds']:,.0f} seconds, {s['optimizer']}, cosine, seed {s['seed']}.", "",
        "| text | documents trained on | held out | characters |", "|---|---|---|---|",
        *(f"| {n} | {t} | {h} | {c:,} |" for n, (t, h, c) in sorted(card["documents"].items())),
        "", f"Held-out documents, {quality['tokens']:,} tokens, {quality['bytes']:,} bytes; the"
        " n-grams are interpolated (Kneser-Ney), of all training text, and measured on the same"
        " tokens:", "",
        "| model | loss (nats per token) | perplexity per token | bits per byte |",
        "|---|---|---|---|",
    ]  # fmt: skip
    kinds = {name: figures for name, figures in quality.items() if isinstance(figures, dict)}
    for name in sorted(kinds, key=lambda name: kinds[name]["loss"]):
        figures = kinds[name]
        row = (name, figures["loss"], figures["perplexity"], figures["bits_per_byte"])
        lines.append("| " + " | ".join(str(x) for x in row) + " |")
    lines += ["", "It continues:", ""]
    lines += [f"> {' '.join(text.split())}\n" for text in card["words"]]
    lines += ["| file | sha256 |", "|---|---|"]
    lines += [f"| {name} | {sha} |" for name, sha in sorted(card["files"].items())]
    return "\n".join(lines) + "\n"
