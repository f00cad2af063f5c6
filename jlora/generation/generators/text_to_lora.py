r"""Text-to-LoRA: a hypernetwork from a task's description to the adapter of every site.

==========  ======================================================================================
c           embedding of the description (or any condition), centred, [E]
d_l, m_k    learned embeddings of layer l and of module k (a path: query, value, ...), [embedding]
t           token: a slice of a site, layer l(t) of module k(t)
h_t         features, [width]
==========  ======================================================================================

.. math::
    u &= \mathrm{LayerNorm}(W c + w), \qquad x_t = [u;\, d_{l(t)};\, m_{k(t)}] \\
    h_t &= R_3(R_2(R_1(M(x_t)))), \qquad
    \hat\theta_t = \mathrm{head}_{k(t)}(h_t)

M is a mixing MLP, R_i are residual MLPs, and a head writes all arrays of a slice. Trained in one of
these modes:

.. math::
    \text{regression:}\quad & \min \overline{| \hat\theta - (\mathrm{tokens}(A_n) - m) / s |} \\
    \text{through the loss:}\quad & \min\; L\big(f(W, \theta_0 + \hat\theta(c_q)), D_q\big)
        + \rho\, \overline{\hat\theta^2}

The first reconstructs a bank, standardised number by number with statistics of the whole bank. The
second has no bank: it is given a loss of each training task q, and writes what is added to a fresh
template :math:`\theta_0` (a random, b zero), by heads that start at zero.

Reference: Charakorn 2025, 2506.06105, and its released code.
Deviates: widths are chosen for small models; label smoothing and noise on embedded texts belong to
the user's loss.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.contracts.generator import Generator, checked
from jlora.core.adapter import Adapter
from jlora.generation.generators import descent, heads, standardise
from jlora.generation.tokens import site_tokens
from jlora.types import Batch, Tree

BLOCKS = 3  # residual MLPs
Objective = Callable[[Adapter, Array, PRNGKeyArray, Batch], Array]  # (adapter, task, key, data)


@dataclasses.dataclass(frozen=True)
class Text2LoRAConfig:
    """Hyper-parameters."""

    embedding: int = 64  # of description, layer and module; the paper's
    width: int = 256  # of the features
    steps: int = 2000  # of training
    batch: int = 32  # adapters per step (regression), or tasks per step (through the loss)
    rate: float = 1e-3  # of AdamW; the paper's for regression, 2.5e-5 through the loss
    shrink: float = 1e-3  # rho; the paper's


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Text2LoRA:
    """The state of the generator."""

    params: Tree  # of `Network`
    mean: Float[Array, "E"]  # of the conditions
    size: Float[Array, ""]  # root mean square of the centred conditions
    standard: standardise.Standard | None  # of a bank; None: trained through the loss
    template: Adapter  # theta_0, frozen parts and sites
    spec: site_tokens.TokenSpec = dataclasses.field(metadata={"static": True})  # layout
    config: Text2LoRAConfig = dataclasses.field(metadata={"static": True})


class Network(nn.Module):
    """The hypernetwork of one condition."""

    spec: site_tokens.TokenSpec
    config: Text2LoRAConfig
    zero: tuple[str, ...]  # names of arrays whose heads start at zero

    @nn.compact
    def __call__(self, c: Float[Array, "E"]) -> dict[str, dict[str, Array]]:
        config, spec = self.config, self.spec
        u = nn.LayerNorm(name="norm")(nn.Dense(config.embedding, name="description")(c))
        start = nn.initializers.normal(1.0)
        layers = self.param("layer", start, (int(spec.layers.max()) + 1, config.embedding))
        modules = self.param("module", start, (len(spec.groups), config.embedding))
        x = jnp.concatenate(
            [jnp.broadcast_to(u, (spec.length, len(u))), layers[spec.layers], modules[spec.types]],
            axis=1,
        )
        h = nn.gelu(nn.Dense(4 * config.width, name="mix")(x))
        h = nn.Dense(config.width, name="mixed")(h)
        for k in range(BLOCKS):
            h = heads.Residual(config.width, name=f"block{k}")(h)
        return heads.Heads(spec, self.zero, name="heads")(h)


def fit(
    key: PRNGKeyArray,
    conditions: Float[Array, "n E"],
    tasks: Int[Array, "n"],
    bank: Adapter,
    config: Text2LoRAConfig | None = None,
) -> Text2LoRA:
    """Regression: learns to reconstruct a bank.

    Args:
      key: of the parameters and rows.
      conditions: of each adapter; not all alike.
      tasks: of each adapter; not used, every adapter counts alike.
      bank: n adapters of LoRA that differ in what is trained alone.
      config: hyper-parameters; None: those of `Text2LoRAConfig`.

    Returns:
      The state.

    Raises:
      ValueError: conditions that are not finite or all alike, or a bank that `standardise.fit`
        refuses.
      FloatingPointError: the loss is not finite.
    """
    del tasks
    config = config or Text2LoRAConfig()
    mean, size = standardise.centre(conditions)
    standard, x = standardise.fit(bank, "coordinate")
    c = (conditions - mean[None]) / size
    begin, steps = jax.random.split(key)
    model = Network(standard.spec, config, ())
    data = x, c, standardise.loss_weights(standard)
    params = heads.draw(begin, model, c[0])
    params, _ = descent.minimise(regression, solver, model, params, steps, data, config.steps)
    return Text2LoRA(params, mean, size, standard, standard.template, standard.spec, config)


def regression(
    model: Network, params: Tree, key: PRNGKeyArray, done: Float[Array, ""], data: Tree
) -> Float[Array, ""]:
    """Mean absolute error of standardised numbers over a batch of adapters.

    Args:
      model: the network, unbound.
      params: its parameters.
      key: of the rows.
      done: not used.
      data: (tokens [n, T, D], conditions [n, E], weights of the numbers [T, D]).

    Returns:
      The loss.
    """
    del done
    x, c, weights = data
    rows = jax.random.randint(key, (model.config.batch,), 0, len(x))
    tokens = jax.vmap(lambda one: _tokens(model, params, one))(c[rows])
    return jnp.mean(jnp.sum(weights[None] * jnp.abs(tokens - x[rows]), axis=(1, 2)))


def _tokens(model: Network, params: Tree, c: Array) -> Array:
    return site_tokens.tokenise(model.spec, model.apply({"params": params}, c))  # type: ignore[arg-type]


def fit_through(
    key: PRNGKeyArray,
    conditions: Float[Array, "tasks E"],
    template: Adapter,
    objective: Objective,
    data: Batch,
    config: Text2LoRAConfig | None = None,
) -> tuple[Text2LoRA, Float[np.ndarray, "steps"]]:
    """Through the loss: learns from tasks, not from adapters.

    Args:
      key: of the parameters, tasks and rows.
      conditions: of each training task; not all alike.
      template: one fresh adapter of LoRA, theta_0.
      objective: (adapter, number of the task, key, data) -> scalar: a loss of the lifted model on
        rows of that task. One function for several calls is compiled once.
      data: PyTree of arrays for the objective.
      config: hyper-parameters; None: those of `Text2LoRAConfig`.

    Returns:
      The state, and the loss of each step.

    Raises:
      ValueError: conditions that are not finite or all alike, or a template that trains nothing.
      FloatingPointError: the loss is not finite.
    """
    config, spec = config or Text2LoRAConfig(), site_tokens.from_adapter(template)
    mean, size = standardise.centre(conditions)
    c = (conditions - mean[None]) / size
    begin, steps = jax.random.split(key)
    model = Network(spec, config, ("a", "b"))
    params = heads.draw(begin, model, c[0])
    given = (template, c, data)
    params, losses = descent.minimise(
        through, solver, (model, objective), params, steps, given, config.steps
    )
    return Text2LoRA(params, mean, size, None, template, spec, config), losses


def through(
    settings: tuple[Network, Objective],
    params: Tree,
    key: PRNGKeyArray,
    done: Float[Array, ""],
    data: Tree,
) -> Float[Array, ""]:
    """Mean loss of a batch of tasks, and the penalty on what is written.

    Args:
      settings: the network, unbound, and the objective.
      params: of the network.
      key: of tasks and rows.
      done: not used.
      data: (template, conditions [tasks, E], data for the objective).

    Returns:
      The loss.
    """
    del done
    (model, objective), (template, c, rows) = settings, data
    pick, *keys = jax.random.split(key, model.config.batch + 1)
    tasks = jax.random.randint(pick, (model.config.batch,), 0, len(c))

    def one(task: Array, own: PRNGKeyArray) -> Array:
        written = model.apply({"params": params}, c[task])
        value = objective(_added(template, written), task, own, rows)
        return value + model.config.shrink * heads.mean_square(written)

    return jnp.mean(jax.vmap(one)(tasks, jnp.stack(keys)))


def _added(template: Adapter, written: Tree) -> Adapter:
    """theta_0 + what is written."""
    own = template.trainable
    total = {path: jax.tree.map(jnp.add, own[path], leaves) for path, leaves in written.items()}
    return template.replace(trainable={**own, **total})


def solver(settings: "Network | tuple[Network, Objective]") -> optax.GradientTransformation:
    """AdamW after clipping of the global norm to 1, with a linear decay to 0.

    Args:
      settings: the network, or the network and an objective.

    Returns:
      The optimizer.
    """
    model = settings[0] if isinstance(settings, tuple) else settings
    rate = optax.linear_schedule(model.config.rate, 0.0, model.config.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))


def generate(key: PRNGKeyArray, state: Text2LoRA, condition: Float[Array, "E"]) -> Adapter:
    """The adapter of a description.

    Args:
      key: not used: one condition has one adapter.
      state: of `fit` or `fit_through`.
      condition: embedding of the description.

    Returns:
      An adapter like those of the bank, or like the template.

    Raises:
      ValueError: a condition of another width, or one that is not finite.
    """
    del key
    c = (checked(condition, state.mean.shape[0]) - state.mean) / state.size
    return _generate(state, c)


@jax.jit
def _generate(state: Text2LoRA, c: Array) -> Adapter:
    model = Network(state.spec, state.config, ())  # where heads started is no part of the network
    if state.standard is None:
        return _added(state.template, model.apply({"params": state.params}, c))
    return standardise.adapter(state.standard, _tokens(model, state.params, c))


SYSTEM = Generator(
    name="Text-to-LoRA",
    paper="Charakorn 2025, 2506.06105",
    symbol="Text2LoRA",
    evidence="network by numpy; tasks get their own adapter in both modes, shuffled ones do not",
    tests=("tests/generation/generators/learning_test.py",),
    kind="component",
    fit=fit,
    generate=generate,
    small={"config": Text2LoRAConfig(embedding=4, width=8, steps=30, batch=4, rate=1e-2)},
)
