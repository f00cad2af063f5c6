r"""Continuous depth-wise batching: rows at different depths of a shared block, in one step.

===========  ==================================================================================
R            rows of the batch; row i stands at position p_i and depth j_i
J            runs of the block that a token takes at most
τ            `threshold` of `jlora.pruning.early_exit`
===========  ==================================================================================

.. math::
    h_i \leftarrow f_{j_i}(h_i), \qquad
    (p_i, j_i) \leftarrow \begin{cases}
      (p_i + 1, 0) & j_i = J - 1 \text{ or } \max \operatorname{softmax} \ell_i > \tau \\
      (p_i, j_i + 1) & \text{else}
    \end{cases}

All depths have the same kernels, so one step runs the block for every row, whichever depth it
stands at: the depth selects the row's norms and LoRA factors, as its adapter does in a batch of
many adapters. A row whose token leaves starts its next token in the next step, and a row whose
answer has ended makes place for a waiting request; no row waits for a slower one. Prompts run all
depths. What a row computes does not depend on the others.

The tokens of a row see, at depth j, keys and values of that depth. A token that left earlier has
none there; it keeps those of its last run at all later depths.

Reference: Bae et al. 2024, arXiv:2410.20672, of which the abstract and summaries were read.
Deviates: the keys and values of skipped depths are copies, which the summaries do not settle; a
    prompt is read in a call of its own.
"""

import functools
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.core.adapter import Adapter
from jlora.models.decoder.config import DecoderConfig
from jlora.models.decoder.generate import Sampler, sample
from jlora.models.decoder.loops import block_size, embedded, logits_of, run_block
from jlora.models.decoder.model import Cache
from jlora.system import System
from jlora.types import Tree

GREEDY = Sampler()


class Rows(NamedTuple):
    """The state of R rows between steps."""

    cache: Cache  # [R, J, K, slots, kv_heads, head_width]
    hidden: Array  # [R, width], what enters the next run
    token: Array  # int32 [R], the newest token
    position: Array  # int32 [R], of the newest token
    depth: Array  # int32 [R], of the next run
    request: Array  # int32 [R], its number


class Report(NamedTuple):
    """What a step did, per row."""

    left: Array  # bool [R], the token left the block and a new one was drawn
    token: Array  # int32 [R], the new token where it did
    depth: Array  # int32 [R], of the run


class Request(NamedTuple):
    """A prompt, and how many tokens may follow."""

    ids: np.ndarray  # int32 [t]
    most: int


class Answer(NamedTuple):
    """What was drawn for a request."""

    ids: np.ndarray  # int32 [n], the end token included
    exits: np.ndarray  # int32 [n], the run after which each was drawn; J - 1 for the first


class Batched(NamedTuple):
    """What `generate_depth_wise` returns."""

    answers: tuple[Answer, ...]  # in the order of the requests
    steps: int  # runs of the block for the whole batch, without those of prompts


def empty_rows(rows: int, slots: int, params: Tree, config: DecoderConfig) -> Rows:
    """Rows without requests.

    Args:
      rows: R.
      slots: tokens of a row at most, prompt and answer.
      params: of `jlora.pruning.recursive.tied`.
      config: the architecture, of all J K layers.

    Returns:
      Zeros.

    Raises:
      ValueError: the block's size does not divide the number of layers.
    """
    size = block_size(params, config)
    shape = (rows, config.layers // size, size, slots, config.kv_heads, config.head_width)
    cache = Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
    numbers = (jnp.zeros((rows,), jnp.int32) for _ in range(4))  # each is donated on its own
    return Rows(cache, jnp.zeros((rows, config.width), config.dtype), *numbers)


@functools.partial(jax.jit, static_argnames=("config", "sampler"), donate_argnames="state")
def admit(
    state: Rows,
    params: Tree,
    bank: Adapter | None,
    row: Int[Array, ""],
    request: Int[Array, ""],
    ids: Int[Array, "t"],
    length: Int[Array, ""],
    key: PRNGKeyArray,
    *,
    config: DecoderConfig,
    sampler: Sampler,
) -> Rows:
    """Reads the prompt of a request at all depths and puts the request into a row.

    Args:
      state: the rows.
      params: of `jlora.pruning.recursive.tied`.
      bank: J adapters of the block (`jlora.pruning.recursive.by_depth`); None: no LoRA.
      row: which is free.
      request: its number, of which its random numbers depend.
      ids: the prompt, padded on the right to any length up to the number of slots.
      length: tokens of the prompt.
      key: of all draws.
      config: the architecture, of all J K layers.
      sampler: how tokens are drawn.

    Returns:
      The rows; the newest token of `row` is the first of its answer.
    """
    positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
    loops, size, slots = state.cache.key.shape[1:4]
    empty = jnp.zeros((size, 1, slots, *state.cache.key.shape[4:]), state.cache.key.dtype)

    def one(hidden: Array, depth: Array) -> tuple[Array, Cache | None]:
        run = run_block(
            params, bank, depth, hidden, positions, cache=Cache(empty, empty), config=config
        )
        return run.hidden, run.cache

    hidden, cache = jax.lax.scan(one, embedded(params, ids[None], config), jnp.arange(loops))
    last = jax.lax.dynamic_index_in_dim(hidden, length - 1, axis=1, keepdims=True)
    own = jax.random.fold_in(jax.random.fold_in(key, request), length)
    token = sample(own, logits_of(params, last, config)[:, 0], sampler)[0]
    new = Rows(
        jax.tree.map(lambda t: t[:, :, 0], cache),
        embedded(params, token[None, None], config)[0, 0],
        token, length, jnp.int32(0), request,
    )  # fmt: skip
    return jax.tree.map(lambda old, t: old.at[row].set(t.astype(old.dtype)), state, new)


@functools.partial(jax.jit, static_argnames=("config", "sampler"), donate_argnames="state")
def step(
    state: Rows,
    params: Tree,
    bank: Adapter | None,
    threshold: Float[Array, ""],
    key: PRNGKeyArray,
    *,
    config: DecoderConfig,
    sampler: Sampler,
) -> tuple[Rows, Report]:
    """One run of the block for every row, each at its own depth.

    Args:
      state: the rows; one that holds no request is computed too, and its report means nothing.
      params: of `jlora.pruning.recursive.tied`.
      bank: J adapters of the block; None: no LoRA.
      threshold: τ, float32 []; 1: every token takes all J runs.
      key: of all draws; a token's depends on its request and position, not on its row.
      config: the architecture, of all J K layers.
      sampler: how tokens are drawn.

    Returns:
      The rows after the run, and what it did.
    """
    loops = state.cache.key.shape[1]

    def one(row: Rows) -> tuple[Rows, Report]:
        here = jax.tree.map(lambda t: t[row.depth][:, None], row.cache)
        at = row.position[None, None]
        run = run_block(
            params, bank, row.depth, row.hidden[None, None], at, cache=here, config=config
        )
        assert run.cache is not None
        later = (jnp.arange(loops) >= row.depth)[:, None, None, None, None]

        def written(old: Array, new: Array) -> Array:  # this depth and all after it
            new = jax.lax.dynamic_slice_in_dim(new[:, 0], row.position, 1, axis=1)[None]
            kept = jax.lax.dynamic_slice_in_dim(old, row.position, 1, axis=2)
            slot = jnp.where(later, new, kept)
            return jax.lax.dynamic_update_slice_in_dim(old, slot, row.position, axis=2)

        cache = Cache(*map(written, row.cache, run.cache))
        logits = logits_of(params, run.hidden, config)[:, 0]
        sure = jnp.max(jax.nn.softmax(logits, axis=-1)) > threshold
        left = (row.depth == loops - 1) | sure
        own = jax.random.fold_in(jax.random.fold_in(key, row.request), row.position + 1)
        token = jnp.where(left, sample(own, logits, sampler)[0], row.token)
        fresh = embedded(params, token[None, None], config)[0, 0]
        after = Rows(
            cache, jnp.where(left, fresh, run.hidden[0, 0]), token,
            row.position + left.astype(jnp.int32), jnp.where(left, 0, row.depth + 1), row.request,
        )  # fmt: skip
        return after, Report(left, token, row.depth)

    return jax.vmap(one)(state)


def generate_depth_wise(
    params: Tree,
    bank: Adapter | None,
    requests: Sequence[Request],
    key: PRNGKeyArray,
    *,
    config: DecoderConfig,
    rows: int,
    slots: int,
    threshold: float = 1.0,
    sampler: Sampler = GREEDY,
    end: tuple[int, ...] = (),
) -> Batched:
    """Answers all requests; a row that ends takes the next one before the next step.

    Args:
      params: of `jlora.pruning.recursive.tied`.
      bank: J adapters of the block; None: no LoRA.
      requests: prompts, in the order in which they are admitted.
      key: of all draws.
      config: the architecture, of all J K layers.
      rows: of the batch.
      slots: tokens of a row at most, prompt and answer.
      threshold: τ of the early exits; 1: none.
      sampler: how tokens are drawn; greedy by default.
      end: tokens that end an answer.

    Returns:
      Answers, which are those of each request alone, and the number of steps.

    Raises:
      ValueError: no row, a threshold outside of [0, 1], an empty prompt, an answer without tokens,
        or a request that has not enough slots.
    """
    if rows < 1:
        raise ValueError(f"rows: got {rows}, expected at least 1")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: got {threshold}, expected 0 <= threshold <= 1")
    for number, request in enumerate(requests):
        need = len(request.ids) + request.most
        if len(request.ids) < 1 or request.most < 1 or need > slots:
            raise ValueError(
                f"request {number}: got {len(request.ids)} tokens and {request.most} new ones, "
                f"expected at least 1 of each and at most {slots} together"
            )
    state = empty_rows(rows, slots, params, config)
    waiting, running, steps = deque(range(len(requests))), dict[int, int](), 0
    tokens: list[list[int]] = [[] for _ in requests]
    exits: list[list[int]] = [[] for _ in requests]
    last = config.layers // block_size(params, config) - 1

    def append(row: int, token: int, depth: int) -> None:
        number = running[row]
        tokens[number].append(token)
        exits[number].append(depth)
        if token in end or len(tokens[number]) == requests[number].most:
            del running[row]

    tau = jnp.float32(threshold)
    while waiting or running:
        for row in range(rows):
            while row not in running and waiting:
                number = running[row] = waiting.popleft()
                ids = np.zeros(slots, np.int32)
                ids[: (length := len(requests[number].ids))] = requests[number].ids
                state = admit(
                    state, params, bank, jnp.int32(row), jnp.int32(number), jnp.asarray(ids),
                    jnp.int32(length), key, config=config, sampler=sampler,
                )  # fmt: skip
                append(row, int(state.token[row]), last)
        if not running:
            break
        state, report = step(state, params, bank, tau, key, config=config, sampler=sampler)
        steps += 1
        left, token, depth = (np.asarray(t) for t in report)
        for row in [row for row in running if left[row]]:
            append(row, int(token[row]), int(depth[row]))
    answers = (Answer(*(np.asarray(x, np.int32) for x in pair))
               for pair in zip(tokens, exits, strict=True))  # fmt: skip
    return Batched(tuple(answers), steps)


SYSTEM = System(
    name="Continuous Depth-wise Batching",
    paper="Bae 2024, 2410.20672",
    symbol="generate_depth_wise",
    kind="composition",
    evidence="any mix of depths gives each row's tokens alone; without exits those of `generate`",
    rows=(19,),
    claim="recursive_exit",
)
