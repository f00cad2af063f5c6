"""Training examples of a jsonl file: one JSON object per line, chat messages or a pair of texts.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}

Every line is one of the two; other fields are left alone. Empty lines are not examples.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

MAX_LINE = 16 << 20  # characters


class Record(NamedTuple):
    """One example."""

    where: str  # "file:line", for messages of errors
    messages: tuple[dict[str, Any], ...]  # of a chat; () for a pair of texts
    prompt: str  # of a pair of texts
    completion: str  # likewise


def read(path: str | Path) -> list[Record]:
    """The examples of a file.

    Args:
      path: of the jsonl file.

    Raises:
      ValueError: no such file, no example in it, or the first line that is not an example: with
        its number, got and expected.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    lines = enumerate(text.split("\n"), 1)
    records = [_record(f"{path}:{n}", line) for n, line in lines if line.strip()]
    if not records:
        raise ValueError(f"{path}: got no examples, expected one per line")
    return records


def _record(where: str, line: str) -> Record:
    if len(line) > MAX_LINE:
        raise ValueError(f"{where}: got {len(line)} characters, expected at most {MAX_LINE}")
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: got {line[:60]!r}, expected JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: got {type(raw).__name__}, expected an object")
    if "messages" in raw:
        if "prompt" in raw or "completion" in raw:
            raise ValueError(f"{where}: got messages and a prompt or completion, expected one form")
        return Record(where, _messages(where, raw["messages"]), "", "")
    for name in ("prompt", "completion"):
        if name not in raw:
            raise ValueError(
                f"{where}: {name}: missing; got {sorted(raw)[:5]}, expected 'messages', or 'prompt'"
                " and 'completion'"
            )
        if not isinstance(raw[name], str):
            raise ValueError(f"{where}: {name}: got {type(raw[name]).__name__}, expected text")
    if not raw["completion"]:
        raise ValueError(f"{where}: completion: got '', expected what is to be learned")
    return Record(where, (), raw["prompt"], raw["completion"])


def _messages(where: str, raw: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"{where}: messages: got {str(raw)[:60]}, expected a list of messages")
    for n, message in enumerate(raw):
        texts = isinstance(message, dict) and [message.get(k) for k in ("role", "content")]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{where}: messages[{n}]: got {str(message)[:60]}, expected 'role' and 'content',"
                " both texts"
            )
    if not any(m["role"] == "assistant" and m["content"] for m in raw):
        raise ValueError(
            f"{where}: messages: got no completion, expected a message of role 'assistant'"
        )
    return tuple(raw)
