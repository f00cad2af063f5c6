"""Our generator's losses and the tokens they live on, in process and tiny."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.config import Config
from experiments.progress import Progress
from experiments.stages import (
    codec,
    conditions,
    denoiser,
    generator,
    sample,
    world,
    zoo,
    zoo_training,
)  # fmt: skip
from jlora.contracts import generator as contract
from jlora.generation.diffusion import dit
from jlora.generation.tokens import site_tokens

SMALL = Config(
    base="tiny", tasks="toy", layers=1, max_length=8, train_texts=20, eval_rows=10, examples=2,
    zoo_steps=4, zoo_segment=4, zoo_batch=4, zoo_chunk=8, zoo_snapshots=2, references=1,
    batch=8, width=16, depth=2, heads=2,
)  # fmt: skip


def data(rows: int = 6) -> generator.Fixed:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    table = conditions.Table(
        draw(3, 2, 2, 5), jnp.zeros((3, 2, 4), jnp.int32), jnp.full((3, 2), 4), draw(3, 2, 5)
    )
    stats = conditions.Scaling(jnp.zeros((4, 5)), jnp.float32(1))
    empty = dict.fromkeys(("scale", "prior", "fitted", "frozen", "upper", "hidden", "mask"))
    return generator.Fixed(
        residual=draw(rows, 2, 3), task=jnp.asarray([0, 0, 1, 1, 2, 2]), stats=stats,
        table=table, embedding=draw(9, 5), **empty,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["none", "infonce_l2", "infonce_cos", "hinge", "covariance"])
def test_every_dispersive_loss_joins_the_diffusion_loss(name):
    config = dataclasses.replace(SMALL, dispersive=name)
    params = dit.init(generator.network(config), jax.random.key(0), (2, 3), (4, 5))
    value = jax.jit(generator.diffusion_value(config))
    total, parts = value(params, data(), jax.random.key(1))
    want = parts["diffusion"] + config.dispersive_weight * parts["dispersive"]
    np.testing.assert_allclose(total, want, rtol=1e-6)
    assert (float(parts["dispersive"]) != 0) == (name != "none")


@pytest.mark.parametrize("objective", ["flow", "v", "eps"])
def test_training_lowers_the_loss(objective):
    config = dataclasses.replace(SMALL, objective=objective, batch=32)
    params = dit.init(generator.network(config), jax.random.key(0), (2, 3), (4, 5))
    opt = generator.solver(1e-2, 60, 0.9)
    step = generator.step_of(generator.diffusion_value(config), opt)

    @jax.jit
    def run(state, fixed):
        keys = jax.random.split(jax.random.key(2), 60)
        return jax.lax.scan(lambda s, k: step(s, fixed, k), state, keys)[1]["diffusion"]

    losses = run(generator.TrainState(params, opt.init(params)), data())
    assert losses[-20:].mean() < 0.92 * losses[:5].mean()


@pytest.mark.parametrize("kind", ["none", "balanced_svd", "procrustes", "frozen_A"])
def test_tokens_keep_the_deltas_of_the_zoo(kind, tmp_path):
    config = dataclasses.replace(SMALL, canonical=kind, alpha=8.0)  # scale 2: must be folded in
    made = world.build(config, tmp_path, None)
    runs = zoo.plan(made)
    fresh = zoo_training.start_points(made, runs)
    noise = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), fresh
    )
    trainable = jax.tree.map(lambda x: np.asarray(x)[:, None], noise)  # one snapshot a run
    zeros = jax.tree.map(lambda x: x[0, 0], trainable)
    losses = np.zeros(len(runs))
    bank = zoo.Zoo(zoo.template(made, 0), trainable, tuple(runs), zeros, losses)
    coded = codec.prepare(made, bank)
    row = 3
    source = bank.template.replace(
        trainable=jax.tree.map(lambda x: jnp.asarray(x[coded.run[row], 0]), trainable)
    )
    back = bank.template.replace(trainable=codec.to_trainable(coded, jnp.asarray(coded.x[row])))
    for path, want in jl.delta(made.upper, source).items():
        got = jl.delta(made.upper, back)[path]
        np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max() + 1))
        assert float(jnp.abs(want).max()) > 1e-3


def test_the_progress_bar_writes_curves(tmp_path):
    with Progress(tmp_path, "zoo", 2, "step") as bar:
        bar.step(2, loss=1.0)
        bar.curve(2, {"loss": 1.0})
    assert list((tmp_path / "tensorboard" / "zoo").glob("events*"))


# --- the laws of generators (tests/contracts/generator_test.py) -----------------------------------


class Apart(NamedTuple):
    """What is not traced."""

    encoded: codec.Encoded
    ask: Callable  # jitted sampler

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """The generator of the stages, its network before training but not at zero."""

    params: dict
    fixed: generator.Fixed
    apart: Apart = dataclasses.field(metadata={"static": True})


def fit(key, raw, tasks, bank):
    """Codec, prior and scales of a bank by the functions of the stages; a condition is [4, 1]."""
    config = dataclasses.replace(SMALL, latent=4, sample_steps=2, task_pool="zoo")
    template, names = bank[0], tuple("abcd")
    spec = site_tokens.from_adapter(template)
    x = np.asarray(codec._tokens(spec, config.canonical, template, None, bank.trainable))
    encoded = codec.Encoded(spec, template, None, names, x, np.asarray(tasks), np.arange(len(x)),
                            {}, {"generator": "pca"})  # fmt: skip
    norm = codec._normaliser(encoded, "generator")
    _, settings = codec.codec_config(config, "generator", len(x))
    rows = codec._normalised(encoded, norm, "generator")
    state, _ = codec.codec.by_name("pca").fit(key, rows, settings)
    encoded = encoded._replace(fitted={"generator": codec.Fitted(norm, state)})
    soups = np.asarray(raw).reshape(4, 2, 4, 1).mean(1)
    data = SimpleNamespace(config=config, pool=(), **dict.fromkeys(
        ("embedding", "upper", "hidden", "mask"), 0.0))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conditions, "canonical", lambda world, names: soups)
        patch.setattr(conditions, "table", lambda world, names: None)
        fixed, choice = denoiser.fixed_parts(data, encoded)
    params = dit.init(generator.network(config), key, fixed.residual.shape[1:], (4, 1))
    params = jax.tree.map(lambda t: t + 0.02, params)
    trained = denoiser.Trained(params, fixed, choice.kernel, choice, {}, jnp.zeros(()))
    ask = sample.generator_sampler(config, encoded, trained, "euler", 2)
    return Fitted(params, fixed._replace(table=jnp.zeros(())), Apart(encoded, ask))


def generate(key, state, condition):
    cond = conditions.scaled(state.fixed.stats, condition.reshape(4, 1))
    given = key[None], cond[None], jnp.zeros(1, bool)
    tokens = state.apart.ask(state.params, state.fixed, *given)[0]
    return sample.adapter_of(state.apart.encoded, tokens)


STAGES = contract.Generator(
    name="the stages", paper="-", symbol="-", evidence="-", fit=fit, generate=generate
)


@pytest.fixture(scope="module")
def bank():
    return contract.world(jl.LoRA(2, freeze_a=True))


@pytest.fixture(scope="module")
def stages(bank):
    """The record; all laws but "same" measure one fit."""
    state = fit(jax.random.key(0), bank.conditions, bank.groups, bank.bank)
    return dataclasses.replace(STAGES, fit=lambda *given: state)


@pytest.mark.parametrize("law", ["same", "batch", "valid", "conditioned"])
def test_the_generator_of_the_stages_obeys(law, stages, bank):
    """Not "refused" (stages are asked for tasks by name) and "jit" (the sampler is jitted)."""
    assert contract.error(law, STAGES if law == "same" else stages, bank) <= 2e-5


def test_mutation_a_generator_of_the_stages_that_is_deaf_is_seen(stages, bank):
    wrong = dataclasses.replace(stages, generate=lambda key, state, c: generate(key, state, 0 * c))
    assert contract.error("conditioned", wrong, bank) == float("inf")
