"""Words for the classes of tasks that are not about what a text is on: form, and pairs of texts."""

from experiments.data.descriptions.label import Label

_ORDER = Label(
    "words in order",
    "A text whose words stand in the order in which they were written.",
    ("Nothing in it was moved.", "The wording is as its author left it."),
)
_COMPLETE = Label(
    "nothing is missing",
    "A text with all its words.",
    ("It reads on without a gap.", "No word was taken out of the middle."),
)

FORMS: dict[str, tuple[Label, ...]] = {  # kind of task -> its classes
    "neighbours_swapped": (
        _ORDER,
        Label(
            "neighbours swapped",
            "A text in which two words that follow each other were exchanged.",
            ("One word comes just too early.", "A pair of adjacent words is in the wrong order."),
        ),
    ),
    "words_shuffled": (
        _ORDER,
        Label(
            "words shuffled",
            "A text whose words were put in a random order.",
            ("It is a jumble of words.", "The words are there, the sentence is not."),
        ),
    ),
    "halves_exchanged": (
        _ORDER,
        Label(
            "halves exchanged",
            "A text that starts with its second half and ends with its first.",
            ("It begins in the middle.", "The end was put before the beginning."),
        ),
    ),
    "word_missing": (
        _COMPLETE,
        Label(
            "a word is missing",
            "A text from whose middle a word was taken out.",
            ("There is a gap in it.", "Somewhere a word was dropped."),
        ),
    ),
    "odd_word": (
        Label(
            "every word fits",
            "A text all of whose words belong there.",
            ("No word is out of place.", "All words come from one author's sentence."),
        ),
        Label(
            "a word does not fit",
            "A text with a word that belongs to another text.",
            ("One word is out of place.", "Somebody put a wrong word in."),
        ),
    ),
    "negation": (
        Label(
            "with a negation",
            "A text that denies something: not, no, never, nothing.",
            ("It says what is not so.", "Something in it is negated."),
        ),
        Label(
            "without a negation",
            "A text that denies nothing.",
            ("It has no word like not or never.", "Everything in it is affirmed."),
        ),
    ),
    "person": (
        Label(
            "first person",
            "A text in which the writer says I or we.",
            ("The author speaks of themselves.", "Told with my, me, our and us."),
        ),
        Label(
            "third person",
            "A text that speaks of him, her or them and never of the writer.",
            ("It is about other people.", "Told with he, she and they."),
        ),
    ),
    "tense": (
        Label(
            "past tense",
            "A text about what was: its auxiliary verbs are in the past.",
            ("It looks back.", "Told with was, were, had and did."),
        ),
        Label(
            "present tense",
            "A text about what is: its auxiliary verbs are in the present.",
            ("It speaks of now.", "Told with is, are, has and does."),
        ),
    ),
    "lengths": (
        Label("short", "A text of about eleven words.", ("A few words.", "The shortest kind.")),
        Label(
            "middling",
            "A text of about sixteen words.",
            ("Neither short nor long.", "The middle length."),
        ),
        Label(
            "long",
            "A text of about twenty-one words.",
            ("Many words.", "The longest kind."),
        ),
    ),
    "halves_order": (
        Label(
            "in order",
            "The second text continues where the first stops.",
            ("First the beginning, then the rest.", "What is said first stands first."),
        ),
        Label(
            "reversed",
            "The second text ends where the first begins.",
            ("First the rest, then the beginning.", "What is said first stands last."),
        ),
    ),
    "continues": (
        Label(
            "continues",
            "The second text is the continuation of the first.",
            ("Both are parts of one text.", "The first leads on to the second."),
        ),
        Label(
            "does not continue",
            "The second text is the continuation of some other text.",
            ("They are parts of different texts.", "The first does not lead on to the second."),
        ),
    ),
    "same_label": (
        Label(
            "alike",
            "Both texts are of the same kind: same subject, opinion or author.",
            ("The two belong together.", "What holds of one holds of the other."),
        ),
        Label(
            "unlike",
            "The texts are of different kinds: another subject, opinion or author.",
            ("The two do not belong together.", "They differ in what they are."),
        ),
    ),
}
