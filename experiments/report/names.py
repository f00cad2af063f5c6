"""Methods, levels, words and colours of the report: one place, so that everything agrees."""

from typing import NamedTuple

# Okabe and Ito's palette: distinguishable with any colour vision.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, LIGHT, INK = "#7A7F87", "#D5D8DC", "#1D2530"
TASK_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, BLACK, "#B8A900")

# Kinds of tasks: of the zoo, held out, and a user's own.
SEEN, HELD_OUT, USER = "seen", "held_out", "user"


class Method(NamedTuple):
    """A row of every table."""

    key: str  # in report.json
    label: str  # in tables and plots
    short: str  # as a column title
    remark: str  # below its label
    on: tuple[str, ...]  # kinds of tasks that it is evaluated on: "seen", "held_out", "user"
    gap: bool = True  # whether a share of the gap between base and trained can be stated
    colour: str = GREY  # in every plot
    rival: bool = False  # whether it knows no more of a task than the generator does
    since: int = 2  # version of the first report.json that has it


METHODS = (  # in the order of all tables
    Method(
        "base", "base model, no adapter", "base", "the frozen model and head alone",
        (SEEN, HELD_OUT, USER), gap=False, rival=True,
    ),
    Method(
        "trained", "trained adapter", "trained", "gradient descent on the task's training data",
        (SEEN, HELD_OUT, USER), gap=False, colour=BLUE,
    ),
    Method(
        "logreg_full", "logistic regression, all texts", "logistic, all",
        "on frozen embeddings of all training texts; no adapter", (HELD_OUT, USER), colour=SKY,
        since=3,
    ),
    Method(
        "soup", "soup of the task's trained adapters", "soup",
        "average over training seeds and snapshots; no single run", (SEEN,), colour=SKY,
    ),
    Method(
        "generated", "generated adapter", "generated",
        "mean over samples, never the best of several",
        (SEEN, HELD_OUT, USER), colour=VERMILION,
    ),
    Method(
        "nearest_mean", "nearest class mean, K texts", "class mean",
        "of the frozen embeddings of the same examples; no adapter", (HELD_OUT, USER),
        colour=ORANGE, rival=True, since=3,
    ),
    Method(
        "knn", "k nearest neighbours, K texts", "neighbours",
        "among the frozen embeddings of the same examples; no adapter", (HELD_OUT, USER),
        colour=ORANGE, rival=True, since=3,
    ),
    Method(
        "logreg", "logistic regression, K texts", "logistic",
        "on the frozen embeddings of the same examples; no adapter", (HELD_OUT, USER),
        colour=ORANGE, rival=True, since=3,
    ),
    Method(
        "lora_k", "LoRA trained on the K texts", "LoRA on K",
        "gradient descent on the same examples; rate and steps chosen on seen tasks",
        (HELD_OUT, USER), colour=PURPLE, rival=True, since=3,
    ),
    Method(
        "discriminant", "discriminant of the K texts as an adapter", "discriminant",
        "closed form, rank 2 in the last layer; neither training nor a zoo", (HELD_OUT, USER),
        colour=PURPLE, rival=True, since=3,
    ),
    Method(
        "episodic", "episodic discriminant of the K texts", "episodic",
        "closed form over a shared adapter trained on the seen tasks; one ordinary adapter",
        (HELD_OUT,), colour=VERMILION, rival=True, since=4,
    ),
    Method(
        "episodic_mean", "nearest class mean, shared adapter", "shared, mean",
        "of the embeddings of the same examples under that shared adapter", (HELD_OUT,),
        colour=ORANGE, rival=True, since=4,
    ),
    Method(
        "episodic_logreg", "logistic regression, shared adapter", "shared, logistic",
        "on the embeddings of the same examples under that shared adapter", (HELD_OUT,),
        colour=ORANGE, rival=True, since=4,
    ),
    Method(
        "layered", "layered discriminant of the K texts", "layered",
        "three layers and a memory of seen classes, written as one adapter; nothing trained: what"
        " `jlora generate` ships", (HELD_OUT,), colour=VERMILION, rival=True, since=5,
    ),
    Method(
        "ridge", "kernel ridge, condition to adapter", "ridge",
        "closed-form regression from condition to adapter",
        (HELD_OUT, USER), colour=GREEN, rival=True,
    ),
    Method(
        "nearest", "nearest-condition soup", "nearest",
        "of the training task with the most similar condition", (HELD_OUT, USER), rival=True,
    ),
    Method(
        "softmax", "softmax-weighted soup", "softmax",
        "of all training tasks, by similarity of conditions", (HELD_OUT, USER), rival=True,
    ),
    Method(
        "multitask", "one multi-task adapter", "multi-task", "trained on all seen tasks together",
        (HELD_OUT, USER), rival=True,
    ),
    Method(
        "mean_adapter", "mean of all tasks' adapters", "mean",
        "knows no task: what a generator that ignores its condition can reach",
        (SEEN, HELD_OUT, USER), rival=True,
    ),
    Method(
        "pdiff_global", "Cond P-Diff, global normalisation", "P-Diff global",
        "the same method without that leak", (SEEN,),
    ),
    Method(
        "pdiff_task_norm", "Cond P-Diff, per-task normalisation (is given the task)", "P-Diff task",
        "the decoder has the statistics of the very task it should generate", (SEEN,),
    ),
    Method(
        "span", "trained adapter, projected on the zoo (oracle)", "span",
        "needs the trained adapter: an oracle, not a baseline", (HELD_OUT,),
    ),
)  # fmt: skip
LEVELS = {  # of tasks that are not in the zoo
    "unseen_pair": "unseen pairs of seen labels",
    "unseen_label": "unseen labels",
    "unseen_corpus": "unseen corpora",
    "unseen_kind": "unseen kinds of task",
    "user": "the user's own tasks",
}
CONTROLS = {
    "correct": "its own condition",
    "paraphrased": "paraphrased description",
    "shuffled": "another task's condition",
    "null": "no condition",
}
CLAIMS = {
    "unseen_pair.beats_ridge": "Unseen pairs: better than kernel ridge",
    "unseen_pair.gap_recovered": "Unseen pairs: 95 % of the gap",
    "unseen_label.beats_ridge": "Unseen labels: better than kernel ridge",
    "unseen_label.gap_recovered": "Unseen labels: 90 % of the gap",
    "unseen_pair.beats_best_rival": "Unseen pairs: better than the best rival",
    "unseen_label.beats_best_rival": "Unseen labels: better than the best rival",
    "unseen_corpus.beats_best_rival": "Unseen corpora: better than the best rival",
    "unseen_kind.beats_best_rival": "Unseen kinds of task: better than the best rival",
    "unseen_pair.layered_beats_best_rival": "Unseen pairs: layered better than the best rival",
    "unseen_label.layered_beats_best_rival": "Unseen labels: layered better than the best rival",
    "unseen_corpus.layered_beats_best_rival": "Unseen corpora: layered better than the best rival",
    "unseen_kind.layered_beats_best_rival": "Unseen kinds: layered better than the best rival",
    "seen.within_soup": "Seen tasks: as good as the soup",
    "seen.confusion_diagonal": "Seen tasks: the right task is generated",
    "sampler.few_steps": "20 flow steps are as good as 1000 DDPM steps",
}


_BY_KEY = {method.key: method for method in METHODS}


def keys(kind: str, version: int | None = None) -> tuple[str, ...]:
    """Methods of "seen", "held_out" or "user" tasks, in order; those of an older report.json."""
    return tuple(m.key for m in METHODS if kind in m.on and (version is None or m.since <= version))


def rivals(kind: str) -> tuple[str, ...]:
    """Methods that know no more of a task than the generator does, in order."""
    return tuple(m.key for m in METHODS if kind in m.on and m.rival)


def gap_methods() -> tuple[str, ...]:
    """Methods of held-out tasks whose share of the gap is stated, in order."""
    return tuple(m.key for m in METHODS if HELD_OUT in m.on and m.gap)


def method(key: str) -> Method:
    """A method by its key; an unknown key shows as itself."""
    return _BY_KEY.get(key) or Method(key, key, key, "", ())


def level(key: str) -> str:
    """Display name of a held-out level, as a title."""
    text = LEVELS.get(key, key)
    return text[:1].upper() + text[1:]
