r"""Many fine-tunings of one base in packed steps: plan, train, write an adapter per job.

The samples of each global batch of each job are known beforehand, so the plan of
`jlora.packing.schedule` covers the whole run. A step takes some rows of `capacity` tokens in which
every block has the adapter of its job; a job moves where the plan says that its batch is complete.
The gradient of a batch is the mean over its learned tokens, as `experiments.finetune` has it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.finetuning import adapter as adapters
from experiments.finetuning import base as bases
from experiments.finetuning import chat, packing, records
from experiments.finetuning.optimizer import schedule
from experiments.finetuning.train import KEPT, checkpoints
from experiments.progress import Progress
from experiments.tuning.jobs_file import Jobs, Task
from experiments.workdir import digest, load_tree, save_tree, write_json
from jlora.packing import layout, segments, step
from jlora.packing import schedule as planner
from jlora.packing.jobs import Job, Microbatch, Piece

PEFT, REPORT = "peft", "report.json"


class Work(NamedTuple):
    """Everything about a run but the weights."""

    jobs: Jobs
    base: bases.Base
    documents: tuple[tuple[chat.Document, ...], ...]  # of each job
    order: tuple[tuple[tuple[int, ...], ...], ...]  # documents by job, global batch and sample
    plan: planner.Plan
    steps: tuple[planner.Rows, ...]  # the plan, some microbatches at a time
    waste: planner.Waste
    key: str  # of the settings and of what they read


class Run(NamedTuple):
    """All that changes during a run."""

    number: Any  # int32 []: steps done
    packed: step.State
    value: Any  # float32 [N]: loss of the global batch of each job, as far as it is done
    losses: Any  # float32 [N, steps]: of each step done
    counts: Any  # int32 [N]: steps done


def prepare(jobs: Jobs, cache: Path | None = None) -> Work:
    """Reads base, tokenizer and data, and plans the run; no weight is read.

    Args:
      jobs: of the file.
      cache: of downloads.

    Raises:
      ValueError: whatever is wrong with base, tokenizer, data or sizes.
    """
    shared = dataclasses.replace(jobs.tasks[0].settings, max_length=jobs.capacity)
    base = bases.find(shared, cache)
    documents, order, planned = [], [], []
    for task in jobs.tasks:
        s = task.settings
        held = [chat.document(base.tokenizer, r) for r in records.read(s.data)]
        held, _ = packing.fit(held, jobs.capacity, s.long)
        count = s.steps or math.ceil(s.epochs * len(held) / s.batch)
        chosen = _order(len(held), s.batch, count, s.seed)
        documents.append(tuple(held))
        order.append(chosen)
        lengths = tuple(tuple(len(held[i].ids) for i in batch) for batch in chosen)
        planned.append(Job(task.name, lengths))
    plan = planner.plan(planned, jobs.capacity, jobs.block)
    planner.verify(plan, planned, jobs.capacity, jobs.block)
    steps = planner.rows(plan, jobs.rows)
    contents = [base.contents, *(digest(Path(t.settings.data)) for t in jobs.tasks)]
    return Work(
        jobs, base, tuple(documents), tuple(order), plan, steps,
        planner.waste(steps, planned, jobs.capacity), _key(jobs, contents),
    )  # fmt: skip


def _order(size: int, batch: int, steps: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Which examples each step sees: an order of its own per epoch, the last step filled up."""
    passes = math.ceil(steps * batch / size)
    drawn = np.concatenate([np.random.default_rng([seed, n]).permutation(size)
                            for n in range(passes)])  # fmt: skip
    parts = (drawn[n * batch : (n + 1) * batch] for n in range(steps))
    return tuple(tuple(int(i) for i in part) for part in parts if len(part))


def _key(jobs: Jobs, contents: list[str]) -> str:
    held = [[t.name, dataclasses.asdict(t.settings) | {"data": "", "base": ""}] for t in jobs.tasks]
    sizes = [jobs.capacity, jobs.rows, jobs.block]
    blob = json.dumps([held, sizes, contents], sort_keys=True)
    return hashlib.sha256(blob.encode()).hexdigest()[:10]


def describe(work: Work) -> list[str]:
    """The plan as text."""
    out = [f"{len(work.jobs.tasks)} jobs over {work.base.name}"]
    for task, held, batches in zip(work.jobs.tasks, work.documents, work.order, strict=True):
        s = task.settings
        out.append(
            f"  {task.name}: {len(held)} examples, {len(batches)} steps of {s.batch}, rank {s.rank}"
        )
    groups = ["+".join(work.jobs.tasks[m].name for m in g) for g in work.plan.groups]
    w, size = work.waste, f"{work.jobs.rows} rows of {work.jobs.capacity} tokens"
    out.append(f"{len(work.steps)} packed steps of {size}; groups: {', '.join(groups)}")
    out.append(f"padding {w.packed:.1%} (each job alone, padded to its longest: {w.alone:.1%})")
    return out


def adapters_of(work: Work, params: Any) -> list[Any]:
    """The fresh adapter of each job: the one that it would have alone.

    Args:
      work: of the run.
      params: the prepared parameters.
    """
    fresh = functools.partial(adapters.fresh, params=params, config=work.base.config)
    return [
        fresh(jax.random.split(jax.random.key(t.settings.seed))[0], settings=t.settings)
        for t in work.jobs.tasks
    ]


def solver(task: Task) -> optax.GradientTransformation:
    """AdamW of one job without its rate."""
    s = task.settings
    clip = [optax.clip_by_global_norm(s.clip)] if s.clip else []
    decay = optax.add_decayed_weights(s.weight_decay)
    return optax.chain(*clip, optax.scale_by_adam(), decay, optax.scale(-1.0))


def inputs(work: Work, rows: planner.Rows) -> tuple[np.ndarray, ...]:
    """ids, positions, segments [R, C], jobs [R, C / M], weights [R, C] of one step.

    Args:
      work: of the run.
      rows: of one step.
    """
    parts = [_row(work, microbatch) for microbatch in rows.microbatches]
    return tuple(np.stack(t) for t in zip(*parts, strict=True))


def _row(work: Work, microbatch: Microbatch) -> tuple[np.ndarray, ...]:
    def document(piece: Piece) -> chat.Document:
        return work.documents[piece.job][work.order[piece.job][piece.batch][piece.sample]]

    place = functools.partial(layout.row, capacity=work.jobs.capacity, block=work.jobs.block)
    row = place(microbatch, lambda p: document(p).ids)
    learned = place(microbatch, lambda p: document(p).learned.astype(np.int32)).ids
    weights = learned * (row.positions > 0)  # no document predicts its own first token
    counts = np.ones(len(work.jobs.tasks))
    for job, batch in {(p.job, p.batch) for p in microbatch}:
        held = (work.documents[job][i] for i in work.order[job][batch])
        counts[job] = sum(int(d.learned[1:].sum()) for d in held)
    scale = np.repeat(1 / counts[row.jobs], work.jobs.block)
    weights = (weights * scale).astype(np.float32)
    return (*row, weights)


def make_step(work: Work, bank: Any) -> Any:
    """``(params, run, inputs, done, rates) -> run``, to be jitted.

    Args:
      work: of the run.
      bank: the fresh adapters, stacked.
    """
    count, block = len(work.jobs.tasks), work.jobs.block
    tuned = jl.lift(adapters.forward(work.base.config, work.jobs.tasks[0].settings))
    rule = solver(work.jobs.tasks[0])

    def loss(trainable: Any, params: Any, row: Any) -> tuple[Any, Any]:
        ids, positions, seen, jobs, weights = row
        adapter = segments.packed(bank.replace(trainable=trainable), block)
        out = tuned(params, adapter, ids, positions, seen, ctx={"jobs": jobs})
        score = jax.nn.log_softmax(out.logits[:, :-1])
        picked = jnp.take_along_axis(score, ids[:, 1:, None], -1)[..., 0]
        losses = jnp.pad(-picked, ((0, 0), (1, 0)))  # at the token that is predicted
        losses = jnp.where(weights > 0, losses, 0.0)  # logits of padding may be anything
        each = segments.job_losses(losses, weights, jobs, block, count)
        return each.sum(), each

    def advance(params: Any, run: Run, row: Any, done: Any, rates: Any) -> Run:
        grads, each = jax.grad(loss, has_aux=True)(run.packed.trainable, params, row)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            packed = step.advance(run.packed, grads, done, rates, rule)
        value = run.value + each
        at = jnp.arange(count), run.counts
        losses = run.losses.at[at].set(jnp.where(done, value, run.losses[at]))
        return Run(
            run.number + 1, packed, jnp.where(done, 0.0, value), losses,
            run.counts + done.astype(jnp.int32),
        )  # fmt: skip

    return advance


def run(work: Work, workdir: Path) -> dict[str, Any]:
    """Trains all jobs, writes their adapters and the report.

    Args:
      work: of `prepare`.
      workdir: of all that is written; a killed run with the same file is resumed.

    Raises:
      ValueError: the weights or a method do not fit.
      FloatingPointError: a loss that is not finite, naming job and step; the last good checkpoint
        is kept.
    """
    tasks = work.jobs.tasks
    params = bases.prepare(work.base.read(), tasks[0].settings)
    fresh = adapters_of(work, params)
    bank = jl.stack(fresh)
    most = max(len(b) for b in work.order)
    with jax.numpy_dtype_promotion("standard"):
        packed = step.start(bank.trainable, solver(tasks[0]))
    n = len(tasks)
    state = Run(jnp.int32(0), packed, jnp.zeros(n), jnp.zeros((n, most)), jnp.zeros(n, jnp.int32))
    folder = workdir / f"train-{work.key}"
    if kept := checkpoints(folder):
        state = jax.tree.map(jnp.asarray, load_tree(kept[-1], state))
    advance = jax.jit(make_step(work, bank), donate_argnums=(1,))
    rates = [schedule(t.settings, len(b)) for t, b in zip(tasks, work.order, strict=True)]
    counts = np.asarray(state.counts).tolist()
    with Progress(workdir, "train", len(work.steps), "step") as bar:
        bar.step(int(state.number))
        for number in range(int(state.number), len(work.steps)):
            done = np.zeros(n, bool)
            done[list(work.steps[number].steps)] = True
            rate = np.array([r(c) for r, c in zip(rates, counts, strict=True)], np.float32)
            row = inputs(work, work.steps[number])
            state = advance(params, state, row, done, rate)
            for job in work.steps[number].steps:
                value = float(state.losses[job, counts[job]])
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"{tasks[job].name}: step {counts[job] + 1}: got loss {value}, expected a"
                        f" finite number; the last good checkpoint is"
                        f" {(checkpoints(folder) or ['none'])[-1]}; try a smaller lr"
                    )
                counts[job] += 1
                bar.curve(counts[job], {f"loss/{tasks[job].name}": value})
            bar.step(1)
            if (number + 1) % work.jobs.save_every == 0 or number + 1 == len(work.steps):
                save_tree(folder / f"step-{number + 1:06d}", state)
                for old in checkpoints(folder)[:-KEPT]:
                    shutil.rmtree(old)
    return _write(work, workdir, params, fresh, bank, state)


def _write(
    work: Work, workdir: Path, params: Any, fresh: list[Any], bank: Any, state: Run
) -> dict[str, Any]:
    """An adapter of its own rank per job, as PEFT and Orbax; the report."""
    trained = bank.replace(trainable=state.packed.trainable)
    report: dict[str, Any] = {"base": work.base.name, "plan": describe(work), "jobs": {}}
    for number, (task, like) in enumerate(zip(work.jobs.tasks, fresh, strict=True)):
        cut = lambda t, own: t[tuple(slice(k) for k in own.shape)]  # noqa: E731
        adapter = like.replace(
            trainable=jax.tree.map(cut, trained[number].trainable, like.trainable)
        )
        jl.io.save_adapter(workdir / task.name / "orbax", adapter, overwrite=True)
        jl.io.save_peft(
            workdir / task.name / PEFT, jax.device_get(adapter), jl.io.llama(), work.base.name,
            "CAUSAL_LM", params=params,
        )  # fmt: skip
        losses = np.asarray(state.losses[number, : len(work.order[number])]).tolist()
        report["jobs"][task.name] = {
            "settings": dataclasses.asdict(task.settings), "losses": losses,
        }  # fmt: skip
    write_json(workdir / REPORT, report)
    return report


def lines(report: dict[str, Any], workdir: Path) -> list[str]:
    """The report in a few lines."""
    out = ["", *report["plan"], ""]
    for name, job in report["jobs"].items():
        losses = job["losses"]
        out.append(
            f"{name}: loss {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last; "
            f"{workdir / name / PEFT}"
        )
    return out
