"""What a model says: its loss on held-out rows, and answers to held-out prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from experiments.finetuning import loss
from experiments.finetuning.packing import Rows
from jlora.models import decoder


class Answer(NamedTuple):
    """One held-out prompt."""

    prompt: str  # as text, with what the template adds
    answer: str  # of the model, greedy
    expected: str  # of the data


def mean_loss(
    measure: Callable[[Any, Any, Rows], tuple[Array, Array]],
    params: Any,
    adapter: Any,
    batches: Sequence[Rows],
) -> float:
    """Loss per learned token over all batches, in nats; NaN without any.

    Args:
      measure: of `evaluator`.
      params: the base.
      adapter: on it.
      batches: rows on the devices.
    """
    sums = [measure(params, adapter, rows) for rows in batches]
    value, count = (sum(float(s[k]) for s in sums) for k in (0, 1))
    return value / count if count else float("nan")


def evaluator(
    tuned: Callable[..., Any], place: Any = None
) -> Callable[[Any, Any, Rows], tuple[Array, Array]]:
    """``(params, adapter, rows) -> (sum of losses, learned tokens)``, jitted.

    Args:
      tuned: the lifted decoder.
      place: sharding of the result.
    """

    def measure(params: Any, adapter: Any, rows: Rows) -> tuple[Array, Array]:
        out = tuned(params, adapter, rows.ids, rows.positions, rows.segments)
        return loss.total(out.logits, rows.ids, rows.weights)

    return jax.jit(measure, out_shardings=place)


def answerer(
    tuned: Callable[..., Any],
    config: decoder.DecoderConfig,
    steps: int,
    ends: tuple[int, ...],
    place: Any = None,
) -> Callable[[Any, Any, Any, Any], decoder.Generated]:
    """``(params, adapter, prompts, lengths) -> Generated``, greedy, jitted.

    Args:
      tuned: the lifted decoder.
      config: the architecture.
      steps: tokens at most.
      ends: tokens that end an answer.
      place: sharding of the result.
    """

    def run(params: Any, adapter: Any, prompts: Array, lengths: Array) -> decoder.Generated:
        model: Any = lambda p, *xs: tuned(p, adapter, *xs)  # noqa: E731
        key = jax.random.key(0)  # greedy: it is not read
        continue_ = functools.partial(decoder.generate, config=config, steps=steps, end=ends)
        return continue_(model, params, prompts, lengths, key)

    return jax.jit(run, out_shardings=place)


def answers(
    run: Callable[[Any, Any, Any, Any], decoder.Generated],
    params: Any,
    adapter: Any,
    prompts: Sequence[tuple[list[int], str]],
    tokenizer: Any,
) -> list[Answer]:
    """Answers to prompts.

    Args:
      run: of `answerer`.
      params: the base.
      adapter: on it.
      prompts: tokens and expected text of each, of `chat.prompt`.
      tokenizer: of the base.
    """
    if not prompts:
        return []
    lengths = np.array([len(ids) for ids, _ in prompts], np.int32)
    padded = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, (ids, _) in zip(padded, prompts, strict=True):
        row[: len(ids)] = ids
    tokens = run(params, adapter, padded, lengths)
    ids, ends = np.asarray(tokens.ids), np.asarray(tokens.lengths)
    text = lambda part: tokenizer.decode(part.tolist(), skip_special_tokens=True).strip()  # noqa: E731
    return [
        Answer(text(row[:start]), text(row[start:end]), expected)
        for row, start, end, (_, expected) in zip(ids, lengths, ends, prompts, strict=True)
    ]
