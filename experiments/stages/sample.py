"""Stage `sample`: adapters for every task out of its condition, by ours and by the baselines.

Everything is one table of canonical tokens [rows, T, D] with a list saying what each row is, so
that evaluation is one loop. Generated adapters are also written as Orbax checkpoints and as PEFT
directories (`adapters/<task>/`).
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.config import Config
from experiments.progress import Progress
from experiments.stages import codec, conditions, ours, pdiff
from experiments.stages.codec import Coded
from experiments.stages.denoiser import Trained
from experiments.stages.world import World
from experiments.workdir import Stage, StageError, write_json
from jlora.generation.diffusion import dit, guidance, samplers

PyTree = Any
BATCH = 40


class Draws(NamedTuple):
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
    """One adapter to sample with our generator."""

    task: str  # row it belongs to
    kind: str  # generated | shuffled | null | paraphrased | <sampler>/<steps>
    asked: str  # task whose condition is given
    number: int  # sample number
    paraphrase: int = 0  # wording of the description


def our_sampler(
    config: Config, coded: Coded, trained: Trained, method: str, steps: int, path: bool = False
) -> Callable[..., Any]:
    """jitted (params, fixed, keys [n], cond [n,4,E], null [n]) -> tokens [n, T, D].

    With `path` the decoded points of the sampler's trajectory come too: [n, steps + 1, T, D].
    """
    goal, model = ours.objective(config), dit.bind(ours.network(config))
    plan = samplers.Sampler(method=method, steps=steps)
    shape = trained.fixed.residual.shape[1:]
    kind, kernel = coded.kinds["ours"], trained.kernel
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
                return ours.tokens(fixed, kind, kernel, cond, null, z)

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


def requests_of(world: World, coded: Coded) -> list[Request]:
    """Generated adapters for every task, and the condition controls on the seen ones."""
    config = world.config
    out = []
    for task in world.tasks:
        out += [Request(task.name, "generated", task.name, k) for k in range(config.samples)]
    names = coded.names
    order = np.random.default_rng([config.seed, 9]).permutation(len(names))
    after = {names[order[i]]: names[order[(i + 1) % len(names)]] for i in range(len(names))}
    for name in names:
        out.append(Request(name, "shuffled", after[name], 0))
        out.append(Request(name, "null", name, 0))
        if len(world.task(name).paraphrases[0]) and len(world.task(name).paraphrases[1]):
            out.append(Request(name, "paraphrased", name, 0, 2))
    return out


def step_requests(world: World, coded: Coded) -> dict[tuple[str, int], list[Request]]:
    """{(sampler, steps): requests} of the accuracy-against-steps curve."""
    config = world.config
    tasks = coded.names[:: max(1, len(coded.names) // config.step_tasks)][: config.step_tasks]
    grid = [int(x) for x in config.step_grid.split(",")]
    samplers_used = ("euler", "heun") if config.objective == "flow" else ("ddim",)
    plans = [(m, n) for m in samplers_used for n in grid]
    plans += [("ddpm", int(x)) for x in config.ddpm_grid.split(",")]
    return {
        (m, n): [Request(t, f"{m}/{n}", t, k) for t in tasks for k in range(min(2, config.samples))]
        for m, n in plans
    }


def in_batches(call: Callable, arrays: Sequence[jax.Array], size: int, bar: Progress):
    """Run a batched function over padded batches of `size`; returns [n, ...] as numpy."""
    count, out = len(arrays[0]), []
    for start in range(0, count, size):
        part = [x[start : start + size] for x in arrays]
        real = len(part[0])
        pad = [jnp.concatenate([x, jnp.repeat(x[-1:], size - real, axis=0)]) for x in part]
        out.append(np.asarray(call(*pad))[:real])
        bar.step(real)
    return np.concatenate(out)


def pdiff_tokens(
    world: World, coded: Coded, trained: Trained, variant: str, bar: Progress
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """The paper's ancestral samples for the seen tasks, decoded with that variant's normaliser."""
    config = world.config
    goal = pdiff.objective()
    plan = samplers.Sampler("ddpm", config.pdiff_sample_steps, clip=4.0)
    model = dit.bind(pdiff.network(config))
    fitted, kind = coded.fitted[variant], coded.kinds[variant]
    shape = jax.eval_shape(lambda: codec.latents(coded, variant)).shape[1:]

    @jax.jit
    def run(params, fitted, keys, cond, task):
        def one(key, cond, task):
            def denoise(z, t):
                return model(params, z, t, cond, jnp.asarray(False))[0]

            z, _ = samplers.sample(denoise, key, shape, goal.path, goal.kind, plan)
            own = task if variant == "pdiff_task" else None
            return codec.decode(kind, fitted, z, own)

        return jax.vmap(one)(keys, cond, task)

    raw = conditions.canonical(world, coded.names)
    cond = conditions.scaled(trained.fixed.stats, jnp.asarray(raw))
    cond = cond.reshape(len(raw), 1, -1) @ trained.projection
    label = {"pdiff_global": "pdiff_global", "pdiff_task": "pdiff_task_norm"}[variant]
    rows = [(n, k) for n in range(len(coded.names)) for k in range(config.samples)]
    keys = [key_of(config, Request(coded.names[n], variant, coded.names[n], k)) for n, k in rows]
    which = jnp.asarray([n for n, _ in rows], jnp.int32)
    call = functools.partial(run, trained.pdiff[variant], fitted)
    tokens = in_batches(call, (jnp.stack(keys), cond[which], which), BATCH, bar)
    return tokens, [(coded.names[n], label) for n, _ in rows]


def run(world: World, coded: Coded, trained: Trained, workdir: Path) -> Draws:
    """Sample everything (or read it)."""
    config = world.config
    stage = Stage(workdir, "sample", config.key("sample"))
    folder = stage.path
    if not stage.done:
        folder = stage.open()
        asked = requests_of(world, coded)
        curve = step_requests(world, coded)
        total = len(asked) + sum(len(r) for r in curve.values())
        total += 2 * len(coded.names) * config.samples
        tokens, rows = [], []
        with Progress(workdir, "sample", total, "adapter") as bar:
            main = ((config.sampler, config.sample_steps), asked)
            size, made = min(BATCH, len(asked)), {}
            for plan, wanted in (main, *curve.items()):
                if plan not in made:  # the curve takes the main sampler too: compiled once
                    made[plan] = our_sampler(config, coded, trained, *plan)
                call = functools.partial(made[plan], trained.params, trained.fixed)
                tokens.append(in_batches(call, inputs(world, trained, wanted), size, bar))
                rows += [(r.task, r.kind) for r in wanted]
            for variant in pdiff.VARIANTS:
                found, names = pdiff_tokens(world, coded, trained, variant, bar)
                tokens.append(found)
                rows += names
        np.save(folder / "tokens.npy", np.concatenate(tokens))
        write_json(folder / "rows.json", rows)
        draws = Draws(np.concatenate(tokens), rows)
        export(world, coded, draws, folder / "adapters")
        stage.commit({"rows": len(rows)})
    stage.verify()
    rows = [tuple(r) for r in json.loads((folder / "rows.json").read_text(encoding="utf-8"))]
    return Draws(np.load(folder / "tokens.npy"), rows)


def adapter_of(coded: Coded, tokens: jax.Array) -> jl.Adapter:
    """One adapter from canonical tokens [T, D]."""
    return coded.template.replace(trainable=codec.to_trainable(coded, jnp.asarray(tokens)))


def export(world: World, coded: Coded, draws: Draws, folder: Path) -> None:
    """The first generated adapter of every task: one Orbax bank, and a PEFT directory a task."""
    names = [t.name for t in world.tasks]
    first = jnp.asarray(np.stack([draws.of(name, "generated")[0] for name in names]))
    jl.io.save_adapter(
        folder / "orbax", codec.bank(coded, jax.vmap(lambda x: codec.to_trainable(coded, x))(first))
    )
    write_json(folder / "tasks.json", names)
    for task, tokens in zip(world.tasks, first, strict=True):
        export_peft(world, adapter_of(coded, tokens), folder / "peft" / task.name, task.description)


def export_peft(world: World, adapter: jl.Adapter, target: Path, description: str) -> None:
    """One adapter as a PEFT directory of the base model's full depth."""
    names = jl.io.bert(layer_offset=world.below)
    jl.io.save_peft(target, adapter, names, base_model_name=world.config.base)
    write_json(target / "task.json", {"description": description})


def describe(draws: Draws) -> str:
    """The stage in a line."""
    made = sum(kind == "generated" for _, kind in draws.rows)
    return f"{len(draws.rows)} adapters sampled, {made} of them generated for the report's tasks"
