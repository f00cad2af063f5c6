"""Labels of the made-up corpora."""

from experiments.data.descriptions.label import Label

_SUBJECTS = {
    "toy": {
        "cooking": "cooking and the kitchen",
        "sailing": "boats and the sea",
        "gardening": "plants and the garden",
        "chess": "the game of chess",
        "music": "songs and instruments",
    },
    "toy_far": {
        "trains": "railways and stations",
        "weather": "rain, snow and storms",
        "bicycles": "bicycles and riding them",
    },
}

TOY: dict[str, dict[str, Label]] = {
    corpus: {
        name: Label(
            name,
            f"A made-up sentence about {subject}.",
            (f"It deals with {subject}.", f"Invented words on {subject}."),
        )
        for name, subject in subjects.items()
    }
    for corpus, subjects in _SUBJECTS.items()
}
