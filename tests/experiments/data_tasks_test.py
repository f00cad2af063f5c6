"""Tasks: levels are disjoint, splits are disjoint and fixed, everything is deterministic."""

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import corpora, plan, presets, tasks
from experiments.data.corpora import SPECS, normalise
from experiments.data.task import SPLITS, balanced, shuffled, slug, split_of

REAL = ("full", "quick", "smoke")
ALL = (*REAL, "toy")


def by_level(preset, **changes):
    out = {level: [] for level in tasks.LEVELS}
    for task in tasks.build(tasks.config(preset, **changes)):
        out[task.level].append(task)
    return out


def members(found):
    return {m for task in found for side in task.members for m in side}


def pairs(found):
    return {frozenset((a, b)) for t in found for a, b in itertools.product(*t.members)}


@pytest.mark.parametrize(
    ("preset", "counts"),
    [("full", (72, 12, 12, 12)), ("quick", (12, 3, 3, 3)), ("smoke", (4, 1, 1, 1)),
     ("toy", (4, 1, 1, 1))],
)  # fmt: skip
def test_counts(preset, counts):
    levels = by_level(preset)
    got = tuple(len(levels[x]) for x in ("seen", "unseen_pair", "unseen_label", "unseen_corpus"))
    assert got == counts


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("preset", ALL)
def test_levels_are_disjoint(preset, seed):
    """The law, spelled out apart from ``plan.check``."""
    levels = by_level(preset, seed=seed)
    pool = tasks.seen_pairs_pool(tasks.config(preset, seed=seed))
    held = {(p.corpus, x) for p in presets.PRESETS[preset].pairs for x in p.held_out}
    for trained in (levels["seen"], pool):
        assert {t.level for t in trained} == {"seen"}
        assert not members(trained) & held
        assert not pairs(trained) & pairs(levels["unseen_pair"])
        families = {SPECS[corpus].family for corpus, _ in members(trained)}
        assert not families & {SPECS[t.corpus].family for t in levels["unseen_corpus"]}
    assert members(levels["unseen_pair"]) <= members(levels["seen"])
    assert all(members([t]) & held for t in levels["unseen_label"])
    assert not members(levels["unseen_corpus"]) & held
    names = [t.name for found in levels.values() for t in found]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("preset", ALL)
def test_pool_is_every_allowed_ordered_pair(preset):
    config = tasks.config(preset)
    pool = tasks.seen_pairs_pool(config)
    expected = 0
    for p in config.pairs:
        n = len([x for x in plan._labels(p) if x[1] not in p.held_out])
        expected += n * (n - 1) - 2 * p.unseen_pair
    assert len(pool) == len({t.name for t in pool}) == expected
    seen = {t.name for t in tasks.build(config) if t.level == "seen" and t.kind == "pair"}
    assert seen <= {t.name for t in pool}


@pytest.mark.parametrize("where", ["pair", "rest", "cross"])
def test_a_leaked_label_is_caught(monkeypatch, where):
    """Mutation: a held-out label slipped into a seen task fails the plan's own check."""
    hockey = ("20newsgroups", "rec.sport.hockey")
    config = tasks.config("full")
    if where == "cross":
        config = dataclasses.replace(config, cross=((hockey, ("spam", "spam")),))
    elif where == "rest":
        config = dataclasses.replace(config, rest=(hockey,))
    else:
        # A planner that forgets which labels are held out.
        monkeypatch.setattr(plan, "_seen_labels", plan._labels)
    with pytest.raises(ValueError, match=r"held-out label|not a seen label"):
        tasks.build(config)


def test_leaks_of_pairs_and_corpora_are_caught():
    built = tasks.build(tasks.config("full"))
    seen = [t for t in built if t.level == "seen"]
    for level, message in [("unseen_pair", "pair is in a seen"), ("unseen_label", "all its labels"),
                           ("unseen_corpus", "all its labels")]:  # fmt: skip
        leak = dataclasses.replace(seen[0], level=level, name="leak")
        with pytest.raises(ValueError, match=message):
            plan.check([*seen, leak])
    # Another corpus of film reviews is not an unseen corpus.
    kin = dataclasses.replace(
        seen[0],
        name="kin",
        level="unseen_corpus",
        members=((("vader_movie", "negative"),), (("vader_movie", "positive"),)),
    )
    with pytest.raises(ValueError, match="kin to a seen one"):
        plan.check([*seen, kin])
    with pytest.raises(ValueError, match="named twice"):
        plan.check([seen[0], seen[0]])
    stranger = next(t for t in built if t.level == "unseen_label")
    with pytest.raises(ValueError, match="in no seen task"):
        plan.check([*seen, dataclasses.replace(stranger, level="unseen_pair", name="stranger")])


def test_rest_leaves_out_held_out_labels_and_pairs():
    levels = by_level("full")
    rest = [t for t in levels["seen"] if t.kind == "rest"]
    assert len(rest) == 6 and {t.class_names.index("other") for t in rest} == {0, 1}
    for task in rest:
        one, others = sorted(task.members, key=len)
        assert len(one) == 1 and len(others) > 3
        assert not pairs([task]) & pairs(levels["unseen_pair"])


@pytest.mark.parametrize("preset", ALL)
def test_labels_are_used_evenly_and_in_both_places(preset):
    seen = by_level(preset)["seen"]
    for p in presets.PRESETS[preset].pairs:
        own = [t for t in seen if t.kind == "pair" and t.corpus == p.corpus]
        zero = [t.members[0][0] for t in own]
        one = [t.members[1][0] for t in own]
        uses = [(zero + one).count(m) for m in members(own)]
        assert max(uses) - min(uses) <= 2
        if len(own) > 4:
            assert all(abs(zero.count(m) - one.count(m)) <= 2 for m in members(own))


def test_bad_plans_have_clear_errors():
    quick = tasks.config("quick")
    with pytest.raises(ValueError, match="unknown task preset 'huge'; known: full, quick"):
        tasks.config("huge")
    for bad, message in [
        (presets.PairPlan("toy", 3, labels=("tennis", "chess")), "no label 'tennis'"),
        (presets.PairPlan("toy", 3, held_out=("tennis",)), "no label 'tennis'"),
        (presets.PairPlan("nope", 3), "unknown corpus 'nope'"),
        (presets.PairPlan("toy", 50), "50 tasks asked for, 20 ordered pairs"),
        (presets.PairPlan("toy", 1), r"no seen task uses \[\('toy'"),
    ]:
        with pytest.raises(ValueError, match=message):
            tasks.build(dataclasses.replace(quick, pairs=(bad,), unseen_label=0))


def test_descriptions_belong_to_their_class():
    for task in tasks.build(tasks.config("full")):
        assert set(task.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-")
        for k in (0, 1):
            assert f"Class {k}: {task.class_descriptions[k]}" in task.description
            assert len(task.paraphrases[k]) >= 2
            if len(task.members[k]) == 1:
                corpus, label = task.members[k][0]
                assert plan.LABELS[corpus][label].description == task.class_descriptions[k]
            else:
                assert task.class_names[k] == "other"


@settings(max_examples=25, deadline=None)
@given(st.permutations([f"t{i}" for i in range(7)]), st.integers(0, 5))
def test_balanced(items, cap):
    zero, one = items[::2], items[1::2]
    texts, labels = balanced([zero, one], cap)
    n = min(cap, len(zero), len(one))
    assert labels.dtype == np.int32 and labels.tolist() == [0, 1] * n
    assert texts[::2] == zero[:n] and texts[1::2] == one[:n]
    three, sides = balanced([zero, one, items], cap)
    assert three[2::3] == items[:n] and sides.tolist() == [0, 1, 2] * n
    assert shuffled(items) == shuffled(items[::-1])


def test_split_is_a_fixed_function_of_the_unit():
    """Pinned: a change here would move texts between the splits of stored experiments."""
    assert [split_of(x) for x in ("a", "b", "c", "hello world", "brown/ca01", "z9")] == PINNED
    got = [split_of(str(i)) for i in range(4000)]
    for split, share in zip(SPLITS, (0.6, 0.15, 0.25), strict=True):
        assert abs(got.count(split) / 4000 - share) < 0.03
    assert slug("rec.sport-Hockey 2!") == "rec_sport_hockey_2"


PINNED = ["train", "test", "train", "test", "train", "validation"]


def disjoint(found):
    """normalised text -> split over many tasks; asserts that each text has one split."""
    place = {}
    for task, got in found:
        for split in SPLITS:
            texts, labels = getattr(got, split)
            assert len(texts) == len(labels) == len(set(texts)) > 0, task.name
            assert labels.dtype == np.int32 and labels.sum() * 2 == len(labels), task.name
            for text in texts:
                assert place.setdefault(normalise(text), split) == split, (task.name, text)
    return place


def test_data_of_made_up_tasks():
    built = tasks.build(tasks.config("toy"))
    caps = tasks.Caps(train=40, validation=10, test=20)
    found = [(task, tasks.data(task, caps=caps)) for task in built]
    disjoint(found)
    for task, got in found:
        assert len(got.train[0]) == 80 and len(got.validation[0]) == 20 and len(got.test[0]) == 40
        for k in (0, 1):
            corpus, label = task.members[k][0]
            own = [t for t, y in zip(*got.train, strict=True) if y == k]
            assert own == tasks.label_texts(corpus, label, "train")[:40]
    # A smaller cap takes the first texts: examples stay the same when the caps grow.
    assert tasks.data(built[0], caps=tasks.Caps(train=5)).train[0] == found[0][1].train[0][:10]


def test_splits_that_ignore_the_hash_are_seen(monkeypatch):
    """Mutation: splitting by position within a class puts one text in two splits."""
    tasks._parts.cache_clear()
    found = []
    for order in (SPLITS, SPLITS[::-1]):  # two tasks, each with a split of its own
        turn = itertools.cycle(order)
        monkeypatch.setattr(tasks, "split_of", lambda unit, turn=turn: next(turn))
        tasks._parts.cache_clear()
        found += [(t, tasks.data(t)) for t in tasks.build(tasks.config("toy"))]
    tasks._parts.cache_clear()
    with pytest.raises(AssertionError):
        disjoint(found)


def test_rest_and_cross_data(monkeypatch):
    base = tasks.config("toy")
    config = dataclasses.replace(
        base,
        rest=(("toy", "cooking"), ("toy", "chess")),
        cross=((("toy", "sailing"), ("toy_far", "trains")),),
        held_out_corpora=(),
        unseen_corpus=0,
    )
    built = {t.kind: t for t in tasks.build(config) if t.level == "seen"}
    rest = tasks.data(built["rest"], caps=tasks.Caps(10, 4, 4))
    zero, one = built["rest"].members
    many, few = (0, one) if len(zero) > 1 else (1, zero)
    side = [t for t, y in zip(*rest.train, strict=True) if y == many]
    of = {t: m for m in (*zero, *one) for t in tasks.label_texts(*m, "train")}
    drawn = [of[t] for t in side]
    assert set(drawn) == set(zero if many == 0 else one) and few[0] not in drawn
    counts = [drawn.count(m) for m in set(drawn)]
    assert max(counts) - min(counts) <= 1
    cross = built["cross"]
    assert cross.name == "cross--toy-sailing--toy_far-trains"
    assert "made-up sentences and other made-up" in cross.description
    assert len(tasks.data(cross).test[0]) > 20


def test_held_out_labels_are_not_read_by_seen_tasks(monkeypatch):
    read = []
    true = tasks.label_texts
    monkeypatch.setattr(
        tasks, "label_texts", lambda c, x, s, k=None: read.append((c, x)) or true(c, x, s, k)
    )
    for task in tasks.build(tasks.config("toy")):
        if task.level in ("seen", "unseen_pair"):
            tasks.data(task)
    assert set(read) == {("toy", x) for x in ("cooking", "sailing", "gardening", "chess")}


def test_data_errors():
    task = tasks.build(tasks.config("toy"))[0]
    with pytest.raises(ValueError, match="unknown source 'ftp:x'"):
        tasks.data(dataclasses.replace(task, source="ftp:x"))
    with pytest.raises(ValueError, match="has no label 'tennis'"):
        tasks.label_texts("toy", "tennis", "train")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        tasks.label_texts("toy", "chess", "dev")
    with pytest.raises(ValueError, match="no test text of class 'cooking'"):
        tasks.data(task, caps=tasks.Caps(test=0))
    with pytest.raises(ValueError, match="level 'odd'"):
        dataclasses.replace(task, level="odd")


def test_same_in_another_process():
    code = (
        "import dataclasses, json; from experiments.data import tasks as t;"
        "b = t.build(t.config('full')); p = t.seen_pairs_pool(t.config('full'));"
        "d = t.data(t.build(t.config('toy'))[0]);"
        "print(json.dumps([[x.name for x in b + p], d.train[0], dataclasses.asdict(b[0])]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, env={"PYTHONHASHSEED": "7"}
    )
    built = tasks.build(tasks.config("full"))
    pool = tasks.seen_pairs_pool(tasks.config("full"))
    toy = tasks.data(tasks.build(tasks.config("toy"))[0])
    names = [t.name for t in built + pool]
    here = json.dumps([names, toy.train[0], dataclasses.asdict(built[0])])
    assert json.loads(out.stdout) == json.loads(here)


@pytest.mark.slow
def test_real_tasks(monkeypatch):
    """The full plan on the real packages (fetched if they are not in the cache)."""
    built = tasks.build(tasks.config("full"))
    found = [(task, tasks.data(task)) for task in built]
    disjoint(found)
    for task, got in found:
        assert len(got.train[0]) >= 160 and len(got.test[0]) >= 50, task.name
    texts = {}
    for level in ("seen", "unseen_corpus"):
        sides = [side for task in built if task.level == level for side in task.members]
        texts[level] = set()
        for corpus in {member[0] for side in sides for member in side}:
            loaded = corpora.load(corpus)
            own = {normalise(t) for t in loaded.texts}
            assert len(set(loaded.texts)) == len(own)
            texts[level] |= own
    assert not texts["seen"] & texts["unseen_corpus"]
