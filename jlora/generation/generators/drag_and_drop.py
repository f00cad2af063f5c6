r"""Drag-and-Drop: a batch of prompts becomes an adapter's tokens, by convolutions along three axes.

==========  ======================================================================================
c           condition: embeddings of P prompts of a task, [P, L, C]; L tokens each, or L = 1
X_i         block i's input, [n_i, h_i, w_i]; the first is c, the last is the adapter
adapter     T tokens of D numbers, each cut into a rectangle of `rows` x ceil(D / rows)
==========  ======================================================================================

A convolution :math:`\mathrm{Conv}_a` changes the size of axis a: a's entries are its channels, and
its 3 x 3 kernel runs over the other axes. With a bias :math:`\beta_i` per place,

.. math::
    X_{i+1} = \mathrm{Conv}_n\big( \tfrac13 (\mathrm{Conv}_h \mathrm{Conv}_w X_i
        + \mathrm{Conv}_w' \mathrm{Conv}_h' X_i + \beta_i) \big), \qquad
    \min\; \overline{(X_m(c_n + \xi) - x_n)^2}

where x_n is standardised with statistics of the whole bank and :math:`\xi` is noise of size
``noise``. Between blocks stands a GELU. The result is deterministic: no diffusion, no latent.

Reference: Liang 2025, 2506.16406 (equation of a block from memory of the paper, axes and sizes of
the released code).
Deviates: the released code normalises each chunk by its own mean and deviation and writes them into
the token's last entries; here the bank's scale per type of site is used, which leaks nothing about
a task either. The GELU, and intermediate sizes between those of c and of the adapter in geometric
steps; the paper's are (2048, 10, 200) and such.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.contracts.generator import Generator, checked
from jlora.core.adapter import Adapter
from jlora.generation.generators import descent, heads, standardise
from jlora.types import Tree

KERNEL = 3


@dataclasses.dataclass(frozen=True)
class DragAndDropConfig:
    """Hyper-parameters."""

    prompts: tuple[int, int] = (16, 1)  # P and L; the paper has 128 prompts of 384 tokens
    rows: int = 8  # of the rectangle that a token is cut into
    blocks: int = 3  # m
    steps: int = 4000  # of training; the paper's
    batch: int = 64  # adapters per step; the paper's
    rate: float = 1e-3  # of AdamW; the paper has 3e-5 for a much larger decoder
    weight_decay: float = 0.1  # the paper's
    noise: float = 1e-4  # on the condition; the paper's

    def __post_init__(self):
        if min(*self.prompts, self.rows, self.blocks, self.batch) < 1:
            raise ValueError(f"got {self}, expected prompts, rows, blocks and batch of at least 1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DragAndDrop:
    """The state of the generator."""

    params: Tree  # of `Decoder`
    mean: Float[Array, "E"]  # of the conditions
    size: Float[Array, ""]  # root mean square of the centred conditions
    standard: standardise.Standard  # adapters to tokens
    config: DragAndDropConfig = dataclasses.field(metadata={"static": True})


class AxisConv(nn.Module):
    """A convolution over two axes of [n, h, w] whose channels are the third."""

    axis: int
    features: int  # new size of that axis

    @nn.compact
    def __call__(self, x: Float[Array, "n h w"]) -> Float[Array, "m i o"]:
        y = jnp.moveaxis(x, self.axis, -1)
        y = nn.Conv(self.features, (KERNEL, KERNEL))(y)
        return jnp.moveaxis(y, -1, self.axis)


class Block(nn.Module):
    """One block: from [n, h, w] to the given shape."""

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self, x: Float[Array, "n h w"]) -> Float[Array, "m i o"]:
        n, h, w = self.shape
        first = AxisConv(1, h, name="h")(AxisConv(2, w, name="w")(x))
        second = AxisConv(2, w, name="w2")(AxisConv(1, h, name="h2")(x))
        bias = self.param("bias", nn.initializers.zeros_init(), first.shape)
        return AxisConv(0, n, name="n")((first + second + bias) / 3)


def shapes(
    given: tuple[int, int, int], wanted: tuple[int, int, int], blocks: int
) -> tuple[tuple[int, int, int], ...]:
    """Output shapes of the blocks: each axis in geometric steps.

    Args:
      given: shape of the condition.
      wanted: shape of the adapter's tokens.
      blocks: m.

    Returns:
      m shapes, the last one as wanted.
    """

    def size(a: int, b: int, k: int) -> int:
        return round(a ** (1 - k / blocks) * b ** (k / blocks))

    each = [tuple(size(a, b, k) for a, b in zip(given, wanted, strict=True))
            for k in range(1, blocks + 1)]  # fmt: skip
    return tuple(each)  # type: ignore[return-value]


class Decoder(nn.Module):
    """All blocks: one condition to one adapter's tokens."""

    config: DragAndDropConfig
    tokens: tuple[int, int]  # T and D

    @nn.compact
    def __call__(self, c: Float[Array, "E"]) -> Float[Array, "T D"]:
        (length, dim), rows = self.tokens, self.config.rows
        x = c.reshape(*self.config.prompts, -1)
        given = (*self.config.prompts, x.shape[2])
        wanted = (length, rows, math.ceil(dim / rows))
        for k, shape in enumerate(shapes(given, wanted, self.config.blocks)):
            x = Block(shape, name=f"block{k}")(nn.gelu(x) if k else x)
        return x.reshape(length, -1)[:, :dim]


def fit(
    key: PRNGKeyArray,
    conditions: Float[Array, "n E"],
    tasks: Int[Array, "n"],
    bank: Adapter,
    config: DragAndDropConfig | None = None,
) -> DragAndDrop:
    """Trains the decoder on pairs of prompts and adapters.

    Args:
      key: of the parameters, rows and noise.
      conditions: a batch of prompts per adapter, flat: E = P L C. Several rows of one task with
        other prompts make the decoder independent of which prompts are given.
      tasks: of each adapter; not used, every pair counts alike.
      bank: n adapters of LoRA that differ in what is trained alone.
      config: hyper-parameters; None: those of `DragAndDropConfig`.

    Returns:
      The state.

    Raises:
      ValueError: a width of conditions that P L does not divide, conditions that are not finite or
        all alike, or a bank that `standardise.fit` refuses.
      FloatingPointError: the loss is not finite.
    """
    del tasks
    config = config or DragAndDropConfig()
    if conditions.shape[1] % math.prod(config.prompts):
        raise ValueError(
            f"conditions: got width {conditions.shape[1]}, expected a multiple of P L = "
            f"{math.prod(config.prompts)}"
        )
    mean, size = standardise.centre(conditions)
    standard, x = standardise.fit(bank)
    c = (conditions - mean[None]) / size
    begin, steps = jax.random.split(key)
    model = Decoder(config, (x.shape[1], x.shape[2]))
    data = x, c, standardise.loss_weights(standard)
    params = heads.draw(begin, model, c[0])
    params, _ = descent.minimise(loss, solver, model, params, steps, data, config.steps)
    return DragAndDrop(params, mean, size, standard, config)


def loss(
    model: Decoder, params: Tree, key: PRNGKeyArray, done: Float[Array, ""], data: Tree
) -> Float[Array, ""]:
    """Mean square error of standardised numbers over a batch of pairs.

    Args:
      model: the decoder, unbound.
      params: its parameters.
      key: of the rows and the noise.
      done: not used.
      data: (tokens [n, T, D], conditions [n, E], weights of the numbers [T, D]).

    Returns:
      The loss.
    """
    del done
    x, c, weights = data
    pick, draw = jax.random.split(key)
    rows = jax.random.randint(pick, (model.config.batch,), 0, len(x))
    given = c[rows] + model.config.noise * jax.random.normal(draw, (len(rows), c.shape[1]))
    tokens = jax.vmap(model.bind({"params": params}))(given)
    return jnp.mean(jnp.sum(weights[None] * jnp.square(tokens - x[rows]), axis=(1, 2)))


def solver(model: Decoder) -> optax.GradientTransformation:
    """AdamW after clipping of the global norm to 1.

    Args:
      model: whose settings hold rate and decay.

    Returns:
      The optimizer.
    """
    rule = optax.adamw(model.config.rate, weight_decay=model.config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(1.0), rule)


def generate(key: PRNGKeyArray, state: DragAndDrop, condition: Float[Array, "E"]) -> Adapter:
    """The adapter of a batch of prompts.

    Args:
      key: not used: one batch of prompts has one adapter.
      state: of `fit`.
      condition: embeddings of P prompts, flat.

    Returns:
      An adapter like those of the bank.

    Raises:
      ValueError: a condition of another width, or one that is not finite.
    """
    del key
    c = (checked(condition, state.mean.shape[0]) - state.mean) / state.size
    return _generate(state, c)


@jax.jit
def _generate(state: DragAndDrop, c: Array) -> Adapter:
    length, dim = state.standard.norm.mean.shape
    x = Decoder(state.config, (length, dim)).apply({"params": state.params}, c)
    return standardise.adapter(state.standard, jnp.asarray(x))


SYSTEM = Generator(
    name="Drag-and-Drop LLMs",
    paper="Liang 2025, 2506.16406",
    symbol="DragAndDrop",
    evidence="a block by numpy loops; tasks get their own adapter, shuffled ones do not",
    tests=("tests/generation/generators/learning_test.py",),
    kind="component",
    fit=fit,
    generate=generate,
    small={"config": DragAndDropConfig(prompts=(2, 1), rows=3, blocks=2, steps=30, batch=4,
                                       rate=1e-2)},
)  # fmt: skip
