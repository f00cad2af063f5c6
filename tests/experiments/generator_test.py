"""Our generator's losses and the tokens they live on, in process and tiny."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.config import Config
from experiments.progress import Progress
from experiments.stages import codec, conditions, generator, world, zoo, zoo_training
from jlora.generation.diffusion import dit

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
