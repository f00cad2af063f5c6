r"""A conditional flow over adapters: noise and a condition become an adapter.

=============  =================================================================================
A_n, c_n       n trained adapters and their conditions, [E]; task of each, one soup per task
z_n = E(A_n)   latents [T, L]: canonical factors, one token per site slice, one scale per type of
               site, principal components
m(c)           prior mean: kernel ridge from the condition to the latents of the soups
s              root mean square of z_n - m(c_n), one number per token, [T, 1]
f              a DiT that estimates the data y in its noisy form y_t, [T, L]
=============  =================================================================================

.. math::
    y_n = (z_n - m(c_n)) / s, \qquad y_t = (1 - t)\, y + t\, \epsilon, \qquad
    \min_\theta E\, \| f_\theta(y_t, t, c) - y \|^2

.. math:: A(c, \epsilon) = E^{-1}\big( m(c) + s\, \hat y \big), \qquad
          \hat y \text{ by Euler's rule along } dy/dt = \epsilon - f_\theta(y_t, t, c)

No statistic knows the task: what is right for a task comes from its condition alone. A fresh
network returns zero, so an untrained generator is the ridge. The experiment
`experiments.cond_pdiff` trains the same network further, with the task's own loss.

Reference: Jin 2024, 2408.01415 (Conditional P-Diff); Peebles 2023 (the network); Liu 2023 (the
path).
Deviates: a DiT and a straight path where the paper has a U-Net and DDPM; the network corrects a
ridge instead of starting from zero; the paper's statistics of each task are left out, because they
hold its soup.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.contracts.generator import Generator, checked
from jlora.core.adapter import Adapter
from jlora.generation.baselines import ridge, soup
from jlora.generation.codecs import pca
from jlora.generation.diffusion import dit, ema, loss, paths, samplers
from jlora.generation.generators import prior
from jlora.generation.generators.standardise import scales, tokens
from jlora.generation.tokens import canonical, normalise, site_tokens
from jlora.types import Tree

OBJECTIVE = loss.Objective(paths.rectified_flow(), "x0")


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Hyper-parameters; those of `experiments.cond_pdiff`."""

    components: int = 96  # L, at most the number of adapters less one
    width: int = 128  # of the DiT
    depth: int = 4  # its blocks
    heads: int = 4  # its attention heads
    steps: int = 800  # of training
    batch: int = 64  # adapters per step
    rate: float = 1e-3  # peak, after a warm-up, then cosine decay
    decay: float = 0.995  # of the average over parameters
    sample_steps: int = 20  # Euler steps


class Arrays(NamedTuple):
    """What is fitted."""

    params: Tree  # of the DiT, averaged
    mean: Float[Array, "E"]  # of the tasks' conditions
    size: Float[Array, ""]  # root mean square of the centred conditions
    prior: prior.Prior  # m
    scale: Float[Array, "T 1"]  # s
    norm: normalise.Normaliser  # of tokens
    codec: pca.PCAState  # tokens to latents
    template: Adapter  # frozen parts and sites


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlowGenerator:
    """The state of the generator."""

    arrays: Arrays
    kernel: ridge.Kernel = dataclasses.field(metadata={"static": True})  # of the prior
    spec: site_tokens.TokenSpec = dataclasses.field(metadata={"static": True})  # layout of tokens
    config: FlowConfig = dataclasses.field(metadata={"static": True})


def network(config: FlowConfig) -> dit.DiT:
    """The denoiser.

    Args:
      config: width, depth and heads.

    Returns:
      The unbound module.
    """
    return dit.DiT(width=config.width, depth=config.depth, heads=config.heads)


def fit(
    key: PRNGKeyArray,
    conditions: Float[Array, "n E"],
    tasks: Int[Array, "n"],
    bank: Adapter,
    config: FlowConfig | None = None,
) -> FlowGenerator:
    """Trains the generator.

    Args:
      key: of the network's start, and of what each step draws.
      conditions: of each adapter.
      tasks: of each adapter, in any numbering; at least two different ones.
      bank: n adapters of LoRA that differ in what is trained alone.
      config: hyper-parameters; None: those of `FlowConfig`.

    Returns:
      The state.

    Raises:
      ValueError: what is frozen differs between adapters, or conditions are not finite or all
        alike.
      FloatingPointError: the loss is not finite.
    """
    config = config or FlowConfig()
    raw = soup.examples(conditions, tasks, bank).conditions
    mean = jnp.mean(raw, axis=0)
    size = jnp.sqrt(jnp.mean((raw - mean[None]) ** 2))
    _, groups = np.unique(np.asarray(tasks), return_inverse=True)
    template = bank[0]
    spec = site_tokens.from_adapter(template)
    x = jax.vmap(functools.partial(tokens, spec))(bank)
    norm = normalise.fit("site_rms", x, mask=spec.mask, types=spec.types)
    unit = jax.vmap(functools.partial(normalise.apply, norm))(x)
    kept = min(config.components, len(x) - 1, spec.dim)
    codec, _ = pca.fit(key, unit, pca.PCAConfig(components=kept, whiten=False))
    z = jax.vmap(functools.partial(pca.encode, codec))(unit)
    weights = soup.task_weights(jnp.asarray(groups, jnp.int32), len(raw))
    cond = ((raw - mean[None]) / size)[:, None]  # [K, 1, E]
    before, choice = prior.fit(cond, soup.combine(weights, z), "ridge")
    means = jax.vmap(lambda c: prior.mean(before, choice.kernel, c, False))(cond)
    residual = z - means[groups]
    scale = jnp.sqrt(jnp.mean(residual**2, axis=(0, 2)))[:, None]
    scale = jnp.where(scale > 0, scale, jnp.ones_like(scale))
    begin, steps = jax.random.split(key)
    own = ((conditions - mean[None]) / size)[:, None]  # an adapter's own condition, [n, 1, E]
    params, losses = _train(config, begin, steps, residual / scale[None], own)
    if not np.isfinite(losses).all():
        bad = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise FloatingPointError(f"flow: the loss is not finite at step {bad}")
    arrays = Arrays(params, mean, size, before, scale, norm, codec, template)
    return FlowGenerator(arrays, choice.kernel, spec, config)


@functools.partial(jax.jit, static_argnums=0)
def _train(
    config: FlowConfig, begin: PRNGKeyArray, steps: PRNGKeyArray, y: Array, cond: Array
) -> tuple[Tree, Array]:
    """The averaged parameters, and the loss of each step."""
    net = network(config)
    model = dit.bind(net)
    warm = max(1, min(100, config.steps // 10))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.rate, warm, max(config.steps, warm + 1), config.rate / 50
    )
    solver = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-4),
        ema.average(config.decay),
    )  # fmt: skip
    params = dit.init(net, begin, (y.shape[1], y.shape[2]), (cond.shape[1], cond.shape[2]))

    def step(carry: tuple[Tree, Tree], number: Array) -> tuple[tuple[Tree, Tree], Array]:
        params, state = carry
        pick, draw = jax.random.split(jax.random.fold_in(steps, number))
        rows = jax.random.randint(pick, (config.batch,), 0, y.shape[0])

        def value(params: Tree) -> Array:
            return loss.diffusion_loss(model, params, draw, y[rows], cond[rows], OBJECTIVE)[0]

        total, grads = jax.value_and_grad(value)(params)
        # optax raises Python floats to integer counters, which strict promotion would forbid.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = solver.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), total

    start = params, solver.init(params)
    count = jnp.arange(config.steps, dtype=jnp.int32)
    (_, state), losses = jax.lax.scan(step, start, count)
    return ema.averaged(state), losses


def generate(key: PRNGKeyArray, state: FlowGenerator, condition: Float[Array, "E"]) -> Adapter:
    """One adapter.

    Args:
      key: of the noise: another key is another sample.
      state: of `fit`.
      condition: of the task.

    Returns:
      An adapter like those of the bank.

    Raises:
      ValueError: a condition of another width, or one that is not finite.
    """
    arrays = state.arrays
    given = checked(condition, arrays.mean.shape[0])
    return _generate(key, state, given)


@jax.jit
def _generate(key: PRNGKeyArray, state: FlowGenerator, condition: Array) -> Adapter:
    arrays, model = state.arrays, dit.bind(network(state.config))
    cond = ((condition - arrays.mean) / arrays.size)[None]

    def denoise(y: Array, t: Array) -> Array:
        return model(arrays.params, y, t, cond, jnp.asarray(False))[0]

    plan = samplers.Sampler("euler", state.config.sample_steps)
    shape = arrays.prior.values.shape[1:]
    y, _ = samplers.sample(denoise, key, shape, OBJECTIVE.path, OBJECTIVE.kind, plan)
    z = prior.mean(arrays.prior, state.kernel, cond, False) + arrays.scale * y
    x = normalise.invert(arrays.norm, pca.decode(arrays.codec, z))
    trainable = canonical.unfold(site_tokens.detokenise(state.spec, x), scales(arrays.template))
    return arrays.template.replace(trainable=trainable)


SYSTEM = Generator(
    name="Conditional flow over adapters",
    paper="Jin 2024, 2408.01415",
    symbol="FlowGenerator",
    evidence="untrained it is the sum of soups that ridge asks for, by numpy",
    kind="composition",
    rows=(1,),
    claim="cond_pdiff",
    more_claims=("cond_pdiff_styles",),
    fit=fit,
    generate=generate,
    small={"config": FlowConfig(components=4, width=8, depth=1, heads=2, steps=3, batch=4,
                                sample_steps=2)},
)  # fmt: skip
