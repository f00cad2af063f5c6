r"""ICM-LoRA on the text zoo: adapters written from task vectors against those that were trained.

==========  ======================================================================================
t           seen task, 15 of 8 corpora, with `zoo_seeds` adapters each; the zoo is Cond P-Diff's
c_t         task vector: the base's mean state over 16 in-context examples of each class
x_st        accuracy of adapters that the autoencoder of seed s writes for c_t, mean of samples
y_t         accuracy of the task's own adapters, mean over their seeds
z_st        control: the same autoencoder, asked with the task vector of another task
==========  ======================================================================================

.. math:: x_{st} \ge y_t - 0.01

The record also says what the paper counts, bytes of the decoder against bytes of the zoo with one
adapter per task, and what an interpolation gives for the same task vectors: the soup of the task's
own adapters, which is given the task, and ridge regression to principal components.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.claims import cond_pdiff
from experiments.claims.protocol import Claim, Figures
from experiments.config import Config
from experiments.pipeline import Context
from experiments.stages import accuracy, baselines, codec, conditions, evaluate, world, zoo
from experiments.stages.codec import Encoded
from experiments.stages.world import World
from jlora.generation.generators import gaussian, icm_lora

CONFIG = cond_pdiff.CONFIG
SIZES = icm_lora.ICMLoRAConfig(  # the paper's 12 layers, narrower: its decoder has to be small
    channels=(8, 16, 32, 32, 32, 32, 32, 32, 32, 32, 16, 8), latent=64, steps=800, batch=8,
    rate=1e-3,
)  # fmt: skip
RIDGE = gaussian.GaussianConfig(temperature=0.0)
SAMPLES = 2


class Zoo(NamedTuple):
    """The trained adapters, their task vectors, and figures that have no generator in them."""

    every: World
    encoded: Encoded
    bank: jl.Adapter  # n adapters, with those of all seeds and snapshots
    vectors: jax.Array  # [K, 2 d], task vectors
    known: Mapping[str, tuple[float, ...]]  # name -> accuracy per task


@functools.cache
def shared(config: Config, workdir: Path) -> Zoo:
    """What all seeds stand on; base states and zoo are kept in the workdir."""
    context = Context(config, workdir / "cond_pdiff")
    for stage in (world.STAGE, zoo.STAGE):
        context = context.add(stage.name, stage.run(context))
    every, trained = context.products["data"], context.products["zoo"]
    encoded = codec.prepare(every, trained)
    bank = codec.bank(encoded, accuracy.unpack(encoded, jnp.asarray(encoded.x)))
    soups = baselines.soups_of(encoded)
    tokens = {
        "base model": [evaluate.base_tokens(encoded)] * len(soups),
        "own adapters": [evaluate.final_tokens(every, encoded, trained, t)[0]
                         for t in encoded.names],
        "soup": [one[None] for one in soups],
        "mean adapter": [soups.mean(0)[None]] * len(soups),
    }  # fmt: skip
    known = {name: means(every, encoded, each) for name, each in tokens.items()}
    return Zoo(every, encoded, bank, task_vectors(every, encoded.names), known)


def task_vectors(every: World, names: tuple[str, ...]) -> jax.Array:
    """[K, 2 d] task vectors from the in-context examples that a condition has."""
    rows = [conditions.examples(every, name) for name in names]
    states = jnp.asarray(every.embedding)
    return jnp.stack([icm_lora.task_vector(states[r.index], jnp.asarray(r.label), 2) for r in rows])


def means(every: World, encoded: Encoded, tokens: list[np.ndarray]) -> tuple[float, ...]:
    """Test accuracy per task, the mean over its adapters [m, T, D]."""
    hits = (accuracy.correct(every, encoded, name, each)
            for name, each in zip(encoded.names, tokens, strict=True))  # fmt: skip
    return tuple(float(hit.mean()) for hit in hits)


def written(
    found: Zoo, generate: Callable[[jax.Array, jax.Array], jl.Adapter], vectors: jax.Array
) -> list[np.ndarray]:
    """Tokens [samples, T, D] of the adapters that a generator writes for each task vector."""
    keys = jax.random.split(jax.random.key(0), SAMPLES)
    each = [[generate(key, c).trainable for key in keys] for c in vectors]
    stacked = [jax.tree.map(lambda *t: jnp.stack(t), *samples) for samples in each]
    return [np.asarray(codec.to_tokens(found.encoded, found.every.config, t)) for t in stacked]


def figures(config: Config, sizes: icm_lora.ICMLoRAConfig, seed: int, workdir: Path) -> Figures:
    """Accuracies per seen task of written adapters, of own ones, and of those of another task.

    Args:
      config: of the zoo; its own seed is that of the zoo.
      sizes: of the autoencoder.
      seed: of the autoencoder.
      workdir: where base states and zoo are kept.
    """
    found = shared(config, workdir)
    names, task = found.encoded.names, found.encoded.task
    given = found.vectors[task], jnp.asarray(task), found.bank
    state = icm_lora.fit(jax.random.key(seed), *given, sizes)
    ridge = gaussian.fit(jax.random.key(seed), *given, RIDGE)
    ask = {
        "ICM-LoRA": (icm_lora, state, found.vectors),
        "ICM-LoRA, vector of another task": (icm_lora, state, jnp.roll(found.vectors, 1, axis=0)),
        "PCA and ridge": (gaussian, ridge, found.vectors),
    }
    scores = dict(found.known)
    for name, (module, own, vectors) in ask.items():
        made = written(found, lambda key, c, m=module, s=own: m.generate(key, s, c), vectors)
        scores[name] = means(found.every, found.encoded, made)
    one = sum(t[0].size * t.dtype.itemsize for t in jax.tree.leaves(found.bank.trainable))
    more = {f"{name}: accuracy": float(np.mean(each)) for name, each in scores.items()}
    more |= {"bytes of the decoder": icm_lora.size_in_bytes(state),
             "bytes of the zoo, one adapter per task": one * len(names)}  # fmt: skip
    values = ("ICM-LoRA", "own adapters", "ICM-LoRA, vector of another task")
    return Figures(names, *(scores[v] for v in values), more=more)


CLAIM = Claim(
    name="icm_lora",
    systems=("ICM-LoRA",),
    statement="accuracy on 15 seen tasks: adapters written from task vectors > the tasks' own "
    "adapters - 1 point",
    reference="Shao 2025, 2501.17635: written adapters match those that were trained, in 1 % of"
    " the bytes",
    baseline="the task's own trained adapters",
    control="adapters written from the task vector of another task",
    unit="accuracy",
    assets=cond_pdiff.CLAIM.assets,
    run=functools.partial(figures, CONFIG, SIZES),
    margin=-0.01,
)
