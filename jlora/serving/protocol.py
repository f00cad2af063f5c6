"""Bodies of OpenAI's completions and chat completions, checked field by field.

Every field is used, or refused by name where it asks for something that is not done here (several
answers, log probabilities, penalties). Nothing is skipped, cast or clamped.

Reference: https://platform.openai.com/docs/api-reference (completions, chat).
Deviates: one prompt per request; text only.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jlora.types import Json

ROLES = ("system", "developer", "user", "assistant", "tool")
STOPS = 4  # stop texts per request
MESSAGES = 1024


class Refused(ValueError):
    """A request that is not answered."""

    def __init__(self, why: str, param: str | None = None, status: int = 400, code: str = ""):
        super().__init__(why)
        self.param, self.status = param, status
        self.code = code or {404: "model_not_found", 429: "rate_limit_exceeded"}.get(status, "")

    def body(self) -> dict[str, Json]:
        """The error as OpenAI words it.

        Returns:
          The object of the answer.
        """
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code or None}
        return {"error": error}


class Ask(NamedTuple):
    """A request as text."""

    model: str
    prompt: str | tuple[int, ...] | tuple[Mapping[str, str], ...]  # text, tokens, or messages
    most: int  # new tokens at most
    temperature: float
    top_p: float
    seed: int | None  # None: any
    stop: tuple[str, ...]
    stream: bool
    usage: bool  # whether a stream ends with its usage


def parse(data: bytes, chat: bool, most: int, default: int) -> Ask:
    """A request from a body.

    Args:
      data: the body, untrusted.
      chat: whether it is a chat completion.
      most: new tokens that may be asked for.
      default: new tokens where none are said.

    Returns:
      The request.

    Raises:
      Refused: the body is not JSON, a field is missing, unknown, of another type or out of range.
    """
    body = json_object(data)
    fields = _Fields(body)
    model = fields.text("model", required=True)
    prompt = _messages(fields.take("messages")) if chat else _prompt(fields.take("prompt"))
    names = ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",)
    given = [v for n in names if (v := fields.whole(n, 1, most)) is not None]
    ask = Ask(
        model=str(model),
        prompt=prompt,
        most=given[0] if given else min(default, most),
        temperature=fields.number("temperature", 0.0, 2.0, 1.0),
        top_p=fields.number("top_p", 0.0, 1.0, 1.0),
        seed=fields.whole("seed", -(2**63), 2**63 - 1),
        stop=_stops(fields.take("stop")),
        stream=fields.flag("stream"),
        usage=_usage(fields.take("stream_options")),
    )
    if not ask.top_p:
        raise Refused("top_p: got 0, expected above 0 and at most 1", "top_p")
    fields.only("n", 1)
    fields.only("best_of", 1)
    for name in ("frequency_penalty", "presence_penalty"):
        fields.only(name, 0)
    for name in ("echo", "logprobs", "suffix", "top_logprobs", "tools", "functions"):
        fields.only(name, False, None, "", [])
    fields.only("logit_bias", None, {})
    fields.only("response_format", None, {"type": "text"})
    for name in ("user", "metadata", "store"):
        fields.take(name)  # of OpenAI's accounts: they change no answer
    fields.finish()
    return ask


def json_object(data: bytes) -> dict[str, Json]:
    """A JSON object from a body.

    Args:
      data: the body, untrusted.

    Returns:
      The object.

    Raises:
      Refused: anything else.
    """
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"body: got no JSON in UTF-8 ({str(error)[:80]})") from error
    if not isinstance(body, dict):
        raise Refused(f"body: got {type(body).__name__}, expected a JSON object")
    return body


def _no_constant(name: str) -> None:
    raise ValueError(f"got {name}")


class _Fields:
    """Takes fields out of a body; what is left at the end is unknown."""

    def __init__(self, body: Mapping[str, Json]):
        self.left = dict(body)

    def take(self, name: str) -> Json:
        return self.left.pop(name, None)

    def text(self, name: str, required: bool = False) -> str | None:
        value = self.take(name)
        if (value is None and required) or not isinstance(value, str | None) or value == "":
            raise _wrong(name, value, "a text")
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if not isinstance(value, bool | None):
            raise _wrong(name, value, "true or false")
        return bool(value)

    def whole(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise _wrong(name, value, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise _wrong(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def only(self, name: str, *values: Json) -> None:
        value = self.take(name)
        if value is not None and not any(type(value) is type(v) and value == v for v in values):
            raise _wrong(name, value, f"{values[0]!r}: nothing else is done here")

    def finish(self) -> None:
        if self.left:
            name = min(self.left)
            raise Refused(f"{name[:80]}: unknown field", name[:80])


def _wrong(name: str, value: Json, expected: str) -> Refused:
    return Refused(f"{name}: got {str(value)[:80]!r}, expected {expected}", name)


def _sequence(name: str, value: Json, most: int, item: Callable[[Json], bool]) -> bool:
    return isinstance(value, list) and 0 < len(value) <= most and all(map(item, value))


def _is_text(value: Json) -> bool:
    return isinstance(value, str) and bool(value)


def _prompt(value: Json) -> str | tuple[int, ...]:
    if _sequence("prompt", value, 1, _is_text):
        value = value[0]
    if _sequence("prompt", value, 2**20, lambda v: type(v) is int and v >= 0):
        return tuple(value)
    if not _is_text(value):
        raise _wrong("prompt", value, "one text, or its tokens")
    return value


def _messages(value: Json) -> tuple[Mapping[str, str], ...]:
    if not _sequence("messages", value, MESSAGES, lambda v: isinstance(v, dict)):
        raise _wrong("messages", value, f"a list of 1 to {MESSAGES} messages")
    return tuple(_message(k, one) for k, one in enumerate(value))


def _message(k: int, one: Mapping[str, Json]) -> dict[str, str]:
    content, where = one.get("content"), f"messages[{k}]"
    parts = lambda v: isinstance(v, dict) and v.get("type") == "text" and _is_text(v.get("text"))  # noqa: E731
    if isinstance(content, list) and _sequence(where, content, MESSAGES, parts):
        content = "".join(part["text"] for part in content)
    if one.get("role") not in ROLES or not isinstance(content, str):
        raise _wrong(where, one, f"a role of {ROLES} and a text as content")
    if unknown := one.keys() - {"role", "content", "name"}:
        raise Refused(f"{where}: {min(map(str, unknown))[:80]}: unknown field", where)
    return {"role": one["role"], "content": content}


def _stops(value: Json) -> tuple[str, ...]:
    if value is None:
        return ()
    if _is_text(value):
        return (value,)
    if not _sequence("stop", value, STOPS, _is_text):
        raise _wrong("stop", value, f"a text or a list of 1 to {STOPS}")
    return tuple(value)


def _usage(value: Json) -> bool:
    if value is None:
        return False
    known = isinstance(value, dict) and value.keys() <= {"include_usage"}
    if not known or type(value.get("include_usage", False)) is not bool:
        raise _wrong("stream_options", value, '{"include_usage": true or false}')
    return value.get("include_usage", False)
