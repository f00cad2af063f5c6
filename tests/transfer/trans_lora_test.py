"""Trans-LoRA: what is kept and labelled by numpy; onto its own base an adapter becomes itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora as jl
from jlora.transfer import Model, Texts, trans_lora
from jlora.transfer.discriminator import Discriminator

N, D, C, KEEP = 24, 5, 3, 16
WIDE = 7  # of the other base
SOLVER = optax.adam(optax.linear_schedule(0.05, 0.0, 800))


def model(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def base(seed, width):
    rng = np.random.default_rng(seed)
    f32 = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"in": f32(width, 6), "out": f32(6, C)}


@functools.partial(jax.jit, static_argnums=1)
def fresh(params, method, seed):
    x = jnp.ones((1, params["in"].shape[0]))
    return jl.init(jax.random.key(seed), model, params, x, methods={"in|out": method})


@pytest.fixture(scope="module")
def world():
    """A source with a large adapter, texts of two widths, and a discriminator."""
    rng = np.random.default_rng(3)
    params, other = base(0, D), base(1, WIDE)
    start = fresh(params, jl.LoRA(3), 2)
    moved = jax.tree.map(
        lambda x: x + 0.4 * jnp.asarray(rng.normal(size=x.shape), jnp.float32), start.trainable
    )
    x = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    y = jnp.concatenate([x, x[:, :2] ** 2], axis=1)  # the same texts, as the other base reads them
    weight = jnp.asarray(rng.normal(size=D), jnp.float32)
    judge = Discriminator(weight, jnp.float32(0.3), x.mean(0), x.std(0))
    source = Model(model, params, start.replace(trainable=moved))
    return source, other, Texts(x, (x,), (y,)), judge


@functools.partial(jax.jit, static_argnames=("keep", "steps"))
def moved(key, adapters, bases, judge, texts, keep=KEEP, steps=800):
    """`trans_lora` on arrays, compiled once per shape; (source, target) adapters and bases."""
    source, target = (Model(model, p, a) for p, a in zip(bases, adapters, strict=True))
    return trans_lora(key, source, target, judge, texts, keep=keep, steps=steps, solver=SOLVER)


def moved_to(world, params, adapter, *, keep=KEEP, steps=800, texts=None):
    source, _, written, judge = world
    pair = (source.adapter, adapter), (source.params, params)
    key, texts = jax.random.key(7), written if texts is None else texts
    return moved(key, *pair, judge, texts, keep=keep, steps=steps)


@jax.jit
def answers(params, adapter, x):
    return jax.nn.softmax(jl.lift(model)(params, adapter, x))


@pytest.fixture(scope="module")
def same(world):
    """The texts where source and target have one base."""
    return world[2]._replace(target=world[2].source)


@pytest.mark.parametrize("method", [jl.LoRA(3), jl.DoRA(3)], ids=["LoRA", "DoRA"])
def test_onto_its_own_base_it_becomes_the_source(world, same, method):
    """In another form, from another start, learned from all texts."""
    source, (x,) = world[0], same.source
    start = fresh(source.params, method, 5)
    done = moved_to(world, source.params, start, keep=N, texts=same)
    want = answers(source.params, source.adapter, x)
    gap = lambda adapter: np.abs(answers(source.params, adapter, x) - want).max()  # noqa: E731
    assert gap(start) > 0.5
    assert gap(done.adapter) < 0.1
    assert (done.adapter.sites, done.losses.shape) == (start.sites, (800,))


def test_the_filter_and_the_labels_are_those_of_the_equations(world):
    """On another base of other inputs; numbers by numpy."""
    source, other, texts, judge = world
    start = fresh(other, jl.LoRA(3), 6)
    done = moved_to(world, other, start)
    x, m, s = (np.asarray(t, "f8") for t in (texts.embedding, judge.mean, judge.deviation))
    odds = (x - m) / s @ np.asarray(judge.weight, "f8") + float(judge.bias)
    kept = np.argsort(-odds)[:KEEP]
    np.testing.assert_allclose(done.odds, odds, atol=1e-4)
    assert (np.asarray(done.kept) == kept).all()
    merged = {k: np.asarray(v, "f8") for k, v in jl.merge(source.params, source.adapter).items()}
    z = np.tanh(x[kept] @ merged["in"]) @ merged["out"]
    labels = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    np.testing.assert_allclose(done.labels, labels, atol=1e-4)
    got = answers(other, done.adapter, texts.target[0][kept])
    assert (got.argmax(-1) == labels.argmax(-1)).mean() > 0.9
    before = answers(other, start, texts.target[0][kept])
    assert (before.argmax(-1) == labels.argmax(-1)).mean() < 0.7


def test_mutation_texts_that_do_not_belong_together(world, same):
    """The target reads other texts than the source labels: it does not become the source."""
    source, (x,) = world[0], same.source
    wrong = same._replace(target=(jnp.roll(x, 5, axis=0),))
    start = fresh(source.params, jl.LoRA(3), 5)
    done = moved_to(world, source.params, start, keep=N, texts=wrong)
    want = answers(source.params, source.adapter, x)
    assert np.abs(answers(source.params, done.adapter, x) - want).max() > 0.5


def test_a_text_that_is_not_kept_changes_nothing(world, same):
    source, (x,) = world[0], same.source
    start = fresh(source.params, jl.LoRA(3), 5)
    run = lambda rows: moved_to(  # noqa: E731
        world, source.params, start, steps=3, texts=same._replace(target=(rows,))
    )
    done = run(x)
    dropped = np.setdiff1d(np.arange(N), np.asarray(done.kept))
    assert len(dropped) == N - KEEP
    np.testing.assert_array_equal(run(x.at[dropped].set(9.0)).losses, done.losses)
    assert np.abs(np.asarray(run(x.at[done.kept].set(9.0)).losses - done.losses)).max() > 1e-3


def test_tasks_under_vmap_are_tasks_one_by_one(world, same):
    source, judge = world[0], world[3]
    start = fresh(source.params, jl.LoRA(3), 5)
    other = source.adapter.replace(trainable=jax.tree.map(lambda x: -x, source.adapter.trainable))
    given = jax.random.split(jax.random.key(0)), jl.stack([source.adapter, other])
    judges = jax.tree.map(lambda x: jnp.stack([x, -x]), judge)

    def one(key, adapter, judge):
        bases = source.params, source.params
        return moved(key, (adapter, start), bases, judge, same, keep=KEEP, steps=3).losses

    every = jax.jit(jax.vmap(one))(*given, judges)
    for n in range(2):
        want = one(given[0][n], given[1][n], jax.tree.map(lambda x, n=n: x[n], judges))
        np.testing.assert_allclose(every[n], want, rtol=1e-5)


def test_what_cannot_be_is_an_error(world):
    source, other, texts, judge = world
    target = Model(model, other, fresh(other, jl.LoRA(3), 5))
    run = lambda target, texts: trans_lora(  # noqa: E731
        jax.random.key(0), source, target, judge, texts, keep=4, steps=1
    )
    short = texts._replace(target=(texts.target[0][:5],))
    with pytest.raises(ValueError, match=r"texts: got shape \(5, 7\), expected 24 rows"):
        run(target, short)
    wide = other | {"out": jnp.ones((6, C + 1))}
    with pytest.raises(ValueError, match=r"target: got logits \(4, 4\), expected the source's"):
        run(Model(model, wide, fresh(wide, jl.LoRA(2), 5)), texts)
    with pytest.raises(ValueError, match="keep: got 25"):
        trans_lora(jax.random.key(0), source, target, judge, texts, keep=25)
