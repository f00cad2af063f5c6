r"""What the claims on base C share: adapters of a tiny CLIP whose class vectors are texts.

.. math:: \text{logit}_k(x) = e^{\tau} \, u(x; W, \phi) \cdot v(e_k), \qquad
          L(\phi) = \text{cross entropy of the class}

Symbols: u the picture side of `experiments.clip.model` with frozen weights W and an adapter
:math:`\phi`, e_k the embedding of "a picture of <class k>". Pictures are those of styles that base
C was not trained on; those that `experiments.pictures.sources` holds out are test rows. Tasks have
one number of classes: what is missing has the logit NEVER, so that one program serves all.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora as jl
from experiments.clip import base_c, model, texts
from experiments.pictures import sources
from experiments.pictures.data import scaled

ASSETS = ("minilm", "emoji_google", "openmoji", "mnist", "fashion_mnist")
SITES = tuple(
    rf"vit/layers/{name}/kernel"
    for name in (*(f"attention/{n}" for n in ("query", "key", "value", "out")), "ffn/up",
                 "ffn/down")
)  # fmt: skip
NEVER = -1e9
BATCH, AT_ONCE = 32, 128  # rows of a training step; of a call that measures


class Head(NamedTuple):
    """Class vectors of a task."""

    vectors: Any  # float32 [K, joint], unit; zero where there is no class
    offset: Any  # float32 [K]: 0, or NEVER


class Rows(NamedTuple):
    """Pictures with their classes."""

    pixels: np.ndarray  # uint8 [n, 32, 32, 3]
    label: np.ndarray  # int32 [n]


class Task(NamedTuple):
    """Pictures of one style in its classes."""

    name: str
    head: Head
    train: Rows
    test: Rows


@functools.cache
def base() -> base_c.BaseC:
    """The shipped base C."""
    return base_c.load()


@functools.cache
def classifier(config: model.ClipConfig) -> Callable[..., jax.Array]:
    """(params, pictures [b, ...] in -1 .. 1, Head) -> logits [b, K]."""

    def apply(params: Any, pictures: jax.Array, head: Head) -> jax.Array:
        u = model.images(config, params, pictures)
        return jnp.exp(params["scale"]) * u @ head.vectors.T + head.offset[None]

    return apply


def head_of(names: tuple[str, ...], size: int) -> Head:
    """The class vectors of names.

    Args:
      names: of the classes.
      size: K, with those that are missing.
    """
    c = base()
    vectors = np.asarray(model.texts(c.params, jnp.asarray(texts.embed(names))))
    short = size - len(names)
    offset = np.where(np.arange(size) < len(names), 0.0, NEVER).astype(np.float32)
    return Head(jnp.asarray(np.pad(vectors, ((0, short), (0, 0)))), jnp.asarray(offset))


@functools.cache
def task(style: str, size: int = 10) -> Task:
    """One style; classes are its labels.

    Args:
      style: of `experiments.pictures.sources`.
      size: K of the head.
    """
    pictures = sources.pictures((style,))
    labels = tuple(sorted({p.label for p in pictures}))

    def rows(held_out: bool) -> Rows:
        own = [p for p in pictures if p.held_out == held_out]
        label = np.asarray([labels.index(p.label) for p in own], np.int32)
        return Rows(np.stack([p.pixels for p in own]), label)

    return Task(style, head_of(labels, size), rows(False), rows(True))


def few(rows: Rows, shots: int, seed: int) -> tuple[Rows, Rows]:
    """(`shots` rows of each class, all others).

    Args:
      rows: to choose from.
      shots: of each class.
      seed: of the choice.
    """
    order = np.random.default_rng([seed, shots]).permutation(len(rows.label))
    kinds = [order[rows.label[order] == k][:shots] for k in np.unique(rows.label)]
    chosen = np.concatenate(kinds)
    rest = np.setdiff1d(order, chosen)
    one, other = (Rows(rows.pixels[i], rows.label[i]) for i in (chosen, rest))
    return one, other


def shuffled(rows: Rows, seed: int) -> Rows:
    """The same pictures with their classes in random order (the control)."""
    return rows._replace(label=np.random.default_rng([seed, 5]).permutation(rows.label))


def fresh(apply: Callable[..., Any], params: Any, head: Head, method: Any, seed: int) -> jl.Adapter:
    """A method at its start on every kernel of the blocks.

    Args:
      apply: as of `classifier`.
      params: the weights.
      head: of a task.
      method: of the kernels.
      seed: of the start.
    """
    example = jnp.zeros((1, sources.SIDE, sources.SIDE, 3))
    methods = dict.fromkeys(SITES, method)
    return jl.init(jax.random.key(seed), apply, params, example, head, methods=methods)


def drawn(rows: Rows, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Batches of a run: uint8 [steps, BATCH, ...], int32 [steps, BATCH].

    Args:
      rows: to draw from, with replacement.
      steps: of the run.
      seed: of the choice.
    """
    pick = np.random.default_rng([seed, 7]).integers(0, len(rows.label), (steps, BATCH))
    return rows.pixels[pick], rows.label[pick]


def fit(
    apply: Callable[..., Any], params: Any, adapter: jl.Adapter, head: Head, rows: Rows, *,
    solver: Callable[[Any], optax.GradientTransformation], rate: float, steps: int, seed: int,
) -> jl.Adapter:  # fmt: skip
    """The adapter after `steps` steps on batches of some rows.

    Args:
      apply: as of `classifier`.
      params: the weights, frozen.
      adapter: at its start.
      head: of the task.
      rows: to train on.
      solver: the learning rate, traced, to an optimizer; a function of a module, which is hashable.
      rate: the learning rate.
      steps: of training.
      seed: of the batches.
    """
    pixels, label = drawn(rows, steps, seed)
    trained = _fit(
        apply, adapter.sites, solver, params, adapter.trainable, adapter.frozen, head, pixels,
        label, jnp.float32(rate),
    )  # fmt: skip
    return adapter.replace(trainable=trained)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fit(apply, sites, solver, params, trainable, frozen, head, pixels, label, rate):
    tuned, rule = jl.lift(apply), solver(rate)

    def loss(one, x, y):
        logits = tuned(params, jl.Adapter(one, frozen, sites), x, head)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry, rows):
        one, state = carry
        x = (rows[0].astype(jnp.float32) - 127.5) / 127.5
        grads = jax.grad(loss)(one, x, rows[1])
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, state = rule.update(grads, state, one)
        return (optax.apply_updates(one, updates), state), None

    with jax.numpy_dtype_promotion("standard"):
        begin = trainable, rule.init(trainable)
    return jax.lax.scan(step, begin, (pixels, label))[0][0]


@functools.partial(jax.jit, static_argnums=0)
def _logits(apply, params, x, head):
    return apply(params, x, head)


def accuracy(apply: Callable[..., Any], params: Any, head: Head, rows: Rows) -> float:
    """The share of rows whose class has the highest logit.

    Args:
      apply: as of `classifier`.
      params: merged weights.
      head: of the task.
      rows: to judge on.
    """
    said = []
    for start in range(0, len(rows.label), AT_ONCE):
        chosen = np.minimum(np.arange(start, start + AT_ONCE), len(rows.label) - 1)
        said.append(np.asarray(_logits(apply, params, scaled(rows.pixels[chosen]), head)))
    best = np.concatenate(said)[: len(rows.label)].argmax(-1)
    return float((best == rows.label).mean())
