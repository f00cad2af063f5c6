"""What `+kinds` adds to a preset: tasks of several labels, of form and of pairs of texts."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class KindPlan:
    """Tasks beyond pairs of labels, on the corpora and seen labels of a preset."""

    forms: tuple[tuple[str, tuple[str, ...]], ...]  # seen kind -> corpora, each in both orders
    unseen: tuple[tuple[str, tuple[str, ...]], ...]  # kind that no seen task has -> corpora
    same_label: tuple[tuple[str, int], ...] = ()  # corpus -> seen tasks of two of its labels
    labels: tuple[tuple[str, int, int], ...] = ()  # corpus, classes, number of seen tasks


_SENTENCES = ("rotten_tomatoes", "imdb", "subjectivity", "brown", "vader_nyt", "spam")
_WORDS = (*_SENTENCES, "20newsgroups", "reuters_r8", "vader_tweets")  # some without punctuation
_SPEAKING = ("imdb", "brown", "spam", "20newsgroups", "rotten_tomatoes")
_LONG = ("imdb", "brown", "spam", "20newsgroups", "reuters_r8")

KIND_PLANS: dict[str, KindPlan] = {
    "full": KindPlan(
        forms=(
            ("neighbours_swapped", _WORDS),
            ("words_shuffled", _WORDS),
            ("word_missing", _WORDS),
            ("odd_word", _WORDS),
            ("negation", _SPEAKING),
            ("person", _SPEAKING),
            ("halves_order", _WORDS),
        ),
        unseen=(
            ("halves_exchanged", ("rotten_tomatoes", "brown", "20newsgroups", "imdb")),
            ("tense", ("rotten_tomatoes", "brown", "20newsgroups", "imdb")),
            ("lengths", ("brown", "20newsgroups", "imdb")),
            ("continues", ("rotten_tomatoes", "brown", "20newsgroups", "imdb")),
        ),
        same_label=(
            ("20newsgroups", 24),
            ("reuters_r8", 6),
            ("brown", 8),
            *((corpus, 1) for corpus in ("rotten_tomatoes", "imdb", "vader_nyt", "vader_tweets")),
            *((corpus, 1) for corpus in ("spam", "subjectivity")),
        ),
        labels=(
            *(("20newsgroups", count, 6) for count in (3, 4, 5, 6)),
            ("reuters_r8", 3, 4),
            ("reuters_r8", 4, 2),
            ("brown", 3, 4),
            ("brown", 4, 2),
        ),
    ),
    "quick": KindPlan(
        forms=(
            ("neighbours_swapped", ("rotten_tomatoes", "20newsgroups")),
            ("words_shuffled", ("rotten_tomatoes", "reuters_r8")),
            ("word_missing", ("subjectivity",)),
            ("negation", ("rotten_tomatoes",)),
            ("halves_order", ("rotten_tomatoes", "20newsgroups")),
        ),
        unseen=(
            ("halves_exchanged", ("rotten_tomatoes",)),
            ("tense", ("20newsgroups",)),
            ("continues", ("rotten_tomatoes",)),
        ),
        same_label=(("20newsgroups", 3), ("rotten_tomatoes", 1)),
        labels=(("20newsgroups", 3, 2), ("20newsgroups", 4, 1)),
    ),
    "smoke": KindPlan(
        forms=(("neighbours_swapped", ("20newsgroups",)),),
        unseen=(("continues", ("20newsgroups",)),),
        same_label=(("20newsgroups", 1),),
        labels=(("20newsgroups", 3, 1),),
    ),
    "toy": KindPlan(
        forms=(("words_shuffled", ("toy",)),),
        unseen=(("continues", ("toy",)),),
        same_label=(("toy", 1),),
        labels=(("toy", 3, 1),),
    ),
}
