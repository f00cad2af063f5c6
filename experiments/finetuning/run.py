"""A run from its settings to its report; everything that can be refused is, before it computes."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jlora as jl
from experiments.finetuning import adapter as adapters
from experiments.finetuning import base as bases
from experiments.finetuning import batches, chat, mesh, packing, records, samples, step, train
from experiments.finetuning.memory import Needs, needs
from experiments.finetuning.optimizer import optimizer
from experiments.finetuning.settings import Settings
from experiments.processes import Processes
from experiments.progress import Progress
from experiments.workdir import digest, read_json, write_json
from jlora.models import decoder

BEFORE, REPORT, CHECKPOINTS = "before.json", "report.json", "checkpoints"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will do."""

    settings: Settings
    base: bases.Base
    rows: packing.Rows  # of training
    held_out: packing.Rows | None
    prompts: tuple[tuple[list[int], str], ...]  # held-out: tokens, and what the data answer
    dropped: int  # examples longer than a row
    steps: int  # of the whole run
    devices: Mesh
    dense: Any  # shapes of the base's parameters
    key: str  # of the settings and of what they read


def plan(settings: Settings, cache: Path | None = None) -> Plan:
    """Reads all but the weights.

    Args:
      settings: of the run.
      cache: of downloads.

    Raises:
      ValueError: whatever is wrong with base, tokenizer, data, method or mesh.
    """
    adapters.method(settings)
    optimizer(settings, 1)
    base = bases.find(settings, cache)
    devices = mesh.mesh(settings.fsdp, settings.tensor)
    dense = jax.eval_shape(lambda: decoder.init(jax.random.key(0), base.config))
    mesh.specs(dense, devices)
    rows, dropped = _rows(settings, base, settings.data)
    held_out, prompts = None, ()
    if settings.eval_data:
        held_out, _ = _rows(settings, base, settings.eval_data)
        examples = records.read(settings.eval_data)[: settings.samples]
        prompts = tuple(chat.prompt(base.tokenizer, record) for record in examples)
    steps = settings.steps or math.ceil(settings.epochs * len(rows.ids) / settings.batch)
    prepare = functools.partial(bases.prepare, settings=settings)
    adapters.check(jax.eval_shape(prepare, dense), base.config, settings)
    longest = max((len(ids) for ids, _ in prompts), default=0)
    if longest + settings.sample_tokens > base.config.max_positions:
        raise ValueError(
            f"sample_tokens: got {settings.sample_tokens} after a prompt of {longest} tokens,"
            f" expected at most {base.config.max_positions} together, the context of the base"
        )
    files = [Path(p) for p in (settings.data, settings.eval_data) if p]
    if settings.start:
        files += sorted(p for p in Path(settings.start).rglob("*") if p.is_file())
    contents = {"base": base.contents} | {f"{n}": digest(path) for n, path in enumerate(files)}
    return Plan(
        settings, base, rows, held_out, prompts, dropped, steps, devices, dense,
        settings.key(contents),
    )  # fmt: skip


def _rows(settings: Settings, base: bases.Base, path: str) -> tuple[packing.Rows, int]:
    documents = [chat.document(base.tokenizer, record) for record in records.read(path)]
    kept, over = packing.fit(documents, settings.max_length, settings.long)
    return packing.rows(kept, settings.max_length, settings.pack), len(over)


@dataclasses.dataclass(frozen=True)
class World:
    """The functions of a run and where its arrays lie."""

    tuned: Any  # the lifted decoder
    step: Any  # jitted, see `step.make`
    places: Any  # shardings of (params, adapter, state)
    rows: NamedSharding  # of the parts of a batch


def world(plan: Plan, params: Any, adapter: Any) -> World:
    """The functions of a run.

    Args:
      plan: of the run.
      params: the prepared parameters, or their shapes.
      adapter: a fresh adapter, or its shapes.
    """
    s, devices = plan.settings, plan.devices
    opt = optimizer(s, plan.steps)
    tuned = jl.lift(adapters.forward(plan.base.config, s))
    specs = mesh.specs(plan.dense, devices)
    mine = jl.specs(adapter, specs, devices)
    copies = NamedSharding(devices, PartitionSpec())
    state = jax.eval_shape(lambda t: step.initial(t, opt, plan.steps), adapter.trainable)
    form = jax.tree.structure(adapter.trainable)
    moments = lambda part: jax.tree.structure(part) == form  # noqa: E731
    # moments lie where the arrays do that they belong to
    inner = jax.tree.map(
        lambda part: mine.trainable if moments(part) else copies, state.optimizer, is_leaf=moments
    )
    places = (
        mesh.shardings(specs, params, devices), mine,
        step.State(copies, mine.trainable, inner, copies),
    )  # fmt: skip
    jitted = jax.jit(step.make(tuned, opt), donate_argnums=(2,), out_shardings=(places[2], copies))
    return World(tuned, jitted, places, NamedSharding(devices, mesh.ROWS))


def dry(plan: Plan) -> list[str]:
    """Parameters, data, steps and memory as text; no weight is read."""
    s = plan.settings
    prepare = functools.partial(bases.prepare, settings=s)
    params = jax.eval_shape(prepare, plan.dense)
    fresh = functools.partial(adapters.fresh, config=plan.base.config, settings=s)
    adapter = jax.eval_shape(fresh, jax.random.key(0), params)
    w = world(plan, params, adapter)
    state = jax.eval_shape(
        lambda t: step.initial(t, optimizer(s, plan.steps), plan.steps), adapter.trainable
    )
    placed = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (params, adapter, state), w.places,
    )  # fmt: skip
    shape = (s.accumulate, s.batch // s.accumulate, s.max_length)
    rows = packing.Rows(
        *(jax.ShapeDtypeStruct(shape, d, sharding=w.rows) for d in (*["int32"] * 3, "float32"))
    )
    compiled = w.step.lower(*placed, rows, jax.random.key(0)).compile()
    needed: Needs = needs(compiled, plan.dense, placed[0], placed[2])
    return needed.lines(plan.steps, len(plan.rows.ids), int(plan.rows.weights.sum()))


def run(plan: Plan, workdir: Path, team: Processes = Processes()) -> dict[str, Any]:  # noqa: B008
    """Trains, evaluates, writes the results, and returns the report.

    Args:
      plan: of the run.
      workdir: of all that is written; a killed run with the same settings is resumed.
      team: the processes whose devices share each step; all of them call this, the first writes.

    Raises:
      ValueError: the weights or the adapter to start from do not fit.
      FloatingPointError: a step that is not finite; the last good checkpoint is kept.
    """
    s = plan.settings
    folder = workdir / f"train-{plan.key}"
    folder.mkdir(parents=True, exist_ok=True)
    params = bases.prepare(plan.base.read(), s)
    keys = jax.random.split(jax.random.key(s.seed))
    adapter = adapters.fresh(keys[0], params, plan.base.config, s)
    if s.start:
        adapter = adapters.continued(adapter, params, plan.base.name, s)
    if s.peft:
        adapters.check_peft(adapter, params)
    w = world(plan, params, adapter)
    params, adapter = mesh.place((params, adapter), w.places[:2])
    opt = optimizer(s, plan.steps)
    state = train.resume(
        folder / CHECKPOINTS, step.initial(adapter.trainable, opt, plan.steps), w.places[2]
    )
    judge, known = _judge(plan, w), (folder / BEFORE).is_file()
    team.wait("looked")  # before anything is written that another process could take for older
    if not known:
        measured = judge(params, adapter)
        if team.first:
            write_json(folder / BEFORE, measured)
        team.wait("before")
    before = read_json(folder / BEFORE, dict, "delete it")
    data = batches.shuffled(plan.rows, s.batch, s.seed)
    copies = NamedSharding(plan.devices, PartitionSpec())
    key = jax.random.wrap_key_data(mesh.place(jax.random.key_data(keys[1]), copies))

    def advance(state: step.State, number: int) -> tuple[step.State, step.Report]:
        drawn: Any = data[number]
        rows = batches.parts(packing.Rows(*drawn), s.accumulate, w.rows)
        return w.step(params, adapter, state, rows, key)

    def keep(state: step.State) -> None:
        whole = mesh.gather(state, plan.devices)
        if team.first:
            train.save(folder / CHECKPOINTS, whole)

    with Progress(workdir, "train", plan.steps, "step", team.index) as bar:
        bar.step(int(state.step))
        checkpoints = (keep, folder / CHECKPOINTS, s.save_every)
        state = train.train(state, advance, plan.steps, *checkpoints, bar)
    adapter = adapter.replace(trainable=state.trainable)
    after = judge(params, adapter)
    whole = mesh.gather(adapter, plan.devices)
    jl.io.save_adapter(workdir / "orbax", whole, overwrite=True)  # Orbax meets the other processes
    host = jax.device_get(whole)
    if s.peft and team.first:
        names = jl.io.llama()
        jl.io.save_peft(workdir / "peft", host, names, plan.base.name, "CAUSAL_LM", params=params)
    report = {
        "settings": dataclasses.asdict(s), "base": plan.base.name, "steps": plan.steps,
        "rows": len(plan.rows.ids), "dropped": plan.dropped,
        "trained": sum(t.size for t in jax.tree.leaves(adapter.trainable)),
        "losses": np.asarray(state.losses).tolist(), "before": before, "after": after,
    }  # fmt: skip
    if team.first:
        write_json(workdir / REPORT, report)
    return report


def _judge(plan: Plan, w: World) -> Any:
    """``(params, adapter) -> {"loss", "answers"}`` on the held-out examples, for JSON."""
    s = plan.settings
    copies = NamedSharding(plan.devices, PartitionSpec())
    measure = samples.evaluator(w.tuned, copies)
    config, ends = plan.base.config, plan.base.ends
    answer = samples.answerer(w.tuned, config, s.sample_tokens, ends, copies)
    size = max(s.batch // s.accumulate, 1)
    held_out = batches.in_order(plan.held_out, size) if plan.held_out is not None else []
    place = NamedSharding(plan.devices, PartitionSpec("fsdp"))

    def judge(params: Any, adapter: Any) -> dict[str, Any]:
        placed = (mesh.place(rows, place) for rows in held_out)
        value = samples.mean_loss(measure, params, adapter, list(placed))
        answers = samples.answers(answer, params, adapter, plan.prompts, plan.base.tokenizer)
        return {"loss": value, "answers": [a._asdict() for a in answers]}

    return judge


def lines(report: dict[str, Any], workdir: Path) -> list[str]:
    """The report in a few lines."""
    losses, out = report["losses"], []
    out.append(f"\ntraining loss: {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last")
    if report["dropped"]:
        out.append(f"{report['dropped']} examples were longer than a row and left out")
    before, after = report["before"], report["after"]
    if not math.isnan(after["loss"]):
        out.append(f"held-out loss: {before['loss']:.4f} before, {after['loss']:.4f} after")
    for old, new in zip(before["answers"], after["answers"], strict=True):
        said = (new["prompt"], old["answer"], new["answer"], new["expected"])
        words = ("prompt", "before", "after", "data")
        out += ["", *(f"{word:>9}: {text}" for word, text in zip(words, said, strict=True))]
    where = [str(workdir / name) for name in ("peft", "orbax") if (workdir / name).exists()]
    return [*out, "", f"Adapter: {', '.join(where)}"]


def compile_settings(workdir: Path) -> None:
    """Compiled programs are kept in the workdir, so that a resumed run does not compile again."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    # The paths of XLA's own caches would be part of every key.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
