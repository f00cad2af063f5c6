"""Stage `evaluate`'s judge: right and wrong as the adapted function says, on every test row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.config import Config
from experiments.stages import accuracy, codec, world, zoo_training
from experiments.workdir import StageError
from jlora.generation.tokens import site_tokens as tokens

CONFIG = Config(
    base="tiny", tasks="toy", layers=1, max_length=8, train_texts=20, eval_rows=20, examples=2
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return world.build(CONFIG, tmp_path_factory.mktemp("world"), None)


@pytest.fixture(scope="module")
def coded(made):
    template = zoo_training.template(made, 0)
    spec = tokens.from_adapter(template)
    none = np.zeros((0,), np.int32)
    return codec.Encoded(spec, template, None, (), np.zeros((0, 1, 1)), none, none, {}, {})


@pytest.fixture(scope="module")
def drawn(coded):
    """[3, T, D] random tokens, the last of them a fresh adapter."""
    x = np.random.default_rng(0).normal(size=(3, coded.spec.length, coded.spec.dim)).astype("f4")
    return np.where(np.arange(3)[:, None, None] < 2, x * coded.spec.mask, 0).astype("f4")


def test_hits_are_those_of_the_lifted_function(made, coded, drawn):
    """The oracle lifts and never merges; `correct` merges and never lifts."""
    name = made.tasks[0].name
    rows = made.rows[name, "test"]
    tuned = jax.jit(jl.lift(world.classifier(made.model, CONFIG.head_scale)))
    head = jnp.broadcast_to(jnp.asarray(made.head_of(name)), (len(rows.label), 2, 32))
    got = accuracy.correct(made, coded, name, drawn)
    assert got.shape == (3, len(rows.label)) and got.dtype == bool
    for x, hits in zip(drawn, got, strict=True):
        adapter = coded.template.replace(trainable=codec.to_trainable(coded, jnp.asarray(x)))
        logits = tuned(made.upper, adapter, made.hidden[rows.index], made.mask[rows.index], head)
        np.testing.assert_array_equal(hits, np.asarray(logits).argmax(-1) == rows.label)
    assert (got[0] != got[2]).any()  # an adapter does something


@pytest.mark.parametrize("size", [3, 7])
def test_no_row_is_left_out_whatever_the_batch(made, coded, drawn, size):
    """Today's limit of `eval_rows` judged the first rows only and did not say so."""
    name = made.tasks[0].name
    small = made._replace(config=dataclasses.replace(CONFIG, eval_rows=size))
    np.testing.assert_array_equal(
        accuracy.correct(small, coded, name, drawn), accuracy.correct(made, coded, name, drawn)
    )


def test_a_nan_is_named_before_it_counts_as_a_mistake(made, coded, drawn):
    bad = drawn.copy()
    bad[1, 0, 0] = np.nan
    with pytest.raises(StageError, match=f"task '{made.tasks[0].name}': an adapter .* NaN"):
        accuracy.correct(made, coded, made.tasks[0].name, bad)
