"""Lanes by hand on a linear model, what schedules change, and which rows the decoder sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from experiments.pretraining import base_l
from experiments.pretraining.texts import Document
from experiments.variant_study import cells, continuation, starts, training
from experiments.variant_study.bench import of_rows
from experiments.variant_study.methods import ATTENTION, VARIANTS
from experiments.variant_study.training import Run, Schedule

VOCAB, WIDTH = 8, 8
PATH = "layers/attention/query/kernel"
RNG = np.random.default_rng(0)
METHODS = {ATTENTION: jl.LoRA(rank=2, alpha=2.0)}


def apply(params, ids):
    """Logits of the next token by one matrix."""
    return jax.nn.one_hot(ids, VOCAB) @ params["layers"]["attention"]["query"]["kernel"]


@pytest.fixture(scope="module")
def bench():
    """Every row of task t is the tokens 2 t, 2 t + 1."""
    kernel = jnp.asarray(RNG.normal(size=(VOCAB, VOCAB)), jnp.float32)
    rows = np.tile(np.asarray([[0, 1], [2, 3]])[:, None], (1, 5, 1))
    params = {"layers": {"attention": {"query": {"kernel": kernel}}}}
    return of_rows("linear", apply, params, dict.fromkeys(("train", "validation", "test"), rows),
                   ("a", "b"), "0")  # fmt: skip


def fitted(bench, schedule, rates, at, steps=1):
    adapter = jl.init(jax.random.key(0), apply, bench.base, jnp.zeros((1, 1), jnp.int32),
                      methods=METHODS)  # fmt: skip
    run = Run(optax.sgd, schedule, steps, 3)
    lanes = training.train(bench, run, bench.base, adapter, np.asarray(rates), np.asarray(at), 0)
    return run, adapter, lanes


def test_a_step_of_each_lane_by_numpy(bench):
    rates, at = [1.0, 0.25, 50.0], [0, 1, 1]
    run, adapter, lanes = fitted(bench, Schedule(), rates, at)
    w = np.asarray(bench.base["layers"]["attention"]["query"]["kernel"], "f8")
    a = np.asarray(adapter.trainable[PATH]["a"], "f8")
    right = training.judge(bench, run, bench.base, adapter, lanes, "test", np.asarray(at))
    for n, (rate, t) in enumerate(zip(rates, at, strict=True)):
        x, y = 2 * t, 2 * t + 1
        p = np.exp(w[x]) / np.exp(w[x]).sum()
        assert lanes.loss[n] == pytest.approx(-np.log(p[y]), rel=1e-5)
        b = -rate * np.outer(a[x], p - np.eye(VOCAB)[y])
        np.testing.assert_allclose(lanes.trainable[PATH]["b"][n], b, rtol=1e-4, atol=1e-6)
        assert right[n] == float((w[x] + a[x] @ b).argmax() == y)
    assert right[2] == 1.0 and 0.0 in right, "the judge tells lanes apart"


def test_a_schedule_sees_its_state_the_gradients_and_the_end(bench):
    plan = Schedule(
        start=lambda adapter: jnp.zeros((), jnp.float32),
        view=lambda adapter, state, step, key: adapter,
        after=lambda adapter, state, gradients, step: (
            adapter, state + jnp.abs(gradients[PATH]["b"]).sum() * (step + 1).astype(jnp.float32),
        ),
        finish=lambda adapter, state: adapter.replace(
            trainable=jax.tree.map(jnp.zeros_like, adapter.trainable)
        ),
    )  # fmt: skip
    run, adapter, lanes = fitted(bench, plan, [0.0, 50.0], [1, 1], steps=2)
    w = np.asarray(bench.base["layers"]["attention"]["query"]["kernel"], "f8")
    a = np.asarray(adapter.trainable[PATH]["a"], "f8")
    p = np.exp(w[2]) / np.exp(w[2]).sum()
    size = np.abs(np.outer(a[2], p - np.eye(VOCAB)[3])).sum()
    assert lanes.state[0] == pytest.approx(3 * size, rel=1e-4), "at rate 0, steps 1 and 2"
    right = training.judge(bench, run, bench.base, adapter, lanes, "test", np.asarray([1, 1]))
    assert right.tolist() == [float(w[2].argmax() == 3)] * 2, "the finished adapter is zero"


def test_a_start_of_each_task_and_its_rates(bench):
    made = cells.groups(bench, VARIANTS["OLoRA"], 2, 0)
    assert [g.tasks.tolist() for g in made] == [[0], [1]]
    data = starts.data(bench, 1, 0)
    assert len(data.inputs) == starts.BATCHES and (data.inputs[0][0] == 2).all()
    assert (data.labelled[0][1] == 3).all()


def test_every_variant_fits_grouped_queries():
    """Shapes only: keys and values of base L are narrower than queries."""
    out = {"query": 192, "key": 64, "value": 64, "out": 192}
    params = {"layers": {"attention": {
        part: {"kernel": jax.ShapeDtypeStruct((6, 192, n), jnp.float32)}
        for part, n in out.items()}}}  # fmt: skip

    def run(params, x):
        def layer(x, own):
            return x, sum((x @ own["attention"][part]["kernel"]).sum() for part in out)

        return jax.lax.scan(layer, x, params["layers"])[1]

    def fresh(params, variant, rank):
        made = jl.init(jax.random.key(0), run, params, jnp.zeros((2, 192)),
                       methods={ATTENTION: variant.method(rank)})  # fmt: skip
        return (variant.change(made, 0) if variant.change else made).trainable

    for variant in VARIANTS.values():
        for rank in (2, 8):
            one = functools.partial(fresh, variant=variant, rank=rank)
            assert jax.tree.leaves(jax.eval_shape(one, params)), variant.name


def test_no_document_is_in_two_splits(monkeypatch):
    monkeypatch.setattr(continuation, "ROWS", {"train": 3, "validation": 2, "test": 2})
    documents = [Document("made", str(n), f"{chr(97 + n % 26)} {n} " * 12) for n in range(60)]
    tokenizer = base_l.load().tokenizer
    rows = continuation.packed(tokenizer, documents)
    assert {k: v.shape for k, v in rows.items()} == {
        k: (n, continuation.LENGTH + 1) for k, n in continuation.ROWS.items()
    }
    words = {split: {w for row in ids for w in tokenizer.decode(row.tolist()).split()[1:-1]
                     if w.isdigit()} for split, ids in rows.items()}  # fmt: skip
    for split, own in words.items():
        found = {continuation.split_of(documents[int(w)]) for w in own}
        assert found == {split}
    with pytest.raises(ValueError, match="made: train: got 0 tokens, expected at least 99"):
        continuation.packed(tokenizer, [d for d in documents
                                        if continuation.split_of(d) != "train"])  # fmt: skip
