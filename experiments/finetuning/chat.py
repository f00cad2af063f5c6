r"""Examples as tokens, and which of them are learned: those of the completions.

A chat is rendered by the model's own template. The text that assistant turn i adds is what stands
between the rendering of the turns before it, generation prompt included, and the rendering that
includes it; a token is learned when it reaches into such a span:

.. math::
    w_t = \left[\exists\, i: \operatorname{end}_t > a_i \wedge
    \operatorname{start}_t < b_i\right], \qquad
    a_i = |R(m_{<i}, \text{generation prompt})|, \quad b_i = |R(m_{\le i})|

Symbols: rendering R, messages m, offsets [start, end) of token t in the rendered text.

Original to jlora: spans of text instead of a marked template, which few checkpoints have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.finetuning.records import Record


class Document(NamedTuple):
    """One example as tokens."""

    ids: np.ndarray  # int32 [n]
    learned: np.ndarray  # bool [n]: whether predicting this token counts
    where: str  # of the record


def document(tokenizer: Any, record: Record) -> Document:
    """The tokens of an example.

    Args:
      tokenizer: a fast tokenizer of transformers; for chats with a template.
      record: the example.

    Raises:
      ValueError: the template refuses the chat, or renders its beginning differently from the
        whole; no token is learned.
    """
    if record.messages:
        text, spans = _spans(tokenizer, record)
        ids, learned = _encode(tokenizer, text, spans)
    else:
        text = record.prompt + record.completion
        ids, learned = _encode(tokenizer, text, [(len(record.prompt), len(text))])
        ids = [*_start(tokenizer), *ids]
        learned = [False] * (len(ids) - len(learned)) + learned
        if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
            ids, learned = [*ids, tokenizer.eos_token_id], [*learned, True]
    if not any(learned[1:]):
        raise ValueError(f"{record.where}: got no token to learn, expected a completion")
    return Document(np.asarray(ids, np.int32), np.asarray(learned, bool), record.where)


def prompt(tokenizer: Any, record: Record) -> tuple[list[int], str]:
    """Tokens up to the last completion, and the completion as the example has it.

    Args:
      tokenizer: as for `document`.
      record: the example.
    """
    if not record.messages:
        ids, _ = _encode(tokenizer, record.prompt, [])
        return [*_start(tokenizer), *ids], record.completion
    last = max(i for i, m in enumerate(record.messages) if m["role"] == "assistant")
    text = _render(tokenizer, record, record.messages[:last], True)
    return _encode(tokenizer, text, [])[0], record.messages[last]["content"]


def _render(tokenizer: Any, record: Record, messages: Sequence[Any], answer: bool) -> str:
    """Messages as text; with `answer` up to where an answer begins."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(
            f"{record.where}: messages: the tokenizer has no chat_template; expected one, or"
            " 'prompt' and 'completion'"
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=answer
        )
    except (TemplateError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{record.where}: messages: the template refuses ({error})") from error


def _spans(tokenizer: Any, record: Record) -> tuple[str, list[tuple[int, int]]]:
    """The whole chat as text, and where its completions stand in it."""
    whole = _render(tokenizer, record, record.messages, False)
    spans = []
    for i, message in enumerate(record.messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, record, record.messages[:i], True)
        after = _render(tokenizer, record, record.messages[: i + 1], False)
        if not (whole.startswith(before) and whole.startswith(after) and len(after) > len(before)):
            raise ValueError(
                f"{record.where}: messages[{i}]: the template renders the chat up to here"
                " differently from the whole, expected its beginning; give each turn a line of its"
                " own"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def _encode(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """Tokens of a text, none added, and which of them reach into a span."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside = [
        any(end > a and start < b for a, b in spans) for start, end in encoding.offset_mapping
    ]
    return list(encoding.input_ids), inside


def _start(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts in front of a text, if it does."""
    first = tokenizer("").input_ids[:1]
    return first if first and first[0] == tokenizer.bos_token_id else []
