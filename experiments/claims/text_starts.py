r"""What the claims of initialisations share: LoRA from another start, against LoRA as tuned.

==========  ==============================================================================
t           task, seed s and learning rate eta: those of `text_methods`
phi_t       the start of a task: from the weights, or from `BATCHES` batches of its training rows
x_st        figure of the method, y_st of LoRA from its usual start, both at their own best rate
==========  ==============================================================================

Everything but the start is that of `text_methods`: sites, rows, steps, rates. A task has a start
of its own, so tasks are trained one after the other, with one compiled program:

.. math:: \eta^* = \arg\max_\eta \tfrac1T \textstyle\sum_t v_t(\eta; \phi_t), \qquad
          x_{st} = v_t(\eta^*; \phi_t)

with v the test accuracy, or minus the training loss at the end of equally many steps. The control
is the method, start included, on training labels in random order.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.claims import text_methods as lib
from experiments.claims.protocol import Claim, Figures
from jlora.types import Dynamic, Tree

BATCHES, ROWS = 8, 16  # of the training rows that a start is made from
RECIPE = lib.Recipe("from another start", {})  # steps, batch and optimizer of `text_methods`


class Data(NamedTuple):
    """What the start of one task is made from."""

    fn: Callable[..., Dynamic]  # (params, hidden, mask, head) -> logits
    loss: Callable[..., Dynamic]  # (params, hidden, mask, head, label) -> scalar
    params: Tree  # of the last layer
    inputs: Sequence[Dynamic]  # batches of fn
    labelled: Sequence[Dynamic]  # the same with labels, batches of loss


Start = Callable[[Data, int], tuple[Tree, jl.Adapter]]  # (data, seed) -> (base, adapter)


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """An initialisation and where its grid of learning rates begins. Equal when one object."""

    name: str  # in the record
    start: Start
    rate: float = 1e-3
    shuffled: bool = False


def methods(rank: int) -> dict[str, jl.LoRA]:
    """LoRA at scale 1 on the four attention kernels, as the baseline has it."""
    return dict.fromkeys(lib.SITES, jl.LoRA(rank=rank, alpha=float(rank)))


def data(found: lib.Tasks, task: int, seed: int) -> Data:
    """Batches of training rows of a task, the same for every rate."""
    draw = np.random.default_rng([seed, task])
    rows = draw.permutation(found.index.shape[1])[: BATCHES * ROWS].reshape(BATCHES, ROWS)
    head = jnp.broadcast_to(found.heads[task], (ROWS, *found.heads[task].shape))
    labelled = []
    for pick in rows:
        index = found.index[task][pick]
        labelled.append((found.hidden[index], found.mask[index], head, found.label[task][pick]))

    inputs = [batch[:3] for batch in labelled]
    return Data(found.apply, _loss(found.apply), found.base, inputs, labelled)


@functools.cache
def _loss(apply: Callable[..., Dynamic]) -> Callable[..., Dynamic]:
    """One function object, so that what is compiled for one task serves the others."""

    def loss(params: Tree, hidden: Dynamic, mask: Dynamic, head: Dynamic, y: Dynamic) -> Dynamic:
        logits = apply(params, hidden, mask, head)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss


def tokens(batch: Dynamic) -> Dynamic:
    """Which input rows of a batch are no padding."""
    return batch[1]


def fresh(data: Data, rank: int, seed: int = 0) -> jl.Adapter:
    """LoRA from its usual start."""
    return jl.init(jax.random.key(seed), data.fn, data.params, *data.inputs[0],
                   methods=dict(methods(rank)))  # fmt: skip


def padded(adapter: jl.Adapter, data: Data, rank: int) -> jl.Adapter:
    """LoRA of one rank at every site: zero columns never train, and one program fits all tasks."""
    whole = fresh(data, rank)
    trainable = jax.tree.map(jnp.zeros_like, whole.trainable)
    frozen = dict(whole.frozen)
    for site, _ in adapter.sites:
        for name, t in adapter.trainable[site.path].items():
            place = tuple(slice(0, n) for n in t.shape)
            zeros = trainable[site.path][name]
            trainable[site.path][name] = zeros.at[place].set(t)
        frozen[site.path] = adapter.frozen[site.path]
    return whole.replace(trainable=trainable, frozen=frozen)


class Trained(NamedTuple):
    """One pass over all tasks."""

    loss: np.ndarray  # [T], training loss at the end
    right: np.ndarray  # [T], accuracy on the rows asked for
    size: int  # trained numbers, of all tasks together


def train(method: Method, rate: float, seed: int, rows: str, workdir: Path) -> Trained:
    """All tasks, each from its own start; judged on `rows`, "validation" or "test"."""
    losses, right, size = [], [], 0
    for task, (found, base, adapter) in enumerate(_starts(method, seed, workdir)):
        here, at = found._replace(base=base), np.asarray([task])
        made = lib.train(here, RECIPE, adapter, np.asarray([rate]), at, seed)
        losses.append(made.loss[0])
        trained = adapter.replace(trainable=made.trainable)
        right.append(lib.judge(here, trained, getattr(found, rows), at).mean())
        size += lib.size(adapter)
    return Trained(np.asarray(losses), np.asarray(right), size)


@functools.cache
def _starts(method: Method, seed: int, workdir: Path) -> list[tuple[lib.Tasks, Tree, jl.Adapter]]:
    """(tasks, base, adapter) per task: a start does not depend on the learning rate."""
    found = lib.tasks(workdir)
    if method.shuffled:
        draw = np.random.default_rng([seed, 6])
        label = jnp.asarray(draw.permuted(np.asarray(found.label), axis=1))
        found = found._replace(label=label)
    tasks = range(len(found.names))
    return [(found, *method.start(data(found, task, seed), seed)) for task in tasks]


@functools.cache
def tune(method: Method, workdir: Path, metric: lib.Metric) -> lib.Tuned:
    """The best of three learning rates or more; the grid grows as in `text_methods`."""
    score = {}
    todo = [method.rate / lib.FACTOR, method.rate, method.rate * lib.FACTOR]
    for _ in range(lib.EXTENSIONS + 1):
        for rate in todo:
            made = train(method, rate, lib.TUNING, "validation", workdir)
            value = made.right if metric == "accuracy" else -made.loss
            score[rate] = float(np.nan_to_num(value, nan=-np.inf).mean())
        top, low, high = max(score, key=score.__getitem__), min(score), max(score)
        if low < top < high:
            break
        todo = [top * lib.FACTOR if top == high else top / lib.FACTOR]
    return lib.Tuned(top, top in (low, high), dict(sorted(score.items())))


def figures(
    method: Method, baseline: lib.Recipe, against: Method | None, metric: lib.Metric,
    others: tuple[Method, ...], seed: int, workdir: Path,
) -> Figures:  # fmt: skip
    """The figures per task of an initialisation, of what it is compared with and of the control."""
    found = lib.tasks(workdir)
    plain = lib.run(baseline, lib.tune(baseline, workdir, metric).rate, seed, workdir)
    more = {f"{baseline.name}: accuracy": float(np.mean(plain.accuracy)),
            f"{baseline.name}: training loss": float(np.mean(plain.loss)),
            f"{baseline.name}: trained numbers": plain.size}  # fmt: skip
    values = {}
    for one in (method, *((against,) if against else ()), *others):
        tuned = tune(one, workdir, metric)
        made = train(one, tuned.rate, seed, "test", workdir)
        values[one] = made.right if metric == "accuracy" else made.loss
        more |= {f"{one.name}: rate": tuned.rate,
                 f"{one.name}: rate at an end of the grid": float(tuned.edge),
                 f"{one.name}: accuracy": float(made.right.mean()),
                 f"{one.name}: training loss": float(made.loss.mean()),
                 f"{one.name}: trained numbers per task": made.size / len(found.names)}  # fmt: skip
    shuffled = dataclasses.replace(method, shuffled=True)
    lost = train(shuffled, tune(method, workdir, metric).rate, seed, "test", workdir)
    control = lost.right if metric == "accuracy" else lost.loss
    other = tuple(values[against].tolist()) if against else getattr(plain, metric)
    return Figures(
        found.names, tuple(values[method].tolist()), other, tuple(control.tolist()), more=more
    )


def claim(
    name: str, systems: tuple[str, ...], method: Method, rank: int, reference: str,
    *, margin: float = 0.0, metric: lib.Metric = "loss", others: tuple[Method, ...] = (),
    against: Method | None = None, parameters: str = "at equal parameter count",
) -> Claim:  # fmt: skip
    """The claim that an initialisation is better than LoRA's, each at its own best rate.

    Args:
      name: of the claim file.
      systems: names in the registry.
      method: the initialisation.
      rank: of the baseline.
      reference: where the paper says so.
      margin: by how much it must be better; negative: at most so much worse.
      metric: test accuracy, or the training loss at the end of equally many steps.
      against: what it is compared with instead of LoRA as tuned, with one base and one start.
      others: initialisations whose figures are recorded too.
      parameters: how many are trained.
    """
    baseline, less = lib.lora(rank), metric == "loss"
    name_of = against.name if against else baseline.name
    what = "training loss at the end" if less else "test accuracy"
    more = f" {'+-'[(margin < 0) != less]} {abs(margin):g}" if margin else ""
    return Claim(
        name=name,
        systems=systems,
        statement=f"{what} after {lib.STEPS} steps: {method.name} {'<' if less else '>'} "
        f"{name_of}{more}, {parameters}",
        reference=reference,
        baseline=name_of,
        control="the method, start included, on training labels in random order",
        unit=metric,
        assets=lib.ASSETS,
        run=functools.partial(figures, method, baseline, against, metric, others),
        margin=margin,
        less_is_better=less,
    )
