"""Packed jobs against each job alone, in a scanned decoder: losses, gradients, independence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.models import decoder
from jlora.packing import bins, layout, segments
from jlora.packing.jobs import Job, pieces_of
from jlora.packing.schedule import plan

CONFIG = decoder.DecoderConfig(
    "llama", vocab=16, width=8, layers=2, heads=2, kv_heads=1, head_width=4, ffn=12,
    max_positions=32, init_std=0.3,
)  # fmt: skip
JOBS = [Job("a", ((5, 3),)), Job("b", ((7,),)), Job("c", ((2, 2, 4),))]
RANKS, BLOCK, CAPACITY = (1, 3, 2), 4, 32


def texts(piece):
    return np.random.default_rng([piece.job, piece.sample]).integers(1, 16, piece.length)


def model(params, ids, positions, seen):
    return decoder.forward(params, ids, positions, seen, config=CONFIG).logits


def losses(logits, ids, seen):
    """Of every next token of the same sample, and where there is one."""
    score = jax.nn.log_softmax(logits[:, :-1])
    loss = -jnp.take_along_axis(score, ids[:, 1:, None], -1)[..., 0]
    real = (seen[:, 1:] == seen[:, :-1]) & (seen[:, 1:] >= 0)
    end = ((0, 0), (0, 1))
    return jnp.pad(loss, end), jnp.pad(real.astype(jnp.float32), end)


def arrays(microbatch):
    held = layout.row(microbatch, texts, CAPACITY, BLOCK)
    return tuple(jnp.asarray(t)[None] for t in held)


@pytest.fixture(scope="module")
def world():
    params = decoder.init(jax.random.key(0), CONFIG)
    ids = jnp.zeros((1, 4), jnp.int32)
    adapters = []
    for n, rank in enumerate(RANKS):
        one = jl.init(
            jax.random.key(n), functools.partial(decoder.forward, config=CONFIG), params, ids,
            methods={r"layers/.*(query|down)/kernel": jl.LoRA(rank, alpha=2.0 * n + 1)},
        )  # fmt: skip
        leaves, tree = jax.tree.flatten(one.trainable)
        keys = jax.random.split(jax.random.key(9 + n), len(leaves))
        values = [jax.random.normal(k, t.shape) for k, t in zip(keys, leaves, strict=True)]
        adapters.append(one.replace(trainable=jax.tree.unflatten(tree, values)))
    return params, jl.stack(adapters)


@pytest.fixture(scope="module")
def together(world):
    """Function of (trainable of the bank, row): the loss of each job."""
    params, bank = world

    @jax.jit
    def run(trainable, ids, positions, seen, jobs):
        adapter = segments.packed(bank.replace(trainable=trainable), BLOCK)
        logits = jl.lift(model)(params, adapter, ids, positions, seen, ctx={"jobs": jobs})
        return segments.job_losses(*losses(logits, ids, seen), jobs, BLOCK, len(JOBS))

    return run, jax.jit(jax.grad(lambda *a: run(*a).sum()))


@pytest.fixture(scope="module")
def alone(world):
    """Function of (trainable of one adapter, its number, row): its loss and gradient."""
    params, bank = world

    def run(trainable, frozen, ids, positions, seen):
        adapter = bank[0].replace(trainable=trainable, frozen=frozen)
        loss, weight = losses(jl.lift(model)(params, adapter, ids, positions, seen), ids, seen)
        return (loss * weight).sum()

    return jax.jit(jax.value_and_grad(run))


def test_each_job_has_the_loss_and_gradient_that_it_has_alone(world, together, alone):
    """The plan puts all jobs in one microbatch; alone, each sample is a row."""
    _, bank = world
    made = plan(JOBS, CAPACITY, BLOCK, pack=bins.first_fit)
    assert len(made.microbatches) == 1
    held = arrays(made.microbatches[0])
    value, gradient = together[0](bank.trainable, *held), together[1](bank.trainable, *held)
    for n in range(len(JOBS)):
        total, sums = 0.0, None
        for piece in pieces_of(JOBS, (n,), 0):
            ids, positions, seen, _ = arrays((piece,))
            one, g = alone(bank[n].trainable, bank[n].frozen, ids, positions, seen)
            total, sums = total + one, g if sums is None else jax.tree.map(jnp.add, sums, g)
        np.testing.assert_allclose(value[n], total, rtol=2e-5)
        for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(sums), strict=True):
            np.testing.assert_allclose(got[n], want, rtol=2e-4, atol=2e-4 * np.abs(want).max())
    small = jax.tree.leaves(bank[0].trainable)  # of rank 1, padded to 3: padding has no gradient
    for t, g in zip(small, jax.tree.leaves(gradient), strict=True):
        assert not np.asarray(g[0])[np.asarray(t) == 0].any() and np.asarray(g[0]).any()


def test_other_jobs_and_padding_change_nothing(world, together):
    _, bank = world
    held = arrays(plan(JOBS, CAPACITY, BLOCK, pack=bins.first_fit).microbatches[0])
    ids, positions, seen, jobs = held
    of = np.repeat(np.asarray(jobs), BLOCK, 1)
    others = jnp.where((of == 1) & (np.asarray(seen) >= 0), ids, (ids + 3) % 16)
    before, after = (
        together[0](bank.trainable, *held),
        together[0](bank.trainable, others, *held[1:]),
    )
    assert before[1] == after[1] and before[0] != after[0]
    a, b = (together[1](bank.trainable, t, positions, seen, jobs) for t in (ids, others))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x[1], y[1])
        assert not np.array_equal(x[0], y[0])
    wrong = jobs.at[0, 0].set(2)  # a block that has another job's adapter is seen
    assert together[0](bank.trainable, ids, positions, seen, wrong)[0] != before[0]


def test_what_cannot_be_packed_is_refused(world):
    params, bank = world
    with pytest.raises(ValueError, match="block: got 0"):
        segments.packed(bank, 0)
    with pytest.raises(TypeError, match="expected a bank"):
        segments.packed(bank[0], 4)
    dora = jl.init(jax.random.key(0), lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))},
                   jnp.ones((2, 4)), methods={"w": jl.DoRA(2)})  # fmt: skip
    with pytest.raises(ValueError, match=r"w: got DoRA.* expected LoRA without dropout"):
        segments.packed(jl.stack([dora, dora]), 4)
    ids, positions, seen, jobs = arrays(())
    run = lambda **k: jl.lift(model)(  # noqa: E731
        params, segments.packed(bank, BLOCK), ids, positions, seen, **k
    )
    with pytest.raises(ValueError, match="expected the job of each block"):
        run()
    with pytest.raises(ValueError, match="expected one job per 4 tokens"):
        run(ctx={"jobs": jobs[:, 1:]})
