"""What +kinds adds to a plan: levels stay disjoint, the presets themselves stay as they are."""

import dataclasses
import itertools

import pytest

from experiments import config as settings
from experiments.data import kind_presets, kinds, plan, tasks
from experiments.data.descriptions.forms import FORMS
from experiments.data.kind_presets import KIND_PLANS, KindPlan

REAL = tuple(KIND_PLANS)


def built(preset, seed=0):
    return tasks.build(tasks.config(preset, seed=seed))


def members(found):
    return {m for task in found for side in task.members for m in side}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", REAL)
def test_the_preset_is_in_it_unchanged(name, seed):
    plain, more = built(name, seed), built(f"{name}+kinds", seed)
    known = {task.name for task in plain}
    assert [task for task in more if task.name in known] == plain
    added = [task for task in more if task.name not in known]
    assert {task.level for task in added} == {"seen", "unseen_kind"}
    assert len({task.name for task in more}) == len(more)
    assert all(len(set(task.class_descriptions)) == task.classes for task in added)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", REAL)
def test_levels_are_disjoint(name, seed):
    """The law, spelled out apart from `plan.check`."""
    found = built(f"{name}+kinds", seed)
    seen = [task for task in found if task.level == "seen"]
    new = [task for task in found if task.level == "unseen_kind"]
    assert not {task.kind for task in seen} & {task.kind for task in new}
    assert members(new) <= members(seen)
    held = {(p.corpus, x) for p in tasks.PRESETS[name].pairs for x in p.held_out}
    assert not members(seen) & held
    pairs = {
        frozenset((task.members[0][0], task.members[1][0]))
        for task in found
        if task.level == "unseen_pair"
    }
    told = [task for task in seen if task.kind in ("labels", "same_label")]
    assert told
    for task in told:
        for a, b in itertools.combinations(sorted(members([task])), 2):
            assert frozenset((a, b)) not in pairs, task.name


def test_hundreds_of_tasks_of_two_to_six_classes():
    found = [task for task in built("full+kinds") if task.level == "seen"]
    assert len(found) > 250
    assert {task.classes for task in found} == {2, 3, 4, 5, 6}
    assert sum(task.description.startswith("Tell two classes of pairs of") for task in found) > 50
    assert {task.kind for task in found} >= set(FORMS) - {
        kind for kind, _ in KIND_PLANS["full"].unseen
    }


def test_labels_are_used_evenly():
    found = [t for t in built("full+kinds") if t.kind == "labels" and t.classes == 4]
    own = [t for t in found if t.corpus == "20newsgroups"]
    uses = [sum(m in members([t]) for t in own) for m in members(own)]
    assert len(own) == 6 and max(uses) - min(uses) <= 1
    assert len({frozenset(members([t])) for t in own}) == 6


def test_leaks_are_found():
    found = built("toy+kinds")
    seen = [task for task in found if task.level == "seen"]
    new = next(task for task in found if task.level == "unseen_kind")
    leak = dataclasses.replace(new, level="seen", name="leak")
    with pytest.raises(ValueError, match=r"\(unseen_kind\): kind 'continues' in a seen task"):
        plan.check([*seen, leak, new])
    strange = dataclasses.replace(new, members=((("toy", "music"),),) * 2)
    with pytest.raises(ValueError, match=r"labels \[\('toy', 'music'\)\] in no seen task"):
        plan.check([*seen, strange])
    held = next(task for task in found if task.level == "unseen_pair")
    sides = (held.members[0] + held.members[1],) * 2
    same = next(task for task in seen if task.kind == "same_label")
    with pytest.raises(ValueError, match="the pair is in a seen task"):
        plan.check([*seen, held, dataclasses.replace(same, name="leak", members=sides)])
    form = next(task for task in seen if task.kind == "words_shuffled")
    assert set(sides[0]) <= set(form.members[0])  # which says nothing of labels
    plan.check([*seen, held])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forms": (("rhyme", ("toy",)),)}, "unknown kind of task 'rhyme'; known: neighbours_"),
        ({"forms": (("continues", ("toy",)),)}, r"both seen and held out: \['continues'\]"),
        ({"unseen": (("tense", ("imdb",)),)}, "corpus 'imdb' is in no seen task; seen: toy"),
        ({"labels": (("toy", 3, 9),)}, "3 labels of toy: 9 tasks asked for, 2 sets without leak"),
    ],
)
def test_bad_plans_have_clear_errors(change, message):
    bad = dataclasses.replace(KIND_PLANS["toy"], **change)
    with pytest.raises(ValueError, match=message):
        tasks.build(tasks.config("toy", kinds=bad))


def test_unknown_suffixes_are_refused():
    for name in ("merging+kinds", "toy+more", "toy+"):
        with pytest.raises(ValueError, match=r"unknown task preset .*; with other kinds of task"):
            tasks.config(name)
        with pytest.raises(ValueError, match=r"^tasks: got .*, expected one of toy, .*toy\+kinds$"):
            settings.check(settings.Config(tasks=name))
    settings.check(settings.Config(tasks="full+kinds"))


def test_a_plan_without_extras_adds_nothing():
    empty = KindPlan(forms=(), unseen=())
    assert tasks.build(tasks.config("toy", kinds=empty)) == built("toy")
    assert kinds.build(empty, {}, frozenset(), 0) == []
    assert set(kind_presets.KIND_PLANS) <= set(tasks.PRESETS)


@pytest.mark.slow
def test_real_tasks_have_texts():
    """Every task that +kinds adds to the full plan (packages are fetched if need be)."""
    for task in built("full+kinds"):
        if task.level == "unseen_kind" or task.source == "forms" or task.kind == "labels":
            got = tasks.data(task, caps=tasks.Caps(250, 40, 100 // task.classes))
            assert len(got.train[0]) >= 80 * task.classes, task.name
            assert len(got.validation[0]) >= 20 * task.classes, task.name
            assert len(got.test[0]) >= 16 * task.classes, task.name
            for texts, _ in (got.train, got.validation, got.test):
                assert len(set(texts)) == len(texts), task.name
