"""Bases of the transfer claims: states, class vectors and an adapter's start fit together."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.claims import transfer_bases as lib
from experiments.stages import base_model

CONFIG = dataclasses.replace(lib.CONFIG, base="tiny", tasks="toy", layers=1, max_length=12)


@pytest.fixture
def tiny(monkeypatch):
    """The random base of the tests on made-up tasks."""
    monkeypatch.setattr(lib, "CONFIG", CONFIG)
    for cached in (lib.tasks, lib.side):
        monkeypatch.setattr(lib, cached.__wrapped__.__name__, cached.__wrapped__)
    return lib.side(lib.L6, Path("unused"))


def test_logits_are_products_of_the_embedding_and_the_class_vectors(tiny):
    count = len(lib.tasks())
    texts = [[f"a text {n} of task {t}" for n in range(3)] for t in range(count)]
    rows = lib.read(tiny, texts)
    assert rows.mask.shape == (count, 3, 12)
    want = base_model.embed_texts(tiny.encoder, texts[2], 12)
    np.testing.assert_allclose(rows.embedding[2], want, atol=1e-5)
    heads = base_model.embed_texts(tiny.encoder, list(lib.tasks()[2].class_descriptions), 12)
    np.testing.assert_allclose(tiny.heads[2], heads, atol=1e-5)
    given = [x[2] for x in lib.inputs(tiny, rows)]
    start = lib.fresh(tiny, lib.lora(), 0)
    logits = jax.jit(jl.lift(tiny.apply))(tiny.params, start, *given)
    np.testing.assert_allclose(logits, CONFIG.head_scale * want @ heads.T, atol=1e-3)
    wide = lib.repeated(start)
    kernels = [b["b"].shape[0] for b in wide.trainable.values()]
    assert kernels == [count] * 4 and wide.frozen is start.frozen
    assert jnp.unique(logits, axis=0).shape[0] == 3


def test_another_name_is_an_error():
    with pytest.raises(ValueError, match=r"base: got 'MiniLM-L2', expected one of \('MiniLM-L6'"):
        lib.side("MiniLM-L2", Path("unused"))
