"""Tasks of form and of pairs: what each kind does to a text, and that nothing else tells."""

from collections import Counter

import numpy as np
import pytest

from experiments.data import forms, tasks
from experiments.data.corpora import normalise
from experiments.data.descriptions.forms import FORMS
from experiments.data.task import SPLITS, parted

CHANGED = ("neighbours_swapped", "words_shuffled", "halves_exchanged", "word_missing", "odd_word")
PAIRS = ("halves_order", "continues", forms.SAME_LABEL)
SELECTED = ("negation", "person", "tense")


def words(*texts):
    return Counter(word for text in texts for word in text.split())


@pytest.fixture(scope="module")
def sources():
    return [tasks.label_texts("toy", label, "train") for label in ("chess", "sailing")]


@pytest.fixture(scope="module")
def spoken():
    """Sentences with and without each property, those with one longer by a word on average."""
    rng, out = np.random.default_rng(0), []
    starts = ("i was not", "i am", "he was", "they are never", "we had", "she is", "a dog has")
    for k in range(300):
        size = 6 + int(rng.integers(0, 9)) + (k % 7 == 0)
        out.append(" ".join([starts[k % 7], *(f"w{rng.integers(50)}" for _ in range(size))]))
    return [out[::2], out[1::2]]


@pytest.mark.parametrize("kind", FORMS)
def test_classes_are_described_and_of_equal_size(kind, sources, spoken):
    given = spoken if kind in SELECTED else sources
    if kind == "lengths":
        given = [[f"{a} {b}" for a, b in zip(x[:100:2], x[1:100:2], strict=True)] for x in sources]
    sides = forms.sides(kind, given, 30)
    assert len(sides) == len(FORMS[kind])
    assert len({len(side) for side in sides}) == 1 and len(sides[0]) > 10
    every = [text for side in sides for text in side]
    assert len(set(every)) == len(every)
    assert all((parted(text) is not None) == (kind in PAIRS) for text in every)
    said = [text for label in FORMS[kind] for text in (label.description, *label.paraphrases)]
    assert len(set(said)) == len(said) == 3 * len(sides)


@pytest.mark.parametrize("kind", CHANGED)
def test_a_changed_text_is_that_text_changed_as_the_class_says(kind, sources):
    before, after = forms.sides(kind, sources, 20)
    known = {normalise(text) for texts in sources for text in texts}
    for one, two in zip(before, after, strict=True):
        a, b = one.split(), two.split()
        moved = [k for k, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]]
        if kind == "word_missing":
            assert any(" ".join(w.split()[:-1]) == one for w in known)
            assert a[: moved[0]] == b[: moved[0]] and a[moved[0] + 1 :] == b[moved[0] : -1]
            continue
        assert one in known
        if kind == "neighbours_swapped":
            assert len(moved) == 2 and moved[1] == moved[0] + 1
            assert a[moved[0]] == b[moved[1]] and a[moved[1]] == b[moved[0]]
        elif kind == "words_shuffled":
            assert sorted(a) == sorted(b) and a[0] == b[0] and a[-1] == b[-1]
        elif kind == "halves_exchanged":
            assert a[6:] + a[:6] == b
        else:
            assert len(moved) == 1 and len(b[moved[0]]) > 3


@pytest.mark.parametrize("kind", [*CHANGED[:3], "odd_word"])
def test_words_do_not_tell_the_class(kind, sources):
    before, after = forms.sides(kind, sources, 20)
    assert words(*before) == words(*after)
    assert [len(x.split()) for x in before] == [len(x.split()) for x in after]
    if kind == "odd_word":  # mutation: a word that comes from nowhere tells it
        after[0] = after[0] + " zebra"
        assert words(*before) != words(*after)


@pytest.mark.parametrize("kind", ["continues", forms.SAME_LABEL])
def test_every_half_of_a_pair_is_once_in_either_class(kind, sources):
    sides = [[parted(text) for text in side] for side in forms.sides(kind, sources, 20)]
    for place in (0, 1):
        zero, one = (Counter(pair[place] for pair in side if pair) for side in sides)
        assert zero == one
    own = {pair for pair in sides[0] if pair}
    assert not own & set(sides[1])  # the classes differ in who stands next to whom


def test_pairs_are_what_their_class_says(sources):
    texts = [text for label in sources for text in label]
    for kind, right in (("continues", 0), ("halves_order", 0)):
        for text in forms.sides(kind, sources, 20)[right]:
            assert text.replace(" [SEP] ", " ") in texts
    for text in forms.sides("continues", sources, 20)[1]:
        assert text.replace(" [SEP] ", " ") not in texts
    of = {text: k for k, label in enumerate(sources) for text in label}
    for k, side in enumerate(forms.sides(forms.SAME_LABEL, sources, 20)):
        for text in side:
            a, b = parted(text) or ("", "")
            assert (of[a] != of[b]) == bool(k)


@pytest.mark.parametrize(
    ("kind", "zero", "one"),
    [("negation", {"not", "never"}, set()), ("person", {"i", "we"}, {"he", "she", "they"}),
     ("tense", {"was", "had"}, {"am", "is", "are", "has"})],
)  # fmt: skip
def test_selected_texts_have_the_property_and_equal_lengths(kind, zero, one, spoken):
    sides = forms.sides(kind, spoken, 30)
    for own, other, side in zip((zero, one), (one, zero), sides, strict=True):
        for text in side:
            assert not set(text.split()) & other
            assert not own or set(text.split()) & own
    lengths = [[len(text.split()) for text in side] for side in sides]
    assert Counter(n // 3 for n in lengths[0]) == Counter(n // 3 for n in lengths[1])
    if kind == "negation":  # mutation: taken as they come, lengths would tell
        plain = [[], []]
        for text in spoken[0] + spoken[1]:
            plain[not zero & set(text.split())].append(len(text.split()))
        assert (
            abs(np.mean(plain[0]) - np.mean(plain[1]))
            > 0.5
            > abs(np.mean(lengths[0]) - np.mean(lengths[1]))
        )


def test_lengths_are_cuts_of_the_same_texts(sources):
    long = [[f"{a} {b}" for a, b in zip(x[:100:2], x[1:100:2], strict=True)] for x in sources]
    sides = forms.sides("lengths", long, 30)
    for texts in zip(*sides, strict=True):
        sizes = [len(text.split()) for text in texts]
        assert all(abs(n - want) <= 1 for n, want in zip(sizes, forms.LENGTHS, strict=True))
        assert texts[2].startswith(texts[1]) and texts[1].startswith(texts[0])


def test_a_smaller_cap_gives_the_first_ones_and_repeats_are_left_out(sources):
    for kind in (*CHANGED, *PAIRS):
        many, few = (forms.sides(kind, sources, cap) for cap in (20, 5))
        for a, b in zip(many, few, strict=True):
            assert a[:5] == b[:5]
    twice = [texts + texts for texts in sources]
    for side in forms.sides("neighbours_swapped", twice, 500):
        assert len(set(side)) == len(side)
    assert forms.sides("negation", sources, 5) == []  # made-up sentences deny nothing


def test_no_text_of_a_made_up_task_is_in_two_splits():
    place: dict[str, str] = {}
    for task in tasks.build(tasks.config("toy+kinds")):
        got = tasks.data(task, caps=tasks.Caps(30, 10, 12))
        for split in SPLITS:
            texts, labels = getattr(got, split)
            assert np.bincount(labels).tolist() == [len(labels) // task.classes] * task.classes
            for text in texts:
                assert place.setdefault(text, split) == split, (task.name, text)


def test_classes_may_be_turned_round():
    built = {t.name: t for t in tasks.build(tasks.config("toy+kinds"))}
    plain, turned = built["toy--words_shuffled"], built["toy--words_shuffled--turned"]
    assert plain.class_names == turned.class_names[::-1]
    zero, one = (tasks.data(t, caps=tasks.Caps(6, 2, 2)).train for t in (plain, turned))
    assert zero[0][::2] == one[0][1::2] and zero[0][1::2] == one[0][::2]
