"""Words and colours of the report page: one place, so that tables and plots agree."""

# Okabe and Ito's palette: told apart with any colour vision.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, LIGHT, INK = "#7A7F87", "#D5D8DC", "#1D2530"
TASK_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, BLACK, "#B8A900")

METHODS = {
    "base": "base model, no adapter",
    "trained": "trained adapter",
    "soup": "soup of the task's trained adapters",
    "mean_adapter": "mean of all tasks' adapters",
    "pdiff_task_norm": "Cond P-Diff, per-task statistics",
    "pdiff_global": "Cond P-Diff, global statistics",
    "generated": "generated (ours)",
    "nearest": "soup of the nearest task",
    "softmax": "softmax-weighted soup",
    "multitask": "one multi-task adapter",
    "ridge": "kernel ridge",
    "span": "true adapter, projected",
}
SHORT = {
    "base": "base",
    "trained": "trained",
    "soup": "soup",
    "mean_adapter": "mean",
    "pdiff_task_norm": "P-Diff task",
    "pdiff_global": "P-Diff global",
    "generated": "generated",
    "nearest": "nearest",
    "softmax": "softmax",
    "multitask": "multi-task",
    "ridge": "ridge",
    "span": "span",
}
REMARKS = {
    "base": "the frozen model and head alone",
    "trained": "gradient descent on the task's training data",
    "soup": "average over training seeds and snapshots; no single run",
    "mean_adapter": "knows no task: what a generator that ignores its condition can reach",
    "pdiff_task_norm": "the decoder is handed the statistics of the very task it should generate",
    "pdiff_global": "the same method without that leak",
    "generated": "mean over samples, never the best of several",
    "nearest": "of the training task with the most similar condition",
    "softmax": "of all training tasks, by similarity of conditions",
    "multitask": "trained on all seen tasks together",
    "ridge": "closed-form regression from condition to adapter: the bar to beat",
    "span": "needs the true adapter: no method, a yardstick",
}
LEVELS = {
    "unseen_pair": "Unseen pairs of seen labels",
    "unseen_label": "Unseen labels",
    "unseen_corpus": "Unseen corpora",
    "user": "User tasks",
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
    "seen.within_soup": "Seen tasks: as good as the soup",
    "seen.confusion_diagonal": "Seen tasks: the right task is generated",
    "sampler.few_steps": "20 flow steps are as good as 1000 DDPM steps",
}


def method(key: str) -> str:
    """Display name of a method; an unknown key shows as itself."""
    return METHODS.get(key, key)


def short(key: str) -> str:
    """Column title of a method."""
    return SHORT.get(key, key)


def colour(key: str) -> str:
    """Colour of a method in every plot: generated vermilion, real blue, ridge green."""
    known = {"generated": VERMILION, "trained": BLUE, "ridge": GREEN, "soup": SKY}
    return known.get(key, GREY)


def label(key: str) -> str:
    """Display name of a held-out level."""
    return LEVELS.get(key, key)
