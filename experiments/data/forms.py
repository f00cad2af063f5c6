"""Tasks about the form of a text and about pairs of texts, from the sentences of any corpus.

A kind of task turns the texts of one label into as many texts of each of its classes:

====================  ==========================================================================
neighbours_swapped    two words that follow each other exchanged, or not
words_shuffled        all words but the first and the last in random order, or not
halves_exchanged      the second half before the first, or not
word_missing          a word taken out of the middle, or the last one
odd_word              a word exchanged with that of another text, or not
negation              a text with a negation, or without
person, tense         pronouns of the first or third person; auxiliaries of the past or present
lengths               cut to about 11, 16 or 21 words
halves_order          pair: (first half, second half), or the other way round
continues             pair: (first half, its second half), or that of another text
same_label            pair: of the same of two labels, or one of each
====================  ==========================================================================

What could give a class away without its form is the same in all classes: where a text is changed,
each text is in every class, and its words are compared without capitals and punctuation; halves and
words that are exchanged come from the same two texts; where texts are selected, each label gives
equally many of each length to each class. All choices are hashes of the texts.

Reference: Conneau 2018, 1805.01070 (probing tasks: word order, odd word, tense, length).
Deviates: tense, person and negation are decided by lists of words and not by a parser; a text that
has words of both sides is left out.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from experiments.data.corpora import normalise
from experiments.data.task import digest, joined

Sides = tuple[list[str], ...]  # texts of each class, the same number of each
FEWEST_WORDS, MOST_WORDS = 8, 20  # of a text that is changed; a base may read no more of it
SHORTEST, LONGEST = 5, 10  # words of half a text
LENGTHS = (11, 16, 21)  # at least the ten words that decide a text's split
_NEGATION = re.compile(r"\b(not|no|never|none|nobody|nothing|cannot)\b|n['’ ]t\b", re.IGNORECASE)
_FIRST = re.compile(r"\b(i|my|me|we|our|us|mine|ours)\b", re.IGNORECASE)
_THIRD = re.compile(r"\b(he|him|his|she|her|they|them|their)\b", re.IGNORECASE)
_PAST = re.compile(r"\b(was|were|had|did)\b|\b(was|were|had|did)n['’ ]t\b", re.IGNORECASE)
_PRESENT = re.compile(r"\b(is|are|am|has|does|do)\b|['’](s|re|m)\b", re.IGNORECASE)


def _words(text: str) -> list[str]:
    """The first words, without capitals and punctuation, which would mark a place."""
    return normalise(text).split()[:MOST_WORDS]


def _changed(change: Callable[[list[str]], list[str] | None]) -> Callable[[Sequence[str]], Sides]:
    """Each text, and the same changed; texts that the change leaves as they are stay out."""

    def make(texts: Sequence[str]) -> Sides:
        before, after = [], []
        for text in texts:
            words = _words(text)
            changed = change(words) if len(words) >= FEWEST_WORDS else None
            if changed is not None and changed != words:
                before.append(" ".join(words))
                after.append(" ".join(changed))
        return before, after

    return make


def _place(words: Sequence[str], purpose: str, most: int) -> int:
    """A position from 1 on, below `most`."""
    return 1 + digest(purpose, " ".join(words)) % (most - 1)


def _swapped(words: list[str]) -> list[str]:
    at = _place(words, "swap", len(words) - 2)
    return [*words[:at], words[at + 1], words[at], *words[at + 2 :]]


def _shuffled(words: list[str]) -> list[str]:
    text = " ".join(words)
    order = sorted(range(1, len(words) - 1), key=lambda k: digest(f"shuffle {k}", text))
    return [words[0], *(words[k] for k in order), words[-1]]


def _exchanged(words: list[str]) -> list[str]:
    return words[len(words) // 2 :] + words[: len(words) // 2]


def _missing(texts: Sequence[str]) -> Sides:
    """Both classes lack a word, so that their lengths are the same."""
    whole, gap = [], []
    for text in texts:
        words = _words(text)
        if len(words) >= FEWEST_WORDS:
            at = _place(words, "gap", len(words) - 2)
            whole.append(" ".join(words[:-1]))
            gap.append(" ".join(words[:at] + words[at + 1 :]))
    return whole, gap


def _odd(texts: Sequence[str]) -> Sides:
    """Texts in twos, of which a word of four letters or more changes places."""
    before, after = [], []
    usable = [_words(text) for text in texts]
    places = [[k for k, word in enumerate(words[1:], 1) if len(word) > 3] for words in usable]
    kept = [(words, at) for words, at in zip(usable, places, strict=True)
            if len(words) >= FEWEST_WORDS and at]  # fmt: skip
    for (one, here), (other, there) in zip(kept[::2], kept[1::2], strict=False):
        i = here[digest("odd", " ".join(one)) % len(here)]
        j = there[digest("odd", " ".join(other)) % len(there)]
        if one[i] != other[j]:
            before += [" ".join(one), " ".join(other)]
            after.append(" ".join([*one[:i], other[j], *one[i + 1 :]]))
            after.append(" ".join([*other[:j], one[i], *other[j + 1 :]]))
    return before, after


def _selected(
    zero: Callable[[str], bool], one: Callable[[str], bool]
) -> Callable[[Sequence[str]], Sides]:
    """Texts of two properties, equally many of each length in steps of three words."""

    def make(texts: Sequence[str]) -> Sides:
        bins: dict[int, Sides] = defaultdict(lambda: ([], []))
        for text in texts:
            is_zero, is_one = zero(text), one(text)
            if is_zero != is_one:
                bins[len(text.split()) // 3][int(is_one)].append(text)
        pairs = [pair for sides in bins.values() for pair in zip(*sides, strict=False)]
        pairs.sort(key=lambda pair: digest("order", pair[0]))
        return [a for a, _ in pairs], [b for _, b in pairs]

    return make


def _lengths(texts: Sequence[str]) -> Sides:
    sides: Sides = tuple([] for _ in LENGTHS)
    for text in texts:
        words = normalise(text).split()
        if len(words) > LENGTHS[-1]:
            for side, length in zip(sides, LENGTHS, strict=True):
                off = digest(f"length {length}", text) % 3 - 1
                side.append(" ".join(words[: length + off]))
    return sides


def _halves(texts: Sequence[str]) -> list[tuple[str, str]]:
    out = []
    for text in texts:
        words = text.split()
        half = min(len(words) // 2, LONGEST)
        if half >= SHORTEST:
            out.append((" ".join(words[:half]), " ".join(words[half : 2 * half])))
    return out


def _halves_order(texts: Sequence[str]) -> Sides:
    halves = _halves(texts)
    return [joined(a, b) for a, b in halves], [joined(b, a) for a, b in halves]


def _continues(texts: Sequence[str]) -> Sides:
    """Texts in twos: every half is once in either class."""
    own, other = [], []
    halves = _halves(texts)
    for (a, b), (c, d) in zip(halves[::2], halves[1::2], strict=False):
        own += [joined(a, b), joined(c, d)]
        other += [joined(a, d), joined(c, b)]
    return own, other


def _same_label(sources: Sequence[Sequence[str]]) -> Sides:
    """Two texts of each of two labels at a time: every text is once in either class, in its place
    of the pair."""
    alike, unlike = [], []
    zero, one = sources
    count = min(len(zero), len(one)) // 2
    for k in range(count):
        (a, b), (c, d) = zero[2 * k : 2 * k + 2], one[2 * k : 2 * k + 2]
        alike += [joined(a, b), joined(c, d)]
        unlike += [joined(a, d), joined(c, b)]
    return alike, unlike


class Kind(NamedTuple):
    """How texts become those of the classes of `descriptions.FORMS`."""

    make: Callable[[Sequence[str]], Sides]  # of the texts of one label
    pair: bool = False  # whether its texts are pairs
    every: bool = False  # whether all texts are looked at, because few have what it asks for


def _has(pattern: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda text: pattern.search(text) is not None


KINDS: dict[str, Kind] = {
    "neighbours_swapped": Kind(_changed(_swapped)),
    "words_shuffled": Kind(_changed(_shuffled)),
    "halves_exchanged": Kind(_changed(_exchanged)),
    "word_missing": Kind(_missing),
    "odd_word": Kind(_odd),
    "negation": Kind(
        _selected(_has(_NEGATION), lambda text: _NEGATION.search(text) is None), every=True
    ),
    "person": Kind(_selected(_has(_FIRST), _has(_THIRD)), every=True),
    "tense": Kind(_selected(_has(_PAST), _has(_PRESENT)), every=True),
    "lengths": Kind(_lengths, every=True),
    "halves_order": Kind(_halves_order, pair=True),
    "continues": Kind(_continues, pair=True),
}
SAME_LABEL = "same_label"  # needs the texts of two labels at once


def sides(kind: str, sources: Sequence[Sequence[str]], cap: int) -> list[list[str]]:
    """The texts of each class, in the order of `descriptions.FORMS[kind]`.

    Args:
      kind: key of `FORMS`.
      sources: texts of each label, in their fixed order.
      cap: how many texts a class needs; where each text serves, no more than is needed are read.

    Returns:
      Texts by class, the labels in turn. A smaller `cap` gives the first ones, but for kinds that
      look at every text, which give them all.
    """
    if kind == SAME_LABEL:
        return _different(zip(*_same_label(sources), strict=True))
    how = KINDS[kind]
    pairs = [how.make(texts if how.every else texts[: 3 * cap]) for texts in sources]
    rows = [list(zip(*each, strict=True)) for each in pairs]  # label -> a text of each class
    turns = range(max(map(len, rows)))
    return _different(each[i] for i in turns for each in rows if i < len(each))


def _different(rows: Iterable[tuple[str, ...]]) -> list[list[str]]:
    """Texts by class, of the rows none of whose texts came before."""
    known: set[str] = set()
    kept = []
    for row in rows:
        if len(set(row)) == len(row) and not known & set(row):
            kept.append(row)
            known.update(row)
    return [list(side) for side in zip(*kept, strict=True)] if kept else []
