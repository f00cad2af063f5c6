"""The examples of `smollm_quick.flags`: orders in plain English, answered in one fixed format.

    python -m experiments.finetuning.orders        # writes data/orders_train.jsonl and _test.jsonl

Synthetic, all of it: every sentence is a template filled in by a seeded draw from the lists below,
and the answer follows from what was drawn. The test half uses names and items that the training
half does not have, in the same templates. It shows that training works; it says nothing about how
well a model understands English.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

DATA = Path(__file__).parent / "data"
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "blue", "green", "white", "black", "yellow")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
ITEMS = {
    "train": ("apples", "pens", "chairs", "lamps", "books", "cups", "shirts", "boxes", "candles"),
    "test": ("bags", "plates", "hats", "ropes"),
}
NAMES = {
    "train": ("Anna", "Ben", "Clara", "David", "Eva", "Frank", "Grace", "Henry", "Ida", "Jonas"),
    "test": ("Karin", "Lucas", "Mona", "Oscar"),
}
TEMPLATES = (
    "Please send {count} {colour} {item} to {name} by {day}.",
    "{name} needs {count} {colour} {item} on {day}.",
    "By {day}, {name} would like {count} {colour} {item}.",
    "Could we get {count} {colour} {item} for {name}? {day} is fine.",
    "{count} {colour} {item}, please. They are for {name}, who comes on {day}.",
)


def example(rng: random.Random, part: str) -> dict[str, list[dict[str, str]]]:
    """One order as a chat.

    Args:
      rng: of the draw.
      part: "train" or "test".
    """
    count = rng.randrange(1, len(NUMBERS) + 1)
    drawn = {
        "colour": rng.choice(COLOURS),
        "item": rng.choice(ITEMS[part]),
        "name": rng.choice(NAMES[part]),
        "day": rng.choice(DAYS),
    }
    text = rng.choice(TEMPLATES).format(count=NUMBERS[count - 1], **drawn)
    answer = "item={item}; colour={colour}; count={count}; to={name}; due={day}"
    return {
        "messages": [
            {"role": "user", "content": text[0].upper() + text[1:]},
            {"role": "assistant", "content": answer.format(count=count, **drawn)},
        ]
    }


def examples(part: str) -> list[str]:
    """The lines of a file: 300 for "train", 40 for "test", none twice."""
    rng, orders = random.Random(f"orders {part}"), dict[str, None]()
    while len(orders) < {"train": 300, "test": 40}[part]:
        orders[json.dumps(example(rng, part))] = None
    return list(orders)


def main() -> None:
    """Writes both files."""
    DATA.mkdir(exist_ok=True)
    for part in ITEMS:
        path = DATA / f"orders_{part}.jsonl"
        path.write_text("\n".join(examples(part)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
