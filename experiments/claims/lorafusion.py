r"""LoRAFusion: six fine-tunings in packed steps take less time than one after the other.

==========  ==============================================================================
n           jobs: one per corpus, texts of its own length, rank and rate
q           seconds of processor time for all steps of all jobs, the least of `REPEATS`
==========  ==============================================================================

Alone, a step of a job is one batch of rows, padded to the longest of them and up to a multiple of
the block. Packed, the same samples run in the microbatches of the plan (`jlora.packing`), some rows
per step. Both compute the same gradients, which is checked: the adapters are equal in the end.
Programs are compiled before time is taken, and the three ways take turns in an order that is drawn
anew.

The control is a packed run without a plan: every microbatch holds what one job has, samples in the
order of the data. It has the same step and knows no lengths.
"""

import functools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims.protocol import Claim, Figures
from experiments.data import corpora
from experiments.pretraining import base_l
from jlora.models import decoder
from jlora.packing import bins, layout, segments, step
from jlora.packing.jobs import Job, Microbatch, Piece, blocks, pieces_of
from jlora.packing.schedule import Plan, plan, rows, verify, waste

JOBS = {  # corpus: rank
    "rotten_tomatoes": 4, "reuters_r8": 8, "brown": 8, "spam": 16, "vader_tweets": 4,
    "20newsgroups": 16,
}  # fmt: skip
CAPACITY, ROWS, BLOCK, BATCH, BATCHES, RATE = 160, 6, 16, 8, 4, 1e-3
MIXES, REPEATS, LEAST = 4, 3, 1.3
SITES = r"layers/(attention|ffn)/.*kernel"


class Mix(NamedTuple):
    """Samples of all jobs, and what runs them."""

    texts: tuple[tuple[np.ndarray, ...], ...]  # tokens, by job and sample
    jobs: tuple[Job, ...]
    plan: Plan
    control: Plan
    params: Any
    bank: jl.Adapter
    config: decoder.DecoderConfig

    def tokens(self, piece: Piece) -> np.ndarray:
        """The tokens of a sample."""
        return self.texts[piece.job][piece.batch * BATCH + piece.sample]


@functools.cache
def encoded(name: str) -> tuple[np.ndarray, ...]:
    """All texts of a corpus as tokens of base L, cut to one row each."""
    tokenizer = base_l.load().tokenizer
    parts = tokenizer.encode_batch(corpora.load(name, progress=False).texts)
    return tuple(np.asarray(p.ids[:CAPACITY], np.int32) for p in parts if len(p.ids) > 1)


def mix(seed: int, number: int) -> Mix:
    """A draw of samples, and its plan."""
    base, texts = base_l.load(), []
    for job, name in enumerate(JOBS):
        rng = np.random.default_rng([seed, number, job])
        held = encoded(name)
        chosen = rng.choice(len(held), BATCH * BATCHES, replace=False)
        texts.append(tuple(held[i] for i in chosen))
    jobs = tuple(
        Job(name, tuple(tuple(len(t) for t in held[b * BATCH : (b + 1) * BATCH])
                        for b in range(BATCHES)))
        for name, held in zip(JOBS, texts, strict=True)
    )  # fmt: skip
    made = plan(jobs, CAPACITY, BLOCK)
    verify(made, jobs, CAPACITY, BLOCK)
    model, ids = (
        functools.partial(decoder.forward, config=base.config),
        jnp.zeros((1, 2), jnp.int32),
    )
    adapters = [
        jl.init(jax.random.key(n), model, base.params, ids,
                methods={SITES: jl.LoRA(rank, alpha=float(rank))})
        for n, rank in enumerate(JOBS.values())
    ]  # fmt: skip
    return Mix(tuple(texts), jobs, made, in_order(jobs), base.params, jl.stack(adapters),
               base.config)  # fmt: skip


def in_order(jobs: tuple[Job, ...]) -> Plan:
    """Microbatches of one job each, samples as they come: the control."""
    out: list[Microbatch] = []
    steps: list[tuple[int, ...]] = []
    for batch in range(BATCHES):
        for job in range(len(jobs)):
            held: list[Piece] = []
            for piece in pieces_of(jobs, (job,), batch):
                if blocks([*held, piece], BLOCK) * BLOCK > CAPACITY:
                    out.append(tuple(held))
                    steps.append(())
                    held = []
                held.append(piece)
            out.append(tuple(held))
            steps.append((job,))
    made = Plan(tuple(out), tuple(steps), tuple((n,) for n in range(len(jobs))))
    verify(made, jobs, CAPACITY, BLOCK)
    return made


SOLVER = optax.chain(optax.scale_by_adam(), optax.scale(-1.0))


def _losses(logits: Any, ids: Any) -> Any:
    """Of every token but the first of a row, at that token."""
    score = jax.nn.log_softmax(logits[:, :-1])
    return jnp.pad(-jnp.take_along_axis(score, ids[:, 1:, None], -1)[..., 0], ((0, 0), (1, 0)))


@functools.cache
def packed_step(config: decoder.DecoderConfig) -> Callable[..., Any]:
    """One microbatch: gradients of all its jobs, and the steps that are due."""

    def model(params: Any, ids: Any, positions: Any, seen: Any) -> Any:
        return decoder.forward(params, ids, positions, seen, config=config).logits

    def loss(trainable: Any, bank: Any, params: Any, row: Any) -> Any:
        ids, positions, seen, jobs, weights = row
        adapter = segments.packed(bank.replace(trainable=trainable), BLOCK)
        logits = jl.lift(model)(params, adapter, ids, positions, seen, ctx={"jobs": jobs})
        return segments.job_losses(_losses(logits, ids), weights, jobs, BLOCK, len(JOBS)).sum()

    def advance(state: Any, bank: Any, params: Any, row: Any, done: Any) -> Any:
        gradients = jax.grad(loss)(state.trainable, bank, params, row)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            return step.advance(state, gradients, done, jnp.full(len(JOBS), RATE), SOLVER)

    return jax.jit(advance)


def run_packed(data: Mix, order: Plan) -> Any:
    """All steps of all jobs in packed rows; the trained numbers, by job in front."""
    run = packed_step(data.config)
    state = step.start(data.bank.trainable, SOLVER)
    for some in rows(order, ROWS):
        done = np.zeros(len(data.jobs), bool)
        done[list(some.steps)] = True
        parts = [row_of(data, microbatch) for microbatch in some.microbatches]
        inputs = tuple(np.stack(t) for t in zip(*parts, strict=True))
        state = run(state, data.bank, data.params, inputs, done)
    return jax.block_until_ready(state.trainable)


def row_of(data: Mix, microbatch: Microbatch) -> tuple[np.ndarray, ...]:
    """ids, positions, segments, jobs and weights of a microbatch: a mean over each batch."""
    row = layout.row(microbatch, data.tokens, CAPACITY, BLOCK)
    counts = np.ones(len(data.jobs))
    for p in microbatch:
        counts[p.job] = sum(n - 1 for n in data.jobs[p.job].batches[p.batch])
    weights = (row.positions > 0) / np.repeat(counts[row.jobs], BLOCK)
    return (*row, weights.astype(np.float32))


@functools.cache
def alone_step(config: decoder.DecoderConfig, sites: Any) -> Callable[..., Any]:
    """One step of one job on a padded batch."""

    def model(params: Any, ids: Any) -> Any:
        return decoder.forward(params, ids, config=config).logits

    def loss(trainable: Any, frozen: Any, params: Any, ids: Any, weights: Any) -> Any:
        logits = jl.lift(model)(params, jl.Adapter(trainable, frozen, sites), ids)
        return (_losses(logits, ids) * weights).sum()

    def advance(trainable: Any, state: Any, frozen: Any, *batch: Any) -> Any:
        gradients = jax.grad(loss)(trainable, frozen, *batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = SOLVER.update(gradients, state, trainable)
        return jax.tree.map(lambda t, u: t + RATE * u, trainable, updates), state

    return jax.jit(advance)


def run_alone(data: Mix) -> list[Any]:
    """One job after the other, each batch padded to its longest sample; what each has trained."""
    out = []
    for number, job in enumerate(data.jobs):
        adapter = data.bank[number]
        run = alone_step(data.config, adapter.sites)
        trainable, state = adapter.trainable, SOLVER.init(adapter.trainable)
        for batch, lengths in enumerate(job.batches):
            width = -(-max(lengths) // BLOCK) * BLOCK
            ids = np.zeros((len(lengths), width), np.int32)
            weights = np.zeros(ids.shape, np.float32)
            for i, length in enumerate(lengths):
                ids[i, :length] = data.texts[number][batch * BATCH + i]
                weights[i, 1:length] = 1 / sum(n - 1 for n in lengths)
            trainable, state = run(trainable, state, adapter.frozen, data.params, ids, weights)
        out.append(jax.block_until_ready(trainable))
    return out


def measure(seed: int, number: int) -> dict[str, float]:
    """Seconds of the three ways on one draw, and by how much their results differ."""
    data = mix(seed, number)
    ways: dict[str, Callable[[], Any]] = {
        "packed": lambda: run_packed(data, data.plan),
        "alone": lambda: run_alone(data),
        "in order": lambda: run_packed(data, data.control),
    }
    results = {name: way() for name, way in ways.items()}  # compiles
    bank = jax.tree.map(lambda *t: jnp.stack(t), *results["alone"])
    moved = jax.tree.map(lambda a, b, c: (abs(a - b).max(), abs(b - c).max()),
                         results["packed"], bank, data.bank.trainable)  # fmt: skip
    pairs = jax.tree.leaves(moved, is_leaf=lambda x: isinstance(x, tuple))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    drawn = random.Random(seed * MIXES + number)
    for _ in range(REPEATS):
        for name in drawn.sample(sorted(ways), len(ways)):
            begin = time.process_time()
            ways[name]()
            seconds[name].append(time.process_time() - begin)
    lost = waste(rows(data.plan, ROWS), data.jobs, CAPACITY)
    greedy = plan(data.jobs, CAPACITY, BLOCK, pack=bins.first_fit)
    return {name: min(s) for name, s in seconds.items()} | {
        "padding, packed": lost.packed, "padding, alone": lost.alone,
        "microbatches": len(data.plan.microbatches),
        "microbatches by first fit": len(greedy.microbatches),
        "largest difference": max(float(a) for a, _ in pairs),
        "largest step": max(float(b) for _, b in pairs),
    }  # fmt: skip


def run(seed: int, workdir: Path) -> Figures:
    """Logarithm of the seconds on each draw, one seed."""
    found = [measure(seed, number) for number in range(MIXES)]
    more = {name: float(np.mean([f[name] for f in found])) for name in found[0]}
    names = ("packed", "alone", "in order")
    values = (tuple(float(np.log(f[name])) for f in found) for name in names)
    return Figures(tuple(f"draw {n}" for n in range(MIXES)), *values, more=more)


CLAIM = Claim(
    name="lorafusion",
    systems=("LoRAFusion",),
    statement=f"seconds for {BATCHES} steps of {len(JOBS)} jobs on base L: packed <= one after the "
    f"other / {LEAST:g}",
    reference="Zhu 2025, 2510.00206: 1.3 to 1.5 times as fast as the jobs alone",
    baseline="each job alone, its batches padded to the longest sample",
    control="packed without a plan: one job per microbatch, samples in the order of the data",
    unit="log seconds",
    assets=("movie_reviews", "orange", "brown", "stdlib", "vader"),
    run=run,
    margin=float(np.log(LEAST)),
    less_is_better=True,
)
