r"""What the claims of intruders share: full fine-tuning and LoRA of texts, stopped at equal loss.

==========  ==============================================================================
t           task, one of four; all train at once, a leading axis of what is trained
W, W'_t     the six kernels of MiniLM's last layer, and those of the model tuned to task t
L*          training loss at which a run ends, the same for every recipe
f(x)        pooled features of a text
==========  ==============================================================================

Every `BLOCK` steps of Adam at a constant rate the loss on `SEEN` training rows is measured; a task
keeps the weights of the first time that it is at most L*. A run that never gets there keeps its
last weights, and the record says how many did. The rate is that of the best validation accuracy at
L*, chosen once on a seed of its own.

Forgetting is measured on the other three corpora. A ridge classifier of frozen features is fitted
once per corpus, on the base; the tuned model's features of the same test rows go into it:

.. math:: \mathrm{kept}_t = \tfrac13 \textstyle\sum_{s \ne t} \mathrm{acc}
          \big(\mathrm{ridge}_s(f_{W}); f_{W'_t}, \mathrm{test}_s\big)
"""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import text_methods as lib
from jlora.core.lift import flatten
from jlora.types import Dynamic, Tree

KERNELS = (*lib.SITES, "layers/ffn/up/kernel", "layers/ffn/down/kernel")
LOSS, BLOCK, BLOCKS, SEEN = 0.4, 10, 16, 160  # L*, steps of a block, blocks at most, rows judged
PROBED = 160  # test rows of a corpus that a probe is judged on
RIDGE = 1e-2  # of features of unit norm, times the number of rows


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained on the six kernels."""

    rank: int  # of LoRA at scale 1; 0: the kernels themselves
    rates: tuple[float, ...]  # learning rates that are tried

    @property
    def name(self) -> str:
        """In the record."""
        return f"LoRA of rank {self.rank}" if self.rank else "full fine-tuning"


def lora(rank: int) -> Recipe:
    """LoRA of a rank; all ranks at scale 1 get the rate of rank 8."""
    return Recipe(rank, (1e-3, 3e-3, 9e-3))


FULL = Recipe(0, (3e-5, 1e-4, 3e-4))


class Outcome(NamedTuple):
    """A recipe at the loss that all are stopped at."""

    params: tuple[Tree, ...]  # of the last layer, per task
    adapters: tuple[jl.Adapter, ...]  # per task; () of full fine-tuning
    loss: np.ndarray  # [T], on the rows that are judged
    steps: np.ndarray  # [T], at which it was reached; all of them where it was not


@functools.cache
def fresh(rank: int, seed: int, workdir: Path) -> jl.Adapter:
    """LoRA of the six kernels before training."""
    found = lib.tasks(workdir)
    example = found.hidden[:1], found.mask[:1], found.heads[:1]
    methods = dict.fromkeys(KERNELS, jl.LoRA(rank=rank, alpha=float(rank)))
    return jl.init(jax.random.key(seed), found.apply, found.base, *example, methods=methods)


def train(recipe: Recipe, rate: float, seed: int, workdir: Path) -> Outcome:
    """All tasks at one rate, each to the first time that its loss is low enough."""
    found = lib.tasks(workdir)
    count = len(found.names)
    adapter = fresh(recipe.rank, seed, workdir) if recipe.rank else None
    start = adapter.trainable if adapter else {p: flatten(found.base)[0][p] for p in KERNELS}
    trained = jax.tree.map(lambda x: jnp.repeat(x[None], count, axis=0), start)
    state, kept, reached, at = None, trained, np.full(count, np.inf), np.zeros(count, int)
    data = found._replace(apply=None, names=())  # type: ignore[arg-type]
    static = found.apply, adapter.sites if adapter else None
    frozen = adapter.frozen if adapter else {}
    for block in range(BLOCKS):
        trained, state, loss = _block(*static, data, trained, state, frozen, jnp.float32(rate),
                                      jnp.int32(seed), jnp.int32(block))  # fmt: skip
        loss = np.asarray(loss, np.float64)
        open_ = reached > LOSS  # tasks that are not there yet
        reached, at = np.where(open_, loss, reached), np.where(open_, (block + 1) * BLOCK, at)
        kept = jax.tree.map(lambda new, old, m=open_: jnp.where(_column(m, new), new, old),
                            trained, kept)  # fmt: skip
        if (reached <= LOSS).all():
            break
    own = [jax.tree.map(lambda x, i=t: x[i], kept) for t in range(count)]
    if adapter is None:
        return Outcome(tuple(_with(found.base, o) for o in own), (), reached, at)
    adapters = tuple(adapter.replace(trainable=o) for o in own)
    return Outcome(tuple(_merged(found.base, a) for a in adapters), adapters, reached, at)


def _column(mask, like):
    return jnp.asarray(mask).reshape(-1, *(1,) * (like.ndim - 1))


_merged = jax.jit(jl.merge)


def _with(base, own):
    """The parameters with other arrays at some paths."""
    leaves, tree = flatten(base)
    return jax.tree.unflatten(tree, list({**leaves, **own}.values()))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block(apply, sites, found, trained, state, frozen, rate, seed, block):
    solver = optax.adam(rate)

    def loss(one, index, label, head):
        heads = jnp.broadcast_to(head, (index.shape[0], *head.shape))
        rows = found.hidden[index], found.mask[index], heads
        if sites is None:
            logits = apply(_with(found.base, one), *rows)
        else:
            logits = jl.lift(apply)(found.base, jl.Adapter(one, frozen, sites), *rows)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    def lane(one, state, task, number):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), task), number)
        pick = jax.random.randint(key, (lib.BATCH,), 0, found.index.shape[1])
        grads = jax.grad(loss)(one, found.index[task][pick], found.label[task][pick],
                               found.heads[task])  # fmt: skip
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = solver.update(grads, state, one)
        return optax.apply_updates(one, updates), state

    each = jnp.arange(found.heads.shape[0], dtype=jnp.int32)

    def step(carry, number):
        return jax.vmap(lane, in_axes=(0, 0, 0, None))(*carry, each, number), None

    with jax.numpy_dtype_promotion("standard"):
        state = jax.vmap(solver.init)(trained) if state is None else state
    numbers = block * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
    (trained, state), _ = jax.lax.scan(step, (trained, state), numbers)
    seen = jax.vmap(loss)(trained, found.index[:, :SEEN], found.label[:, :SEEN], found.heads)
    return trained, state, seen


@functools.cache
def rate(recipe: Recipe, workdir: Path) -> float:
    """The rate of the best validation accuracy at the common loss, on a seed of its own."""
    if recipe.rank not in (0, 8):
        return rate(lora(8), workdir)
    score = {}
    for value in recipe.rates:
        made = train(recipe, value, lib.TUNING, workdir)
        score[value] = float(np.mean(accuracy(made.params, "validation", workdir)))
    return max(score, key=score.__getitem__)


@functools.cache
def outcome(recipe: Recipe, seed: int, workdir: Path) -> Outcome:
    """A recipe at its best rate."""
    return train(recipe, rate(recipe, workdir), seed, workdir)


def accuracy(params: tuple[Tree, ...], rows: str, workdir: Path) -> np.ndarray:
    """Accuracy of every task with its own parameters, [T]; rows "validation" or "test"."""
    found, out = lib.tasks(workdir), []
    for task, own in enumerate(params):
        index, label = (x[task].reshape(-1, lib.ROWS) for x in getattr(found, rows))
        right = [_right(found.apply, own, found.hidden[i], found.mask[i], found.heads[task], y)
                 for i, y in zip(index, label, strict=True)]  # fmt: skip
        out.append(np.mean(right))
    return np.asarray(out)


@functools.partial(jax.jit, static_argnums=0)
def _right(apply, base, hidden, mask, head, label):
    heads = jnp.broadcast_to(head, (hidden.shape[0], *head.shape))
    return apply(base, hidden, mask, heads).argmax(-1).astype(jnp.int32) == label


@functools.partial(jax.jit, static_argnums=0)
def _features(apply, base, hidden, mask):
    """f, times the scale of the classifier: its logits for unit vectors as classes."""
    d = hidden.shape[-1]
    return apply(base, hidden, mask, jnp.broadcast_to(jnp.eye(d), (hidden.shape[0], d, d)))


def features(params: Tree, index: np.ndarray, workdir: Path) -> np.ndarray:
    """[n, d] features of texts; n is a multiple of `text_methods.ROWS`."""
    found = lib.tasks(workdir)
    out = [np.asarray(_features(found.apply, params, found.hidden[i], found.mask[i]), np.float64)
           for i in np.reshape(index, (-1, lib.ROWS))]  # fmt: skip
    every = np.concatenate(out)
    return every / np.linalg.norm(every, axis=1, keepdims=True)


@functools.cache
def probes(workdir: Path) -> tuple[np.ndarray, ...]:
    """A ridge classifier of the base's features per task, [d + 1]."""
    found, out = lib.tasks(workdir), []
    for index, label in zip(np.asarray(found.index), np.asarray(found.label), strict=True):
        most = len(index) // lib.ROWS * lib.ROWS
        x = np.c_[features(found.base, index[:most], workdir), np.ones(most)]
        gram = x.T @ x + RIDGE * most / x.shape[1] * np.eye(x.shape[1])
        out.append(np.linalg.solve(gram, x.T @ (2.0 * label[:most] - 1)))
    return tuple(out)


def kept(params: tuple[Tree, ...], workdir: Path) -> np.ndarray:
    """Accuracy of the probes of the other tasks on the features of every tuned model, [T]."""
    index, label = (np.asarray(x)[:, :PROBED] for x in lib.tasks(workdir).test)
    out = []
    for task, own in enumerate(params):
        right = []
        for other, probe in enumerate(probes(workdir)):
            if other != task:
                x = features(own, index[other], workdir)
                right.append(np.mean((x @ probe[:-1] + probe[-1] > 0) == (label[other] == 1)))
        out.append(np.mean(right))
    return np.asarray(out)


def about(name: str, made: Outcome, workdir: Path) -> dict[str, Dynamic]:
    """Figures of a recipe that are kept in a record."""
    return {
        f"{name}: training loss": float(made.loss.mean()),
        f"{name}: share of tasks that reach a loss of {LOSS:g}": float((made.loss <= LOSS).mean()),
        f"{name}: steps": float(made.steps.mean()),
        f"{name}: accuracy": float(accuracy(made.params, "test", workdir).mean()),
        f"{name}: accuracy of probes of other corpora": float(kept(made.params, workdir).mean()),
    }
