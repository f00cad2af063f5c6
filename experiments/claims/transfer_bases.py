r"""Bases that adapters move between: MiniLM-L6 and MiniLM-L3, as four text tasks use them.

==========  ==================================================================================
head        class vectors, embeddings of the descriptions of the classes by the base itself
hidden      states that enter the adapted layers, computed once per text
==========  ==================================================================================

The logits of a text are its mean state's products with the class vectors, so a base needs the names
of the classes and no training row to begin with.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.claims import text_methods
from experiments.data import minilm_l3
from experiments.data.task import Task
from experiments.merging import cells
from experiments.stages import base_model
from experiments.stages import world as world_lib
from jlora.types import Dynamic, Tree

CONFIG = dataclasses.replace(text_methods.CONFIG, layers=2, max_length=24)
RANK = 4
NAMES = L6, L3 = "MiniLM-L6", "MiniLM-L3"
STATES = 64  # texts per call of a base


class Side(NamedTuple):
    """A base model as the tasks use it."""

    apply: Dynamic  # (params, hidden, mask, head) -> logits; hashable
    params: Tree  # of the adapted layers
    encoder: base_model.Base
    heads: jax.Array  # [T, C, d], class vectors from their descriptions


class Read(NamedTuple):
    """Texts of all tasks as a base reads them, [T, n, ...]."""

    hidden: jax.Array  # states that enter the adapted layers
    mask: jax.Array
    embedding: jax.Array  # [T, n, d]


@functools.cache
def tasks() -> tuple[Task, ...]:
    """The four tasks."""
    return world_lib.choose(CONFIG)[0]


@functools.cache
def side(name: str, workdir: Path) -> Side:
    """A base by its name, one of `NAMES`.

    Raises:
      ValueError: another name.
    """
    if name not in NAMES:
        raise ValueError(f"base: got {name!r}, expected one of {NAMES}")
    config = CONFIG
    if name == L3:
        config = dataclasses.replace(CONFIG, base=f"hf:{minilm_l3.folder(workdir)}")
    base = base_model.load(config, None)
    text = world_lib.phrases(base, tasks(), config.max_length)
    heads = world_lib.make_heads(config, tasks(), text, base.config.width)
    apply = cells.text_classifier(base.config, config.head_scale)
    return Side(apply, base_model.upper(base, config), base, jnp.asarray(heads))


def read(at: Side, texts: Sequence[Sequence[str]]) -> Read:
    """Equally many texts of each task, through the frozen part of a base."""
    flat = [t for own in texts for t in own]
    blocks = [flat[i : i + STATES] for i in range(0, len(flat), STATES)]
    parts = [base_model.states(at.encoder, block, CONFIG, STATES) for block in blocks]
    whole = (np.concatenate(xs) for xs in zip(*parts, strict=True))
    return Read(*(jnp.asarray(x.reshape(len(texts), -1, *x.shape[1:])) for x in whole))


def inputs(at: Side, rows: Read) -> tuple[jax.Array, ...]:
    """What the model takes after its parameters, [T, n, ...] each."""
    tall = at.heads[:, None]
    heads = jnp.broadcast_to(tall, (*rows.mask.shape[:2], *at.heads.shape[1:]))
    return rows.hidden, rows.mask, heads


def fresh(at: Side, method: Dynamic, seed: int) -> jl.Adapter:
    """A method at its start on the attention kernels of a base."""
    shape = (1, CONFIG.max_length)
    example = (
        jnp.zeros((*shape, at.encoder.config.width)),
        jnp.ones(shape, bool),
        at.heads[:1],
    )
    methods = dict.fromkeys(text_methods.SITES, method)
    return jl.init(jax.random.key(seed), at.apply, at.params, *example, methods=methods)


def repeated(start: jl.Adapter) -> jl.Adapter:
    """An untrained adapter for every task."""
    count = len(tasks())
    wide = jax.tree.map(lambda x: jnp.repeat(x[None], count, axis=0), start.trainable)
    return start.replace(trainable=wide)


def lora() -> jl.LoRA:
    """Of source and target, at scale 1."""
    return jl.LoRA(RANK, alpha=float(RANK))
