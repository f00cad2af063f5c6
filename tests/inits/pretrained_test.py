"""PVP: where the second stage starts, and that the start is worth something."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.methods import VeRA


def fresh(world, methods, seed=1):
    key = jax.random.key(seed)
    return jl.init(key, world.fn, world.params, world.batches[0], methods=methods)


def moved(adapter):
    rng = np.random.default_rng(0)
    move = lambda t: t + jnp.asarray(0.2 * rng.normal(size=t.shape), t.dtype)  # noqa: E731
    return adapter.replace(trainable=jax.tree.map(move, adapter.trainable))


LAYERS, BOTH = {"layers": jl.LoRA(rank=2)}, {"layers|head": jl.LoRA(rank=2)}


def check_start(world, start):
    first = moved(fresh(world, LAYERS, seed=0))
    new = fresh(world, BOTH)
    merged = jl.merge(world.params, start(new, first))
    want = jl.merge(world.params, first)
    np.testing.assert_array_equal(merged["layers"], want["layers"])
    np.testing.assert_array_equal(merged["head"], world.params["head"])
    assert np.abs(np.asarray(want["layers"]) - np.asarray(world.params["layers"])).max() > 0.05


def test_known_sites_start_where_they_ended_and_others_fresh(world):
    check_start(world, jl.inits.pretrained)
    new = fresh(world, BOTH)
    start = jl.inits.pretrained(new, moved(fresh(world, LAYERS, seed=0)))
    for name in "ab":
        np.testing.assert_array_equal(start.trainable["head"][name], new.trainable["head"][name])


def test_mutation_a_start_that_is_not_taken_is_seen(world):
    with pytest.raises(AssertionError):
        check_start(world, lambda new, first: new)


def test_the_scale_goes_along(world):
    first = moved(fresh(world, {"layers": jl.LoRA(rank=2, alpha=3.0)}))
    start = jl.inits.pretrained(fresh(world, LAYERS), first)
    np.testing.assert_array_equal(
        jl.merge(world.params, start)["layers"], jl.merge(world.params, first)["layers"]
    )
    assert start.sites[0][1].alpha == 3.0


def test_shared_tensors_go_along(world):
    methods = {"layers|head": VeRA(rank=3)}
    first = moved(fresh(world, methods))
    start = jl.inits.pretrained(fresh(world, methods, seed=4), first)
    np.testing.assert_array_equal(
        jl.merge(world.params, start)["layers"], jl.merge(world.params, first)["layers"]
    )


def after(params, x, y, adapter, steps):
    """The loss after steps of gradient descent on a linear model."""

    def loss(trainable):
        tuned = jl.lift(lambda p, x: x @ p["w"])(params, adapter.replace(trainable=trainable), x)
        return jnp.mean((tuned - y) ** 2)

    @jax.jit
    def descend(trainable):
        step = lambda t, _: (jax.tree.map(lambda v, g: v - 0.02 * g, t, jax.grad(loss)(t)), None)  # noqa: E731
        return loss(jax.lax.scan(step, trainable, None, steps)[0])

    return float(descend(adapter.trainable))


def test_a_related_task_is_learned_in_fewer_steps():
    """Tasks whose deltas share a direction: ten steps from the first stage beat ten fresh ones."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params, x = {"w": draw(6, 6)}, draw(40, 6)
    direction, outputs = draw(6, 1) / 3, draw(2, 1, 6)
    tasks = [params["w"] + direction @ (outputs[0] + k * 0.3 * outputs[1]) for k in (0, 1)]
    make = lambda seed: jl.init(  # noqa: E731
        jax.random.key(seed), lambda p, x: x @ p["w"], params, x, methods={"w": jl.LoRA(rank=1)}
    )
    first = make(0)

    def loss(t):
        return jnp.mean((x @ jl.merge(params, first.replace(trainable=t))["w"] - x @ tasks[0]) ** 2)

    descend = jax.jit(
        lambda t: jax.lax.fori_loop(
            0, 200, lambda _, t: jax.tree.map(lambda v, g: v - 0.1 * g, t, jax.grad(loss)(t)), t
        )
    )
    first = first.replace(trainable=descend(first.trainable))
    y = x[:2] @ tasks[1]  # two shots
    warm = after(params, x[:2], y, jl.inits.pretrained(make(1), first), 10)
    cold = after(params, x[:2], y, make(1), 10)
    assert warm < 0.5 * cold


def test_refusals(world):
    first = fresh(world, BOTH)
    with pytest.raises(ValueError, match=r"pretrained: source has the sites \['head', 'layers'\]"):
        jl.inits.pretrained(fresh(world, LAYERS), first)
    with pytest.raises(ValueError, match=r"layers: pretrained: source has LoRA\(rank=3.*expected"):
        jl.inits.pretrained(first, fresh(world, {"layers": jl.LoRA(rank=3)}))
    half = jax.tree.map(lambda t: t.astype(jnp.bfloat16), first.trainable)
    with pytest.raises(ValueError, match=r"head: pretrained: source has .*bfloat16.*expected.*32"):
        jl.inits.pretrained(first, first.replace(trainable=half))
    with pytest.raises(ValueError, match="head: pretrained: is fresh, but shares tensors"):
        vera = VeRA(rank=3)
        known = fresh(world, {"layers|head": vera})
        only = known.replace(sites=tuple(row for row in known.sites if row[0].path == "layers"))
        jl.inits.pretrained(known, only)
    with pytest.raises(ValueError, match="pretrained: got a bank of 2 adapters"):
        jl.inits.pretrained(jl.stack([first, first]), first)
