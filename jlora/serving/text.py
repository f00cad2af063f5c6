"""Text of an answer while it grows: whole characters only, and nothing of a stop text.

=====  ====================================================================================
x      text of all tokens so far
h      the longest end of x that is the beginning of a stop text, or an unfinished character
=====  ====================================================================================

.. math:: \\text{given} = x \\text{ without } h

Where a stop text is inside, what is given is x up to it.

Deviates: nothing.
"""

from collections.abc import Mapping
from typing import NamedTuple

from jlora.types import Dynamic

Tokenizer = Dynamic  # a fast one of transformers
UNFINISHED = "\ufffd"  # what decoders give for bytes that are no character yet


class Answer(NamedTuple):
    """An answer so far."""

    tokens: tuple[int, ...] = ()  # without the end token
    given: int = 0  # characters that the client has
    stopped: bool = False  # a stop text was met


def prompt_tokens(
    tokenizer: Tokenizer, prompt: str | tuple[int, ...] | tuple[Mapping[str, str], ...]
) -> tuple[int, ...]:
    """The tokens of a prompt, a chat by the model's own template.

    Args:
      tokenizer: of the base model.
      prompt: text, tokens, or messages.

    Returns:
      Tokens.

    Raises:
      ValueError: messages for a model without a template, or that its template refuses.
    """
    if isinstance(prompt, str):
        return tuple(tokenizer.encode(prompt, add_special_tokens=True))
    if not prompt or not isinstance(prompt[0], Mapping):
        return tuple(int(str(i)) for i in prompt)
    if not tokenizer.chat_template:
        raise ValueError("messages: the model has no chat template; use completions")
    try:
        text = tokenizer.apply_chat_template(
            list(prompt), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates raise what they like
        raise ValueError(f"messages: refused by the model's template ({error})") from error
    return tuple(tokenizer.encode(text, add_special_tokens=False))  # the template has them


def grow(
    tokenizer: Tokenizer, answer: Answer, token: int | None, stop: tuple[str, ...], last: bool
) -> tuple[Answer, str]:
    """An answer with one more token, and the text that the client does not have yet.

    Args:
      tokenizer: of the base model.
      answer: so far.
      token: the new one; None for an end token, which has no text.
      stop: texts that end the answer and are not part of it.
      last: whether nothing follows, so that nothing is held back.

    Returns:
      Another answer, and new text, often "".
    """
    if token is not None:
        answer = answer._replace(tokens=(*answer.tokens, token))
    text = tokenizer.decode(list(answer.tokens), skip_special_tokens=True)
    places = [at for s in stop if (at := text.find(s)) >= 0]
    if places:
        text, answer = text[: min(places)], answer._replace(stopped=True)
    elif not last:
        text = text[: len(text) - _held(text, stop)]
    new = text[answer.given :]
    return answer._replace(given=max(answer.given, len(text))), new


def _held(text: str, stop: tuple[str, ...]) -> int:
    """Characters at the end that may still change or turn out to be a stop text."""
    begun = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    unfinished = len(text) - len(text.rstrip(UNFINISHED))
    return max([unfinished, *begun])
