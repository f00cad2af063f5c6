"""The tasks that `+kinds` adds: several labels of a corpus, forms of texts, pairs of texts.

They use seen labels alone. A task of several labels and one that compares labels hold no pair of
labels that the plan holds out. A kind of level ``unseen_kind`` is in no seen task, on any corpus,
while its corpora are: what is new is what is asked.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from experiments.data.corpora import SPECS
from experiments.data.descriptions import LABELS
from experiments.data.descriptions.forms import FORMS
from experiments.data.descriptions.label import Label
from experiments.data.forms import KINDS, SAME_LABEL
from experiments.data.kind_presets import KindPlan
from experiments.data.task import Member, Task, describe, slug

FORM_KINDS = frozenset(KINDS)  # of texts alone: they tell no labels apart


def build(
    plan: KindPlan,
    labels: Mapping[str, Sequence[Member]],
    held: frozenset[frozenset[Member]],
    seed: int,
) -> list[Task]:
    """The tasks of a plan, seen ones first.

    Args:
      plan: which ones.
      labels: corpus -> its seen labels.
      held: pairs of labels that no seen task may tell apart.
      seed: of the choice of labels, by hash.

    Raises:
      ValueError: an unknown corpus or kind, a kind that is both seen and held out, or more tasks
        asked for than there are sets of labels.
    """
    for kind, corpora in (*plan.forms, *plan.unseen):
        if kind not in KINDS:
            raise ValueError(f"unknown kind of task {kind!r}; known: {', '.join(KINDS)}")
        for corpus in corpora:
            _known(corpus, labels)
    if both := {kind for kind, _ in plan.forms} & {kind for kind, _ in plan.unseen}:
        raise ValueError(f"kinds both seen and held out: {sorted(both)}")
    tasks = []
    for corpus, count, number in plan.labels:
        for k, chosen in enumerate(_sets(corpus, count, number, labels, held, seed)):
            tasks.append(_of_labels(chosen, k))
    for kind, corpora in plan.forms:
        for corpus, turned in itertools.product(corpora, (False, True)):
            tasks.append(_form(kind, labels[corpus], "seen", turned))
    for corpus, number in plan.same_label:
        for k, pair in enumerate(_sets(corpus, 2, number, labels, held, seed)):
            tasks.append(_form(SAME_LABEL, pair, "seen", bool(k % 2)))
    for kind, corpora in plan.unseen:
        for k, corpus in enumerate(corpora):
            tasks.append(_form(kind, labels[corpus], "unseen_kind", bool(k % 2)))
    return tasks


def _known(corpus: str, labels: Mapping[str, Sequence[Member]]) -> Sequence[Member]:
    if corpus not in labels:
        raise ValueError(f"corpus {corpus!r} is in no seen task; seen: {', '.join(labels)}")
    return labels[corpus]


def _sets(
    corpus: str,
    size: int,
    number: int,
    labels: Mapping[str, Sequence[Member]],
    held: frozenset[frozenset[Member]],
    seed: int,
) -> Iterator[list[Member]]:
    """Different sets of labels without a held-out pair, which use the labels evenly."""
    known, uses = _known(corpus, labels), Counter[Member]()
    earlier: set[frozenset[Member]] = set()
    allowed = [
        group
        for group in itertools.islice(itertools.combinations(known, size), 20_000)
        if not any(frozenset(pair) in held for pair in itertools.combinations(group, 2))
    ]
    purpose = f"{size} labels of {corpus}"
    ranks = {group: _rank(seed, purpose, group) for group in allowed}
    if number > len(allowed):
        raise ValueError(f"{purpose}: {number} tasks asked for, {len(allowed)} sets without leak")
    for _ in range(number):
        left = [group for group in allowed if frozenset(group) not in earlier]
        best = min(left, key=lambda g: (sum(uses[m] ** 2 + uses[m] for m in g), ranks[g]))
        earlier.add(frozenset(best))
        uses.update(best)
        yield sorted(best, key=lambda m: _rank(seed, purpose + str(best), (m,)))


def _rank(seed: int, purpose: str, group: Sequence[Member]) -> int:
    text = f"{seed}|{purpose}|{sorted(group)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _of_labels(chosen: Sequence[Member], number: int) -> Task:
    corpus = chosen[0][0]
    words = [LABELS[corpus][label] for _, label in chosen]
    name = f"{slug(corpus)}--{len(chosen)}_labels--{number}"
    members = tuple((member,) for member in chosen)
    return _task(name, corpus, "seen", "labels", SPECS[corpus].domain, words, members, "corpora")


def _form(kind: str, members: Sequence[Member], level: str, turned: bool) -> Task:
    """A task of a form; `turned`: its classes in the other order."""
    corpus, words = members[0][0], FORMS[kind]
    pair = kind == SAME_LABEL or KINDS[kind].pair
    name = f"{slug(corpus)}--{kind}"
    if kind == SAME_LABEL:
        name += "".join(f"--{slug(label)}" for _, label in members)
    name += "--turned" if turned else ""
    domain = f"pairs of {SPECS[corpus].domain}" if pair else SPECS[corpus].domain
    sides = (tuple(members),) * len(words)
    ordered = words[::-1] if turned else words
    return _task(name, corpus, level, kind, domain, ordered, sides, "forms")


def _task(
    name: str,
    corpus: str,
    level: str,
    kind: str,
    domain: str,
    words: Sequence[Label],
    members: tuple[tuple[Member, ...], ...],
    source: str,
) -> Task:
    descriptions = tuple(label.description for label in words)
    return Task(
        name=name,
        corpus=corpus,
        level=level,
        description=describe(domain, descriptions),
        class_names=tuple(label.name for label in words),
        class_descriptions=descriptions,
        paraphrases=tuple(label.paraphrases for label in words),
        kind=kind,
        members=members,
        source=source,
    )
