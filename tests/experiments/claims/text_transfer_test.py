"""Transfer of text adapters: who moves them reads texts and five rows, and nothing else."""

import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import text_transfer as lib
from experiments.claims import trans_lora, trans_lora_filter, transfer_texts
from experiments.claims import transfer_bases as bases
from tests.experiments.claims.federated_rounds_test import D, linear

NAMES = ("query", "key", "value", "out")
SIZE = lib.Size(written=40, judged=10, keep=20, source_steps=150, steps=150, test=20)
WORKDIR = Path("unused")
CLASSES = ("hot", "cold")
WORDS = {"hot": 0, "sun": 0, "cold": 1, "snow": 1}  # a text is of the class of its first word


class Named:
    def __init__(self, name):
        self.name = name


def sentence(task, n):
    first = ("sun", "snow", "hot", "cold")[n % 4]
    return f"{first} in row {n} of {task}"


def states(text):
    """[t, d]: the first word says the class, the rest is noise; zeros without such a word."""
    if text.split()[0] not in WORDS:
        return np.zeros((2, D))
    noise = np.random.default_rng(zlib.crc32(text.encode())).normal(size=(2, D))
    out = 0.2 * noise
    out[:, WORDS[text.split()[0]]] += 1.0
    return out


@pytest.fixture(scope="module")
def world():
    """Tasks on linear models that know no class; written texts are of other rows."""
    rng = np.random.default_rng(0)
    f32 = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    tasks = (Named("a"), Named("b"))

    def base():
        params = {"layers": {"attention": {s: {"kernel": 0.1 * f32(1, D, D)} for s in NAMES}}}
        return bases.Side(linear, params, None, f32(2, 2, D))

    sides = {name: base() for name in bases.NAMES}

    def read(at, texts):
        hidden = jnp.asarray([[states(t) for t in own] for own in texts], jnp.float32)
        return bases.Read(hidden, jnp.ones(hidden.shape[:3], bool), hidden.mean(2))

    def rows(name):
        start = {"train": 0, "test": 1000}[name]
        each = [[sentence(t.name, start + n) for n in range(60)] for t in tasks]
        return tuple((tuple(x), tuple(WORDS[t.split()[0]] for t in x)) for x in each)

    def fresh(at, method, seed):
        example = f32(1, 2, D), jnp.ones((1, 2), bool), at.heads[:1]
        methods = dict.fromkeys(lib.text_methods.SITES, method)
        return lib.jl.init(lib.jax.random.key(seed), at.apply, at.params, *example, methods=methods)

    def texts_of(size, workdir):
        each = [tuple(sentence(t.name, 5000 + n) for n in range(size)) for t in tasks]
        return tuple(transfer_texts.Written(x, 1.0) for x in each)

    def training_states(base, workdir):
        split = rows("train")
        return read(None, [x for x, _ in split]), jnp.asarray([y for _, y in split], jnp.int32)

    shared = {"tasks": lambda: tasks, "side": lambda name, workdir: sides[name], "read": read,
              "fresh": fresh}  # fmt: skip
    own = {"rows": rows, "texts_of": texts_of, "training_states": training_states, "RATE": 0.05}
    with pytest.MonkeyPatch.context() as patch:
        for module, changes in ((bases, shared), (lib, own)):
            for name, value in changes.items():
                patch.setattr(module, name, value)
        lib.test.cache_clear()
        yield
    lib.test.cache_clear()


@pytest.fixture(scope="module")
def owned(world):
    return lib.owned(SIZE, 0, WORKDIR, bases.L6)


@pytest.fixture
def handed(owned):
    return lib.dataclasses.replace(owned, opened=[])


def test_a_moved_adapter_knows_the_classes_and_no_training_row_was_read(handed):
    texts = [part[1] for part in lib.parts(SIZE, 0, WORKDIR)]
    student = lib.moved(handed, texts, SIZE, 0, WORKDIR, base=bases.L3, method=bases.lora())
    assert handed.opened == 2 * [t for own in texts for t in own]  # by both bases
    assert lib.checked(handed, lib.texts_of(SIZE.written, WORKDIR)) == 0
    assert min(lib.accuracy(bases.L6, handed.adapters, SIZE, WORKDIR)) > 0.9
    assert min(lib.accuracy(bases.L3, student.adapter, SIZE, WORKDIR)) > 0.9
    plain = bases.repeated(bases.fresh(bases.side(bases.L3, WORKDIR), bases.lora(), 0))
    assert np.mean(lib.accuracy(bases.L3, plain, SIZE, WORKDIR)) < 0.9
    assert student.odds.shape == (2, 30) and student.kept.shape == (2, 20)
    nothing = [[f"word in {n}" for n in range(30)] for _ in range(2)]  # mutation: no class in them
    lost = lib.moved(handed, nothing, SIZE, 0, WORKDIR, base=bases.L3, method=bases.lora())
    assert np.mean(lib.accuracy(bases.L3, lost.adapter, SIZE, WORKDIR)) < 0.9


def test_a_training_row_that_was_not_handed_on_is_seen(handed):
    sixth = lib.rows("train")[1][0][5]
    handed.opened.extend(handed.seeds[0])
    assert lib.checked(handed, ()) == 0
    handed.opened.append(sixth)
    by_chance = transfer_texts.Written((sixth, "another"), 1.0)
    assert lib.checked(handed, (by_chance,)) == 1
    with pytest.raises(ValueError, match="got 1 training rows, as 'snow in row 5 of b'"):
        lib.checked(handed, ())


def test_only_five_rows_can_be_handed_on(handed):
    six = (lib.rows("train")[0][0][:6], handed.seeds[1])
    with pytest.raises(ValueError, match="a: got 6 rows, expected 5"):
        lib.Handed(
            bases.L6, handed.tasks, six, handed.labels, handed.adapters, handed.discriminators
        )


def test_each_seed_splits_the_texts_anew(world):
    first, other = (lib.parts(SIZE, seed, WORKDIR) for seed in (0, 1))
    assert first == lib.parts(SIZE, 0, WORKDIR)
    for parts in (first, other):
        for (judged, rest), own in zip(parts, lib.texts_of(40, WORKDIR), strict=True):
            assert (len(judged), len(rest)) == (10, 30)
            assert sorted(judged + rest) == sorted(own.texts)
    assert first[0][0] != other[0][0]


def test_the_linear_head_is_trained_on_five_rows(handed):
    assert min(lib.linear(handed, SIZE, WORKDIR, bases.L3)) > 0.9
    wrong = tuple(tuple(1 - y for y in own) for own in handed.labels)
    turned = lib.dataclasses.replace(handed, labels=wrong)
    assert max(lib.linear(turned, SIZE, WORKDIR, bases.L3)) < 0.1


def test_the_claims_compare_what_they_say_and_share_what_was_measured(world, monkeypatch, tmp_path):
    values = {"LoRA": (0.7, 0.8), "source": (0.75, 0.6), "linear head on five rows": (0.5, 0.65),
              "random texts": (0.5, 0.4), "unfiltered": (0.6, 0.7)}  # fmt: skip
    calls = []
    monkeypatch.setattr(trans_lora, "compared", lambda *given: calls.append(given) or values)
    one = trans_lora.figures(bases.L6, bases.L3, SIZE, 0, tmp_path)
    assert (one.system, one.baseline, one.control) == ((0.7, 0.8), (0.75, 0.65), (0.5, 0.4))
    assert one.more["source"] == pytest.approx(0.675) and one.more["seconds of writing"] == 2.0
    other = trans_lora_filter.figures(SIZE, 0, tmp_path)
    assert calls == [(bases.L6, bases.L3, SIZE, 0, tmp_path)]
    assert (other.system, other.baseline, other.control) == ((0.7, 0.8), (0.6, 0.7), (0.5, 0.4))
    trans_lora.figures(bases.L6, bases.L3, SIZE, 1, tmp_path)  # another seed, another direction
    trans_lora.figures(bases.L3, bases.L6, SIZE, 1, tmp_path)
    assert [given[:2] + given[3:4] for given in calls[1:]] == [
        (bases.L6, bases.L3, 1),
        (bases.L3, bases.L6, 1),
    ]
    monkeypatch.setattr(trans_lora, "shared_code", lambda name, root: {"text_transfer.py": "new"})
    trans_lora_filter.figures(SIZE, 0, tmp_path)
    assert len(calls) == 4  # other code: measured again
