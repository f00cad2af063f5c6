"""Which tasks the zoo trains on and which it must not see .

``build(config) -> list[Task]`` and ``seen_pairs_pool(config) -> list[Task]`` read no text at all:
they work on the label lists of ``descriptions.py``. Levels, strictly:

- ``unseen_corpus``: no text of the corpus' family (authors, source) is in any seen task;
- ``unseen_label``: at least one of the two labels is in no seen task, not even among "the rest";
- ``unseen_kind``: its kind of task (`kinds`) is in no seen task, all its labels are;
- ``unseen_pair``: both labels are in seen tasks, the unordered pair in none (the rest of a
  one-against-rest task leaves out the labels that its one class is held out against).

Pairs are ordered, (i, j): i is class 0. Choices depend on ``config.seed`` by hash only, so they
are the same on every machine and numpy version.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

from experiments.data import kinds
from experiments.data.corpora import SPECS
from experiments.data.descriptions import LABELS, REST, Label
from experiments.data.presets import Pair, PairPlan, TaskConfig
from experiments.data.task import Member, Task, describe, slug


def build(config: TaskConfig) -> list[Task]:
    """All tasks, seen ones first. ``ValueError`` if the plan contradicts itself: too few pairs, an
    unknown label, a seen label in no task, a held-out label or family in a seen task."""
    held_pairs = _held_pairs(config)
    tasks: list[Task] = []
    for plan in config.pairs:
        free = _unheld(_within(_seen_labels(plan)), held_pairs)
        tasks += _pair_tasks(config, free, plan.seen, "seen", plan.corpus)
    tasks += [_rest_task(config, held_pairs, n, *member) for n, member in enumerate(config.rest)]
    tasks += [_task((a,), (b,), "seen", "cross") for a, b in config.cross]
    others = _other_kinds(config, held_pairs)
    tasks += [task for task in others if task.level == "seen"]
    for plan in config.pairs:
        own = [p for p in held_pairs if p[0][0] == plan.corpus]
        tasks += _pair_tasks(config, own, len(own), "unseen_pair", plan.corpus)
    held_labels = {(plan.corpus, label) for plan in config.pairs for label in plan.held_out}
    near = [p for plan in config.pairs for p in _within(_labels(plan)) if held_labels & set(p)]
    tasks += _pair_tasks(config, near, config.unseen_label, "unseen_label", "held-out labels")
    far = [p for c in config.held_out_corpora for p in _within(_all_labels(c))]
    tasks += _pair_tasks(config, far, config.unseen_corpus, "unseen_corpus", "held-out corpora")
    tasks += [task for task in others if task.level == "unseen_kind"]
    check(tasks, held_labels)
    unused = {m for plan in config.pairs for m in _seen_labels(plan)} - _seen_members(tasks)
    if unused:
        raise ValueError(f"no seen task uses {sorted(unused)}; plan more pairs or fewer labels")
    return tasks


def seen_pairs_pool(config: TaskConfig) -> list[Task]:
    """Every ordered label pair within a corpus over seen labels, less the held-out pairs (level
    "seen"): more than the zoo trains, for losses that need no trained adapter."""
    held_pairs = _held_pairs(config)
    pool = []
    for plan in config.pairs:
        for a, b in _unheld(_within(_seen_labels(plan)), held_pairs):
            pool += [_task((a,), (b,), "seen", "pair"), _task((b,), (a,), "seen", "pair")]
    return pool


def check(tasks: Sequence[Task], held_labels: Iterable[Member] = ()) -> None:
    """Raises ``ValueError`` naming task and label unless the levels are disjoint."""
    labels = _seen_members(tasks)
    if leak := sorted(labels & set(held_labels)):
        raise ValueError(f"held-out label {leak[0]} is in a seen task")
    families = {SPECS[corpus].family for corpus, _ in labels if corpus in SPECS}
    pairs = {
        frozenset((a, b))
        for task in tasks
        if task.level == "seen" and task.kind not in kinds.FORM_KINDS
        for left, right in itertools.combinations(task.members, 2)
        for a, b in itertools.product(left, right)
    }
    seen_kinds = {task.kind for task in tasks if task.level == "seen"}
    for task in tasks:
        own = {member for side in task.members for member in side}
        corpora = {corpus for corpus, _ in own if corpus in SPECS}
        if task.level in ("unseen_label", "unseen_corpus") and own <= labels:
            raise ValueError(f"{task.name} ({task.level}): all its labels are in seen tasks")
        if task.level == "unseen_corpus" and families & {SPECS[c].family for c in corpora}:
            raise ValueError(f"{task.name} (unseen_corpus): its corpus is kin to a seen one")
        if task.level == "unseen_pair" and frozenset(own) in pairs:
            raise ValueError(f"{task.name} (unseen_pair): the pair is in a seen task")
        if task.level == "unseen_pair" and not own <= labels:
            raise ValueError(f"{task.name} (unseen_pair): {sorted(own - labels)} in no seen task")
        if task.level == "unseen_kind" and (task.kind in seen_kinds or not own <= labels):
            what = f"labels {sorted(own - labels)}" if own - labels else f"kind {task.kind!r}"
            state = "in no seen task" if own - labels else "in a seen task"
            raise ValueError(f"{task.name} (unseen_kind): {what} {state}")
    names = Counter(task.name for task in tasks)
    if double := [name for name, times in names.items() if times > 1]:
        raise ValueError(f"tasks named twice: {double}")


def _other_kinds(config: TaskConfig, held_pairs: Sequence[Pair]) -> list[Task]:
    if config.kinds is None:
        return []
    labels = {plan.corpus: _seen_labels(plan) for plan in config.pairs}
    held = frozenset(frozenset(pair) for pair in held_pairs)
    return kinds.build(config.kinds, labels, held, config.seed)


def _seen_members(tasks: Sequence[Task]) -> set[Member]:
    return {m for task in tasks if task.level == "seen" for side in task.members for m in side}


def _all_labels(corpus: str) -> list[Member]:
    if corpus not in LABELS:
        raise ValueError(f"unknown corpus {corpus!r}; known: {', '.join(LABELS)}")
    return [(corpus, label) for label in sorted(LABELS[corpus])]


def _labels(plan: PairPlan) -> list[Member]:
    known = _all_labels(plan.corpus)
    used = [(plan.corpus, label) for label in plan.labels] or known
    strange = [m for m in used if m not in known]
    strange += [(plan.corpus, x) for x in plan.held_out if (plan.corpus, x) not in used]
    if strange:
        raise ValueError(f"corpus {plan.corpus!r} has no label {strange[0][1]!r} to plan with")
    return used


def _seen_labels(plan: PairPlan) -> list[Member]:
    return [member for member in _labels(plan) if member[1] not in plan.held_out]


def _within(members: Sequence[Member]) -> list[Pair]:
    return list(itertools.combinations(members, 2))


def _unheld(pairs: Sequence[Pair], held_pairs: Sequence[Pair]) -> list[Pair]:
    held = {frozenset(pair) for pair in held_pairs}
    return [pair for pair in pairs if frozenset(pair) not in held]


def _held_pairs(config: TaskConfig) -> list[Pair]:
    held: list[Pair] = []
    for plan in config.pairs:
        pairs = _within(_seen_labels(plan))
        held += _choose(pairs, plan.unseen_pair, config.seed, f"held-out pairs of {plan.corpus}")
    return held


def _choose(pairs: Sequence[Pair], count: int, seed: int, purpose: str) -> list[Pair]:
    """``count`` ordered pairs that use the labels evenly, and evenly in both places; a pair comes
    in its second order only after all have come once."""
    if count > 2 * len(pairs):
        raise ValueError(f"{purpose}: {count} tasks asked for, {2 * len(pairs)} ordered pairs")
    uses: Counter[Member] = Counter()
    lean: Counter[Member] = Counter()  # times as class 0 less times as class 1
    chosen: list[Pair] = []
    left = list(pairs)
    for _ in range(count):
        left = left or [(b, a) for a, b in chosen]
        pair = min(
            left,
            key=lambda p: (max(uses[p[0]], uses[p[1]]), uses[p[0]] + uses[p[1]],
                           _rank(seed, purpose, p)),
        )  # fmt: skip
        left.remove(pair)
        a, b = pair
        turned = (b, a) in chosen or (a, b) in chosen
        if not turned and (lean[a], _rank(seed, "turn", pair) % 2) > (lean[b], 0):
            a, b = b, a
        chosen.append((a, b))
        uses.update((a, b))
        lean[a] += 1
        lean[b] -= 1
    return chosen


def _rank(seed: int, purpose: str, pair: Pair) -> int:
    text = f"{seed}|{purpose}|{sorted(pair)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _pair_tasks(
    config: TaskConfig, pairs: Sequence[Pair], count: int, level: str, what: str
) -> list[Task]:
    chosen = _choose(pairs, count, config.seed, f"{level} tasks of {what}")
    return [_task((a,), (b,), level, "pair") for a, b in chosen]


def _rest_task(
    config: TaskConfig, held_pairs: Sequence[Pair], number: int, corpus: str, label: str
) -> Task:
    """One label against the other seen labels it is not held out against; odd ones reversed."""
    one = (corpus, label)
    plans = [plan for plan in config.pairs if plan.corpus == corpus]
    if not plans or one not in _seen_labels(plans[0]):
        raise ValueError(f"one-against-rest of {one}: not a seen label of the plan")
    pairs = _unheld([(one, m) for m in _seen_labels(plans[0]) if m != one], held_pairs)
    sides = ((one,), tuple(m for _, m in pairs))
    return _task(*(sides if number % 2 == 0 else sides[::-1]), "seen", "rest")


def _task(zero: tuple[Member, ...], one: tuple[Member, ...], level: str, kind: str) -> Task:
    words = [_words(side) for side in (zero, one)]
    (corpus_0, label_0), (corpus_1, label_1) = zero[0], one[0]
    names = [slug(label) if len(side) == 1 else "rest"
             for side, label in ((zero, label_0), (one, label_1))]  # fmt: skip
    if kind == "cross":
        name = f"cross--{slug(corpus_0)}-{names[0]}--{slug(corpus_1)}-{names[1]}"
        domain = f"{SPECS[corpus_0].domain} and {SPECS[corpus_1].domain}"
    else:
        name = f"{slug(corpus_0)}--{names[0]}--{names[1]}"
        domain = SPECS[corpus_0].domain
    descriptions = (words[0].description, words[1].description)
    return Task(
        name=name,
        corpus=corpus_0,
        level=level,
        description=describe(domain, descriptions),
        class_names=(words[0].name, words[1].name),
        class_descriptions=descriptions,
        paraphrases=(words[0].paraphrases, words[1].paraphrases),
        kind=kind,
        members=(zero, one),
    )


def _words(side: tuple[Member, ...]) -> Label:
    return LABELS[side[0][0]][side[0][1]] if len(side) == 1 else REST
