"""What a text of each label is, in human words: a name, one sentence, two other wordings.

The sentence is part of a task's condition; the other wordings serve the control that asks for the
same class in different words. Nothing here was made from the texts themselves.

``LABELS[corpus][label]`` is a ``Label``; ``REST`` describes "any other label" of a corpus.
"""

from experiments.data.descriptions.genres import GENRES
from experiments.data.descriptions.label import Label
from experiments.data.descriptions.opinions import OPINIONS
from experiments.data.descriptions.topics import TOPICS
from experiments.data.descriptions.toy import TOY

__all__ = ["LABELS", "REST", "Label"]

REST = Label(
    "other",
    "A text of the same kind on any other subject.",
    (
        "It belongs to none of the named subjects.",
        "Anything else that people write about here.",
    ),
)

LABELS: dict[str, dict[str, Label]] = {**TOPICS, **GENRES, **OPINIONS, **TOY}
