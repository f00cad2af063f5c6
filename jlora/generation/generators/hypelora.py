r"""HypeLoRA: one hypernetwork writes the LoRA factors of all layers and is trained instead of them.

==========  ======================================================================================
e_t         embedding of layer t, learned: one per site slice, [embedding]
H           network: an MLP on each embedding, or a transformer over all of them
theta_t     what is trained in a template: b of `LoRA(freeze_a=True)`, a and b of `LoRA`
alpha       share of the template's own factors, from ``start`` down to 0
==========  ======================================================================================

.. math::
    \hat\theta = \alpha\, \theta_0 + (1 - \alpha)\, H(e_1, \dots, e_T), \qquad
    \min_{e, H} \; E\, L\big(f(W, \hat\theta)\big), \qquad
    \alpha = \mathrm{start} \cdot (1 - s / S)

The loss is the task's own, end to end: `jlora.lift` of the model is called with the adapter that
the network writes, so gradients reach H through every layer at once and no layer has free
parameters of its own. theta_0 is the fresh template (a random, b zero); the last layer of H starts
at zero for b, so a fresh network changes nothing. Afterwards the adapter is written once, and the
network can be thrown away.

Reference: 2603.19278 (authors' names not read) and the layer list of its released code.
Deviates: the schedule of alpha is linear in the step s of S; of the released forms of the blend
(add, multiply, replace) only this mixture with the template's factors is here.
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

NETWORKS = ("mlp", "transformer")
Objective = Callable[[Adapter, PRNGKeyArray, Batch], Array]  # (adapter, key, data) -> loss
Settings = tuple[site_tokens.TokenSpec, "HypeLoRAConfig", Objective]


@dataclasses.dataclass(frozen=True)
class HypeLoRAConfig:
    """Hyper-parameters; the defaults are those of the released MLP."""

    network: str = "mlp"  # or "transformer": released with width 256, 2 blocks, 16 heads
    embedding: int = 128  # numbers of a layer's embedding
    width: int = 2048  # of the network
    depth: int = 4  # layers of the MLP, or blocks of the transformer
    attention: int = 16  # heads of the transformer
    start: float = 0.99  # alpha at the first step; 0: the network alone from the start
    steps: int = 1000  # of training; the paper counts 80 epochs
    rate: float = 1e-5  # of Adam; the paper's
    weight_decay: float = 0.0  # of AdamW

    def __post_init__(self):
        if self.network not in NETWORKS:
            raise ValueError(f"network: got {self.network!r}, expected one of {NETWORKS}")
        if not 0 <= self.start <= 1:
            raise ValueError(f"start: got {self.start}, expected 0 <= start <= 1")
        if self.network == "transformer" and self.width % self.attention:
            raise ValueError(f"width: got {self.width}, expected a multiple of {self.attention}")


class Network(nn.Module):
    """H with the embeddings; takes nothing, gives what is trained in the template."""

    spec: site_tokens.TokenSpec
    config: HypeLoRAConfig

    @nn.compact
    def __call__(self) -> dict[str, dict[str, Array]]:
        config, shape = self.config, (self.spec.length, self.config.embedding)
        x = self.param("embedding", nn.initializers.normal(1.0), shape)
        if config.network == "mlp":
            for _ in range(config.depth):
                x = nn.gelu(nn.Dense(config.width)(x))
        else:
            x = nn.Dense(config.width)(x)
            for _ in range(config.depth):
                y = nn.LayerNorm()(x)
                x = x + nn.MultiHeadDotProductAttention(config.attention)(y, y)
                x = heads.Residual(config.width)(x)
        return heads.Heads(self.spec)(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HypeLoRA:
    """A hypernetwork of one model."""

    params: Tree  # of `Network`
    template: Adapter  # theta_0, frozen parts and sites
    spec: site_tokens.TokenSpec = dataclasses.field(metadata={"static": True})  # layout
    config: HypeLoRAConfig = dataclasses.field(metadata={"static": True})


def init(key: PRNGKeyArray, template: Adapter, config: HypeLoRAConfig | None = None) -> HypeLoRA:
    """A fresh hypernetwork.

    Args:
      key: of its parameters.
      template: one fresh adapter, which says what has to be written: all that it trains.
      config: hyper-parameters; None: those of `HypeLoRAConfig`.

    Returns:
      The state; its adapter changes nothing.

    Raises:
      ValueError: a template that trains nothing, or arrays of several dtypes.
    """
    config, spec = config or HypeLoRAConfig(), site_tokens.from_adapter(template)
    return HypeLoRA(heads.draw(key, Network(spec, config)), template, spec, config)


def adapter(state: HypeLoRA, alpha: Float[Array, ""] | float = 0.0) -> Adapter:
    """The adapter that the network writes.

    Args:
      state: of `init` or `fit`.
      alpha: share of the template's own factors; 0 after training.

    Returns:
      An adapter like the template.
    """
    written: Tree = Network(state.spec, state.config).apply({"params": state.params})

    def blend(own: Array, generated: Array) -> Array:
        share = jnp.asarray(alpha, own.dtype)
        return share * own + (1 - share) * generated

    trainable = state.template.trainable
    mixed = {path: jax.tree.map(blend, leaves, written[path])
             for path, leaves in trainable.items() if leaves}  # fmt: skip
    return state.template.replace(trainable={**trainable, **mixed})


def fit(
    key: PRNGKeyArray, state: HypeLoRA, objective: Objective, data: Batch
) -> tuple[HypeLoRA, Float[np.ndarray, "steps"]]:
    """Trains network and embeddings by the task's own loss.

    Args:
      key: of what the steps draw.
      state: of `init`.
      objective: (adapter, key, data) -> scalar: a loss of the lifted model on rows that it draws by
        the key. One function for several calls is compiled once.
      data: PyTree of arrays for the objective.

    Returns:
      The trained state, and the loss of each step.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    settings = (state.spec, state.config, objective)
    params, losses = descent.minimise(
        loss, solver, settings, state.params, key, (state.template, data), state.config.steps
    )
    return dataclasses.replace(state, params=params), losses


def loss(
    settings: Settings,
    params: Tree,
    key: PRNGKeyArray,
    done: Float[Array, ""],
    data: tuple[Adapter, Batch],
) -> Float[Array, ""]:
    """The objective at the adapter that the network writes.

    Args:
      settings: layout, hyper-parameters and objective.
      params: of the network.
      key: for the objective.
      done: share s / S of the steps that are done.
      data: template, and data for the objective.

    Returns:
      The loss.
    """
    spec, config, objective = settings
    template, rows = data
    state = HypeLoRA(params, template, spec, config)
    return objective(adapter(state, config.start * (1 - done)), key, rows)


def solver(settings: Settings) -> optax.GradientTransformation:
    """AdamW.

    Args:
      settings: as of `loss`.

    Returns:
      The optimizer.
    """
    _, config, _ = settings
    return optax.adamw(config.rate, weight_decay=config.weight_decay)


SYSTEM = System(
    name="HypeLoRA",
    paper="HypeLoRA 2026, 2603.19278",
    symbol="HypeLoRA",
    evidence="network and blend by numpy; a fresh one changes nothing; gradient through lift",
    rows=(4,),
    claim="hypelora",
)
