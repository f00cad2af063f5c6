r"""What the claims of schedules share: adapters of texts whose ranks or layers change over time.

==========  ==============================================================================
t, s, eta   task, seed and learning rate: those of `text_methods`, rows and rates too
q           state of the schedule of one lane
n           step, from 0
==========  ==============================================================================

One step of a lane, with the gradient of the adapter that the schedule shows at that step:

.. math:: g = \nabla_\theta \, L(\mathrm{view}(\theta, q, n)), \qquad
          \theta' = \theta + \mathrm{Adam}(g), \qquad
          (\theta, q) \leftarrow \mathrm{after}(\theta', q, g, n)

At the end `finish` shows the adapter that is judged, merged, on test rows. Without these functions
the loop is that of LoRA in `text_methods`: the same rows at the same steps.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import text_methods as lib
from experiments.stages import world as world_lib
from jlora.types import Dynamic, Tree


def _same(adapter: jl.Adapter, state: Tree, step: Dynamic, key: Dynamic) -> jl.Adapter:
    del state, step, key
    return adapter


def _still(
    adapter: jl.Adapter, state: Tree, gradients: Tree, step: Dynamic, dense: Tree
) -> tuple[jl.Adapter, Tree]:
    del gradients, step, dense
    return adapter, state


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What is trained and what changes on the way. Two plans are equal when they are one object."""

    name: str  # in the record
    methods: Mapping[str, Dynamic]  # path pattern -> method
    rate: float = 8e-3  # the middle of the first three learning rates
    change: Callable[[jl.Adapter, int], jl.Adapter] = lambda adapter, seed: adapter  # when fresh
    start: Callable[[jl.Adapter], Tree] = lambda adapter: ()  # the schedule's state
    lanes: Callable[[int, Path], Tree] | None = None  # (seed, workdir) -> states [T, ...], instead
    view: Callable[..., jl.Adapter] = _same  # (adapter, state, step, key) -> in the loss
    after: Callable[..., tuple[jl.Adapter, Tree]] = _still  # (adapter, state, gradients, step, G)
    finish: Callable[..., jl.Adapter] = _same  # (adapter, state, steps, key) -> judged
    solver: Callable[[Dynamic], optax.GradientTransformation] = optax.adam  # of a schedule
    penalty: Callable[[jl.Adapter], jax.Array] | None = None
    on_logits: Callable[[jax.Array, jax.Array], jax.Array] | None = None  # (tuned, pre-trained)
    dense: bool = False  # whether `after` gets the gradients G of the deltas, by path
    shuffled: bool = False  # training labels in random order
    flipped: float = 0.0  # share of training labels that are turned into the other class
    steps: int = lib.STEPS
    layers: int = 1  # upper layers of the encoder that are adapted
    rows: int = 0  # first training rows of a task that are used; 0: all


def on_attention(name: str, method: Dynamic, **changes: Dynamic) -> Plan:
    """The plan of one method on the four attention kernels."""
    return Plan(name, dict.fromkeys(lib.SITES, method), **changes)


@functools.cache
def lora(rank: int, steps: int = lib.STEPS, layers: int = 1, rows: int = 0) -> Plan:
    """The baseline: LoRA of a rank at scale 1."""
    method = jl.LoRA(rank=rank, alpha=float(rank))
    return on_attention(f"LoRA of rank {rank}", method, steps=steps, layers=layers, rows=rows)


@functools.cache
def tasks(workdir: Path, layers: int = 1) -> lib.Tasks:
    """The four tasks of `text_methods`, on as many upper layers of the encoder."""
    if layers == 1:
        return lib.tasks(workdir)
    config = dataclasses.replace(lib.CONFIG, layers=layers)
    world = world_lib.build(config, workdir, None)
    names = tuple(world.names("seen"))

    def split(name: str, most: int) -> tuple[jax.Array, jax.Array]:
        rows = [world.rows[n, name] for n in names]
        return tuple(
            jnp.asarray(np.stack([np.resize(getattr(r, k), most) for r in rows]), jnp.int32)
            for k in ("index", "label")
        )  # type: ignore[return-value]

    apply = lib.tasks(workdir).apply  # the same classifier
    return lib.Tasks(
        apply, world.upper, names, jnp.asarray(split("train", 2 * config.train_texts)[0]),
        split("train", 2 * config.train_texts)[1],
        jnp.asarray(np.stack([world.head_of(n) for n in names])), world.hidden, world.mask,
        split("validation", lib.ROWS), split("test", lib.TEST),
    )  # fmt: skip


class Lanes(NamedTuple):
    """Trained lanes, one per task."""

    adapter: jl.Adapter  # as trained, arrays [T, ...]
    state: Tree  # of the schedule, arrays [T, ...]
    loss: np.ndarray  # [T], mean training loss of the last steps


def train(plan: Plan, rate: float, seed: int, workdir: Path) -> Lanes:
    """All tasks at one rate."""
    found = tasks(workdir, plan.layers)
    if plan.rows:
        found = few(found, plan.rows)
    if plan.shuffled:
        draw = np.random.default_rng([seed, 5])
        mixed = jnp.asarray(draw.permuted(np.asarray(found.label), axis=1))
        found = found._replace(label=mixed)
    if plan.flipped:
        wrong = np.random.default_rng([seed, 8]).random(found.label.shape) < plan.flipped
        found = found._replace(label=jnp.where(wrong, 1 - found.label, found.label))
    adapter = fresh(plan, seed, workdir)
    data = found._replace(apply=None, names=())  # type: ignore[arg-type]
    static = found.apply, adapter.sites, plan
    lanes = plan.lanes(seed, workdir) if plan.lanes else None
    args = adapter.trainable, adapter.frozen, jnp.float32(rate), jnp.int32(seed), lanes
    trainable, state, losses = _train(*static, data, *args)
    mean = np.asarray(losses, np.float64)[-lib.LAST :].mean(0)
    return Lanes(adapter.replace(trainable=trainable), state, mean)


def few(found: lib.Tasks, rows: int) -> lib.Tasks:
    """The tasks with some of their training rows, drawn once."""
    pick = np.random.default_rng(rows).permutation(found.index.shape[1])[:rows]
    return found._replace(index=found.index[:, pick], label=found.label[:, pick])


def fresh(plan: Plan, seed: int, workdir: Path) -> jl.Adapter:
    """The adapter of a plan before training."""
    found = tasks(workdir, plan.layers)
    example = found.hidden[:1], found.mask[:1], found.heads[:1]
    key, methods = jax.random.key(seed), dict(plan.methods)
    return plan.change(jl.init(key, found.apply, found.base, *example, methods=methods), seed)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _train(apply, sites, plan, found, start, frozen, rate, seed, lanes):
    model = jl.lift(apply)
    solver = plan.solver(lambda n: rate * 0.5 * (1 + jnp.cos(jnp.pi * n / plan.steps)))
    count = found.index.shape[0]
    leaves = {s.path: s.path.split("/") for s, _ in sites}

    def loss(one, dense, state, index, label, head, step, key):
        adapter = plan.view(jl.Adapter(one, frozen, sites), state, step, key)
        heads = jnp.broadcast_to(head, (lib.BATCH, *head.shape))
        base = _added(found.base, dense, leaves)
        logits = model(base, adapter, found.hidden[index], found.mask[index], heads)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        more = plan.penalty(adapter) if plan.penalty else 0.0
        if plan.on_logits:
            before = apply(found.base, found.hidden[index], found.mask[index], heads)
            more += plan.on_logits(logits, jax.lax.stop_gradient(before))
        return value + more, value

    def lane(one, state, solved, task, step):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), task), step)
        pick = jax.random.randint(key, (lib.BATCH,), 0, found.index.shape[1])
        rows = found.index[task][pick], found.label[task][pick], found.heads[task]
        zero = (
            {p: jnp.zeros_like(_leaf(found.base, leaves[p])) for p in leaves} if plan.dense else {}
        )
        args = (state, *rows, step, jax.random.fold_in(key, 1))
        (grads, dense), value = jax.grad(loss, (0, 1), has_aux=True)(one, zero, *args)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, solved = solver.update(grads, solved, one)
        moved = jl.Adapter(optax.apply_updates(one, updates), frozen, sites)  # type: ignore[arg-type]
        moved, state = plan.after(moved, state, grads, step, dense)
        return moved.trainable, state, solved, value

    def step(carry, number):
        mapped = jax.vmap(lane, in_axes=(0, 0, 0, 0, None))
        *carry, value = mapped(*carry, jnp.arange(count, dtype=jnp.int32), number)
        return tuple(carry), value

    each = lambda tree: jax.tree.map(lambda x: jnp.repeat(x[None], count, axis=0), tree)  # noqa: E731
    state = each(plan.start(jl.Adapter(start, frozen, sites))) if lanes is None else lanes
    with jax.numpy_dtype_promotion("standard"):
        carry = each(start), state, each(solver.init(start))
    numbers = jnp.arange(plan.steps, dtype=jnp.int32)
    (trainable, state, _), losses = jax.lax.scan(step, carry, numbers)
    return trainable, state, losses


def _leaf(tree, parts):
    return functools.reduce(lambda t, part: t[part], parts, tree)


def _added(base, more, leaves):
    """The parameters plus arrays at some paths."""
    out = jax.tree.map(lambda x: x, base)
    for path, array in more.items():
        *above, last = leaves[path]
        _leaf(out, above)[last] = _leaf(base, leaves[path]) + array
    return out


def judge(plan: Plan, made: Lanes, rows: str, workdir: Path, finish: Dynamic = None) -> np.ndarray:
    """Accuracy of every lane on its rows, "validation" or "test"; [T].

    `finish` takes the place of the plan's.
    """
    found, out = tasks(workdir, plan.layers), []
    for task in range(len(found.names)):
        own = jax.tree.map(lambda x, i=task: x[i], (made.adapter.trainable, made.state))
        adapter = made.adapter.replace(trainable=own[0])
        end = (finish or plan.finish)(adapter, own[1], jnp.int32(plan.steps), jax.random.key(0))
        lanes = end.replace(trainable=jax.tree.map(lambda x: x[None], end.trainable))
        at = found._replace(heads=found.heads[task : task + 1])
        one = tuple(x[task : task + 1] for x in getattr(found, rows))
        out.append(lib.judge(at, lanes, one, np.asarray([0])).mean())  # type: ignore[arg-type]
    return np.asarray(out)


@functools.cache
def tune(plan: Plan, workdir: Path) -> lib.Tuned:
    """The best of three learning rates or more, by validation accuracy."""
    score: dict[float, float] = {}
    todo = [plan.rate / lib.FACTOR, plan.rate, plan.rate * lib.FACTOR]
    for _ in range(lib.EXTENSIONS + 1):
        for rate in todo:
            made = train(plan, rate, lib.TUNING, workdir)
            score[rate] = float(judge(plan, made, "validation", workdir).mean())
        top, low, high = max(score, key=score.__getitem__), min(score), max(score)
        if low < top < high:
            break
        todo = [top * lib.FACTOR if top == high else top / lib.FACTOR]
    return lib.Tuned(top, top in (low, high), dict(sorted(score.items())))


@functools.cache
def trained(plan: Plan, seed: int, workdir: Path) -> Lanes:
    """A plan at its best rate."""
    return train(plan, tune(plan, workdir).rate, seed, workdir)


@functools.cache
def shuffled(plan: Plan) -> Plan:
    """The plan on training labels in random order (the control)."""
    return dataclasses.replace(plan, name=f"{plan.name}, shuffled labels", shuffled=True)


def lost(plan: Plan, seed: int, workdir: Path) -> Lanes:
    """The control at the rate of the plan."""
    return train(shuffled(plan), tune(plan, workdir).rate, seed, workdir)


def about(plan: Plan, seed: int, workdir: Path) -> dict[str, float]:
    """Figures of a plan that are kept in a record."""
    made, tuned = trained(plan, seed, workdir), tune(plan, workdir)
    return {f"{plan.name}: accuracy": float(judge(plan, made, "test", workdir).mean()),
            f"{plan.name}: training loss": float(made.loss.mean()),
            f"{plan.name}: rate": tuned.rate,
            f"{plan.name}: rate at an end of the grid": float(tuned.edge)}  # fmt: skip
