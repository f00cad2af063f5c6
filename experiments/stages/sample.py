"""Stage `sample`: adapters for every task from its condition, by the generator and by the DDPMs.

Everything is one table of canonical tokens [rows, T, D] with a list saying what each row is, so
that evaluation is one loop. Generated adapters are also written as Orbax checkpoints and as PEFT
directories (`adapters/peft/<task>/`).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.config import Config
from experiments.pipeline import Context, Done, Piece, Stage
from experiments.progress import Progress
from experiments.stages import codec, conditions, generator, pdiff
from experiments.stages.codec import Encoded
from experiments.stages.denoiser import Trained
from experiments.stages.world import World
from experiments.workdir import REDO, StageError, read_json, save_array, write_json
from jlora.generation.diffusion import dit, guidance, samplers

PyTree = Any
BATCH = 40


class Samples(NamedTuple):
    """Sampled adapters."""

    tokens: np.ndarray  # [rows, T, D] canonical tokens
    rows: list[tuple[str, str]]  # (task, kind) of each row; kind as in `kinds_of`

    def of(self, task: str, kind: str) -> np.ndarray:
        """[samples, T, D] of one task and kind. Raises StageError for an unknown task."""
        hits = [i for i, row in enumerate(self.rows) if row == (task, kind)]
        if not hits:
            raise StageError(f"no '{kind}' adapter was sampled for task '{task}'")
        return self.tokens[hits]


class Request(NamedTuple):
    """One adapter to sample with the generator."""

    task: str  # row it belongs to
    kind: str  # generated | shuffled | null | paraphrased | <sampler>/<steps>
    asked: str  # task whose condition is given
    number: int  # sample number
    paraphrase: int = 0  # wording of the description


def generator_sampler(
    config: Config, encoded: Encoded, trained: Trained, method: str, steps: int, path: bool = False
) -> Callable[..., Any]:
    """jitted (params, fixed, keys [n], cond [n,2C,E], null [n]) -> tokens [n, T, D].

    With `path` the decoded points of the sampler's trajectory come too: [n, steps + 1, T, D].
    """
    goal, model = generator.objective(config), dit.bind(generator.network(config))
    plan = samplers.Sampler(method=method, steps=steps)
    shape = trained.fixed.residual.shape[1:]
    kind, kernel = encoded.kinds["generator"], trained.kernel
    guided = guidance.guided(model)

    @jax.jit
    def run(params, fixed, keys, cond, null):
        def one(key, cond, null):
            def denoise(z, t):
                if config.guidance == 1.0:
                    return model(params, z, t, cond, null)[0]
                scale = jnp.where(null, jnp.float32(0), jnp.float32(config.guidance))
                return guided(params, z, t, cond, scale)

            z, states = samplers.sample(denoise, key, shape, goal.path, goal.kind, plan, path)
            points = z[None] if states is None else states

            def decode(z):
                return generator.tokens(fixed, kind, kernel, cond, null, z)

            out = jax.vmap(decode)(points)
            return out if path else out[0]

        return jax.vmap(one)(keys, cond, null)

    return run


def key_of(config: Config, request: Request) -> jax.Array:
    """A key that depends on the request alone, so that any batch gives the same sample."""
    name = f"{request.task}/{request.kind.split('/')[0]}/{request.number}"
    base = jax.random.fold_in(jax.random.key(config.seed), 105)
    return jax.random.fold_in(base, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def inputs(world: World, trained: Trained, requests: Sequence[Request]):
    """(keys, cond, null) of a batch of requests."""
    raw = np.stack([_condition(world, r.asked, r.paraphrase) for r in requests])
    cond = conditions.scaled(trained.fixed.stats, jnp.asarray(raw))
    null = jnp.asarray([r.kind == "null" for r in requests])
    return jnp.stack([key_of(world.config, r) for r in requests]), cond, null


def _condition(world: World, name: str, paraphrase: int) -> np.ndarray:
    return conditions.canonical(world, [name], paraphrase)[0]


def requests_of(world: World, encoded: Encoded) -> list[Request]:
    """Generated adapters for every task, and the condition controls on the seen ones."""
    config = world.config
    out = []
    for task in world.tasks:
        out += [Request(task.name, "generated", task.name, k) for k in range(config.samples)]
    names = encoded.names
    order = np.random.default_rng([config.seed, 9]).permutation(len(names))
    after = {names[order[i]]: names[order[(i + 1) % len(names)]] for i in range(len(names))}
    for name in names:
        out.append(Request(name, "shuffled", after[name], 0))
        out.append(Request(name, "null", name, 0))
        if all(world.task(name).paraphrases):
            out.append(Request(name, "paraphrased", name, 0, 2))
    return out


def step_requests(world: World, encoded: Encoded) -> dict[tuple[str, int], list[Request]]:
    """{(sampler, steps): requests} of the accuracy-against-steps curve."""
    config = world.config
    tasks = encoded.names[:: max(1, len(encoded.names) // config.step_tasks)][: config.step_tasks]
    grid = [int(x) for x in config.step_grid.split(",")]
    samplers_used = ("euler", "heun") if config.objective == "flow" else ("ddim",)
    plans = [(m, n) for m in samplers_used for n in grid]
    plans += [("ddpm", int(x)) for x in config.ddpm_grid.split(",")]
    return {
        (m, n): [Request(t, f"{m}/{n}", t, k) for t in tasks for k in range(min(2, config.samples))]
        for m, n in plans
    }


class Batch(NamedTuple):
    """Adapters that are sampled by one call."""

    call: Callable[..., Any]  # jitted (*arrays, each [size, ...]) -> tokens [size, T, D]
    arrays: Sequence[jax.Array]  # [n, ...] each, n <= size
    size: int  # what n is filled up to, so that all batches of a sampler share a compilation
    rows: list[tuple[str, str]]  # (task, kind) of each


def _split(
    call: Callable, arrays: Sequence[jax.Array], size: int, rows: list[tuple[str, str]]
) -> list[Batch]:
    starts = range(0, len(rows), size)
    return [
        Batch(call, [x[k : k + size] for x in arrays], size, rows[k : k + size]) for k in starts
    ]


def _sampled(batch: Batch) -> np.ndarray:
    """Tokens [n, T, D] of a batch."""
    real = len(batch.rows)
    padded = [
        jnp.concatenate([x, jnp.repeat(x[-1:], batch.size - real, axis=0)]) for x in batch.arrays
    ]
    return np.asarray(batch.call(*padded))[:real]


def pdiff_batches(world: World, encoded: Encoded, trained: Trained, variant: str) -> list[Batch]:
    """The paper's ancestral samples for the seen tasks, decoded with that variant's normaliser."""
    config = world.config
    goal = pdiff.objective()
    plan = samplers.Sampler("ddpm", config.pdiff_sample_steps, clip=4.0)
    model = dit.bind(pdiff.network(config))
    fitted, kind = encoded.fitted[variant], encoded.kinds[variant]
    shape = jax.eval_shape(lambda: codec.latents(encoded, variant)).shape[1:]

    @jax.jit
    def run(params, fitted, keys, cond, task):
        def one(key, cond, task):
            def denoise(z, t):
                return model(params, z, t, cond, jnp.asarray(False))[0]

            z, _ = samplers.sample(denoise, key, shape, goal.path, goal.kind, plan)
            own = task if variant == "pdiff_task" else None
            return codec.decode(kind, fitted, z, own)

        return jax.vmap(one)(keys, cond, task)

    raw = conditions.canonical(world, encoded.names)
    cond = conditions.scaled(trained.fixed.stats, jnp.asarray(raw))
    cond = cond.reshape(len(raw), 1, -1) @ trained.projection
    label = {"pdiff_global": "pdiff_global", "pdiff_task": "pdiff_task_norm"}[variant]
    each = [(n, k) for n in range(len(encoded.names)) for k in range(config.samples)]
    keys = [
        key_of(config, Request(encoded.names[n], variant, encoded.names[n], k)) for n, k in each
    ]
    which = jnp.asarray([n for n, _ in each], jnp.int32)
    call = functools.partial(run, trained.pdiff[variant], fitted)
    arrays = (jnp.stack(keys), cond[which], which)
    return _split(call, arrays, BATCH, [(encoded.names[n], label) for n, _ in each])


def batches_of(world: World, encoded: Encoded, trained: Trained) -> list[Batch]:
    """All that is sampled, in the order of the table."""
    config, out, calls = world.config, [], {}
    wanted = requests_of(world, encoded)
    size = min(BATCH, len(wanted))
    main = ((config.sampler, config.sample_steps), wanted)
    for plan, requests in (main, *step_requests(world, encoded).items()):
        if plan not in calls:  # the curve takes the main sampler too: compiled once
            sampler = generator_sampler(config, encoded, trained, *plan)
            calls[plan] = functools.partial(sampler, trained.params, trained.fixed)
        rows = [(r.task, r.kind) for r in requests]
        out += _split(calls[plan], inputs(world, trained, requests), size, rows)
    for variant in pdiff.VARIANTS:
        out += pdiff_batches(world, encoded, trained, variant)
    return out


def pieces(context: Context, prepared: None) -> list[Piece]:
    """The batches."""
    batches = batches_of(*(context.products[name] for name in ("data", "codec", "denoiser")))
    return [
        Piece(f"batch_{k:04d}.npz", len(batch.rows), functools.partial(_sample, k, batch))
        for k, batch in enumerate(batches)
    ]


def _sample(k: int, batch: Batch, folder: Path, bar: Progress) -> None:
    rows = np.asarray(batch.rows)  # [n, 2] text
    save_array(folder / f"batch_{k:04d}.npz", tokens=_sampled(batch), rows=rows)
    bar.step(len(batch.rows))


def finish(context: Context, prepared: None, folder: Path) -> dict[str, Any]:
    """The batches as one table, and the first generated adapter of every task as files."""
    world, encoded = context.products["data"], context.products["codec"]
    files = sorted(folder.glob("batch_*.npz"))
    tokens, rows = [], []
    for file in files:
        with np.load(file) as batch:
            tokens.append(batch["tokens"])
            rows += [(str(task), str(kind)) for task, kind in batch["rows"]]
    samples = Samples(np.concatenate(tokens), rows)
    export(world, encoded, samples, folder / "adapters", context.processes.first)
    context.processes.wait(f"{folder.name}/exported")  # all have read the batches
    if context.processes.first:
        np.save(folder / "tokens.npy", samples.tokens)
        write_json(folder / "rows.json", rows)
        for file in files:
            file.unlink()
    return {"rows": len(rows)}


def read(context: Context, prepared: None, done: Done) -> Samples:
    """The table."""
    rows = read_json(done.path / "rows.json", list, REDO)
    return Samples(np.load(done.path / "tokens.npy"), [(task, kind) for task, kind in rows])


def adapter_of(encoded: Encoded, tokens: jax.Array) -> jl.Adapter:
    """One adapter from canonical tokens [T, D]."""
    return encoded.template.replace(trainable=codec.to_trainable(encoded, jnp.asarray(tokens)))


def export(
    world: World, encoded: Encoded, samples: Samples, folder: Path, first: bool = True
) -> None:
    """The first generated adapter of every task: one Orbax bank, and a PEFT directory per task.

    Every process calls it, as Orbax asks; `first` writes the other files.
    """
    names = [t.name for t in world.tasks]
    tokens = jnp.asarray(np.stack([samples.of(name, "generated")[0] for name in names]))
    bank = codec.bank(encoded, jax.vmap(lambda x: codec.to_trainable(encoded, x))(tokens))
    # As numpy: Orbax takes an array on a device of one process for a part of a larger one. An
    # unfinished one may be there from a run that was killed.
    jl.io.save_adapter(folder / "orbax", jax.tree.map(np.asarray, bank), overwrite=True)
    if not first:
        return
    write_json(folder / "tasks.json", names)
    for task, one in zip(world.tasks, tokens, strict=True):
        target = folder / "peft" / task.name
        export_peft(world, adapter_of(encoded, one), target, task.description)


def export_peft(world: World, adapter: jl.Adapter, target: Path, description: str) -> None:
    """One adapter as a PEFT directory of the base model's full depth."""
    names = jl.io.bert(layer_offset=world.below)
    jl.io.save_peft(target, adapter, names, base_model_name=world.config.base)
    write_json(target / "task.json", {"description": description})


def describe(samples: Samples) -> str:
    """The samples in one line."""
    count = sum(kind == "generated" for _, kind in samples.rows)
    return f"{len(samples.rows)} adapters sampled, {count} of them generated for the report's tasks"


STAGE = Stage(
    name="sample",
    inputs=("data", "codec", "denoiser"),
    unit="adapter",
    pieces=pieces,
    finish=finish,
    read=read,
    describe=describe,
)
