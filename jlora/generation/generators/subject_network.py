r"""Finetuning-free personalisation: one picture of a subject, one forward pass, an adapter.

==========  ======================================================================================
c           condition, [E]: what a frozen encoder sees in a picture of the subject
e_t         embedding of site slice t, learned, [w]
h           network: blocks of an MLP on W c + e_t, a matrix per site and array
f           frozen model under `jlora.lift`; x_s pictures of the subject s
==========  ======================================================================================

.. math::
    \phi_s = h(c_s), \qquad
    \min_h \; E_s \Big[ L\big(f(W, \phi_s), x_s\big) + \lambda\, \overline{\phi_s^2} \Big], \qquad
    \hat y = y_\varnothing + w_c (y_c - y_\varnothing) + w_s (y_{c, \phi} - y_c)

L is the denoising loss itself: no adapter is trained per subject, gradients reach h through the
model. The mean of squares keeps what is written small, so that h does not leave the base further
than the pictures ask for. The last layer starts at zero for b: a fresh network changes nothing.
Pictures are drawn with the hybrid guidance, `jlora.generation.diffusion.guidance.guided_two`.

Symbols: c -> ``condition``, :math:`\lambda` -> ``penalty``, w -> ``width``.

Reference: "Finetuning-Free Personalization of Text to Image Generation via Hypernetworks" 2025
    (arXiv:2511.03156), the abstract: frozen image encoder, decoder of weights, the denoising loss
    end to end, an L2 penalty on the weights, guidance that mixes base and personalised model.
Deviates: equations, sizes and the weight of the penalty are not in the abstract and are original to
    jlora: the penalty is a mean over all numbers that are written, of both factors.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.core.adapter import Adapter
from jlora.generation.generators import descent, heads
from jlora.generation.tokens import site_tokens
from jlora.system import System
from jlora.types import Batch, Tree

Objective = Callable[[Adapter, PRNGKeyArray, Batch], Array]  # (adapter, key, subject) -> loss
Settings = tuple[site_tokens.TokenSpec, "SubjectConfig", Objective]


@dataclasses.dataclass(frozen=True)
class SubjectConfig:
    """Hyper-parameters; none is published.

    Raises:
      ValueError: impossible numbers.
    """

    width: int = 128  # w
    depth: int = 2  # blocks
    penalty: float = 1e-2  # lambda
    batch: int = 4  # subjects per step
    steps: int = 1000  # of training
    rate: float = 1e-4  # of Adam: a step moves what is written by up to width x rate

    def __post_init__(self):
        if min(self.width, self.batch, self.steps) < 1 or self.depth < 0:
            raise ValueError(
                f"SubjectConfig: got width={self.width}, depth={self.depth}, batch={self.batch}, "
                f"steps={self.steps}; expected at least 1 (depth 0)"
            )
        if self.penalty < 0 or self.rate <= 0:
            raise ValueError(
                f"SubjectConfig: got penalty={self.penalty}, rate={self.rate}; expected penalty "
                ">= 0 and rate > 0"
            )


class Network(nn.Module):
    """h: from a condition to what is trained in the template."""

    spec: site_tokens.TokenSpec
    config: SubjectConfig

    @nn.compact
    def __call__(self, condition: Float[Array, "E"]) -> dict[str, dict[str, Array]]:
        shape = self.spec.length, self.config.width
        places = self.param("places", nn.initializers.normal(1.0), shape)
        x = nn.Dense(self.config.width, name="condition")(condition)[None] + places
        for _ in range(self.config.depth):
            x = heads.Residual(self.config.width)(x)
        return heads.Heads(self.spec)(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SubjectNetwork:
    """A network of one model."""

    params: Tree  # of `Network`
    template: Adapter  # frozen parts and sites
    spec: site_tokens.TokenSpec = dataclasses.field(metadata={"static": True})  # layout
    config: SubjectConfig = dataclasses.field(metadata={"static": True})


def init(
    key: PRNGKeyArray, template: Adapter, width: int, config: SubjectConfig | None = None
) -> SubjectNetwork:
    """A fresh network.

    Args:
      key: of its parameters.
      template: one fresh adapter, which says what has to be written: all that it trains.
      width: E, of conditions.
      config: hyper-parameters; None: those of `SubjectConfig`.

    Returns:
      The state; its adapters change nothing.

    Raises:
      ValueError: a template that trains nothing, or arrays of several dtypes.
    """
    config, spec = config or SubjectConfig(), site_tokens.from_adapter(template)
    params = heads.draw(key, Network(spec, config), jnp.zeros(width))
    return SubjectNetwork(params, template, spec, config)


def adapter(state: SubjectNetwork, condition: Float[Array, "E"]) -> Adapter:
    """The adapter of a subject, in one forward pass.

    Args:
      state: of `init` or `fit`.
      condition: c.

    Returns:
      An adapter like the template.
    """
    written: Tree = Network(state.spec, state.config).apply({"params": state.params}, condition)
    return state.template.replace(trainable={**state.template.trainable, **written})


def fit(
    key: PRNGKeyArray,
    state: SubjectNetwork,
    objective: Objective,
    conditions: Float[Array, "n E"],
    subjects: Batch,
    shared: Batch = None,
) -> tuple[SubjectNetwork, Float[np.ndarray, "steps"]]:
    """Trains the network end to end.

    Args:
      key: of the subjects of a step, and of what the objective draws.
      state: of `init`.
      objective: (adapter, key, (subject, shared)) -> the loss of one subject, through the lifted
        model. One function for several calls is compiled once.
      conditions: of n subjects.
      subjects: PyTree of arrays [n, ...], what the objective needs of each.
      shared: PyTree that all subjects share, such as the base's parameters.

    Returns:
      The trained state, and the loss of each step, penalty included.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    settings = (state.spec, state.config, objective)
    data = (state.template, conditions, subjects, shared)
    params, losses = descent.minimise(
        loss, solver, settings, state.params, key, data, state.config.steps
    )
    return dataclasses.replace(state, params=params), losses


def loss(
    settings: Settings, params: Tree, key: PRNGKeyArray, done: Float[Array, ""], data: Batch
) -> Float[Array, ""]:
    """The mean over subjects that are drawn by the key.

    Args:
      settings: layout, hyper-parameters and objective.
      params: of the network.
      key: of subjects and objective.
      done: share of the steps that are done; not used.
      data: template, conditions, subjects and what they share.

    Returns:
      The loss of the step.
    """
    del done
    spec, config, objective = settings
    template, conditions, subjects, shared = data
    state = SubjectNetwork(params, template, spec, config)
    pick, draw = jax.random.split(key)
    rows = jax.random.randint(pick, (config.batch,), 0, len(conditions))

    def one(row: Array, key: Array) -> Array:
        written = adapter(state, conditions[row])
        own = jax.tree.map(lambda x: x[row], subjects)
        size = heads.mean_square(written.trainable)
        return objective(written, key, (own, shared)) + config.penalty * size

    return jnp.mean(jax.vmap(one)(rows, jax.random.split(draw, config.batch)))


def solver(settings: Settings) -> optax.GradientTransformation:
    """Adam, its rate falling to zero, gradients of norm 1 at most.

    Args:
      settings: as of `loss`.

    Returns:
      The optimizer.
    """
    _, config, _ = settings
    rate = optax.cosine_decay_schedule(config.rate, config.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


SYSTEM = System(
    name="HM-CFG hypernetwork",
    paper="2511.03156",
    symbol="SubjectNetwork",
    evidence="network and penalty by numpy; new subjects through lift; shuffled conditions fail",
    rows=(5,),
    tests=("tests/generation/diffusion/guidance_test.py",),
    claim="subject_network",
)
