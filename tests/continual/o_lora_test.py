"""O-LoRA: sum and penalty by numpy; orthogonal inputs leave earlier tasks alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from jlora.continual import o_lora as module
from jlora.continual.o_lora import adapter, init, penalty, running, start, update
from jlora.contracts import tiny

PARAMS = tiny.params()
FRESH = tiny.fresh(jl.LoRA(2, alpha=3.0), PARAMS)


def stream(count):
    """(state after `count` tasks, their adapters)."""
    state, every = init(FRESH), []
    for k in range(count):
        every.append(tiny.moved(start(jax.random.key(k), state), k))
        state = update(state, every[-1])
    return state, every


def check_sum_and_penalty():
    state, every = stream(2)
    new = tiny.moved(start(jax.random.key(2), state), 2)
    total = jl.merge(PARAMS, running(state, new))
    pull = 0.0
    for path, w in PARAMS.items():
        want = np.float64(w)
        for x in (*every, new):
            t = x.trainable[path]
            want = want + 1.5 * np.float64(t["a"]) @ np.float64(t["b"])
        np.testing.assert_allclose(total[path], want, atol=1e-5)
        for x in every:
            a, b = (np.float64(y.trainable[path]["a"]) for y in (x, new))
            pull += (np.einsum("...ir,...is->...rs", a, b) ** 2).sum()
    np.testing.assert_allclose(penalty(state, new, 0.2), 0.2 * pull, rtol=1e-5)
    served = jl.merge(PARAMS, adapter(update(state, new), 0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), served, total)


def test_sum_and_penalty_by_numpy():
    check_sum_and_penalty()


def test_mutation_scales_of_the_past_left_out(monkeypatch):
    def bare(state, new):
        one = {p: {"scale": jnp.ones_like(f["scale"])} for p, f in new.frozen.items()}
        plain = tuple(x.replace(frozen=one) for x in state.tasks)
        return right(state._replace(tasks=plain), new)

    right = module.running
    monkeypatch.setitem(globals(), "running", bare)
    with pytest.raises(AssertionError):
        check_sum_and_penalty()


def test_every_task_draws_inputs_of_its_own_and_starts_at_the_sum():
    state, every = stream(1)
    new = start(jax.random.key(1), state)
    a, b = (x.trainable["first"]["a"] for x in (every[0], new))
    assert np.abs(np.asarray(a - b)).max() > 0.1
    assert not np.asarray(new.trainable["layers"]["b"]).any()
    assert float(penalty(init(FRESH), new)) == 0.0


def test_orthogonal_inputs_leave_what_an_earlier_task_reads_alone():
    """Of inputs in the span of its a, an earlier task keeps every output; the penalty says so."""

    def model(p, x):
        return x @ p["w"]

    w, x = {"w": jnp.zeros((6, 3), jnp.float32)}, jnp.ones((4, 6))
    first = tiny.moved(jl.init(jax.random.key(0), model, w, x, methods={"w": jl.LoRA(2)}))
    state = update(init(first), first)
    free = tiny.moved(start(jax.random.key(1), state), 1)
    a, basis = free.trainable["w"]["a"], jnp.linalg.qr(first.trainable["w"]["a"])[0]
    clear = free.replace(trainable={"w": {**free.trainable["w"], "a": a - basis @ (basis.T @ a)}})
    read = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32)
    read = read @ first.trainable["w"]["a"].T
    before, tuned = jl.lift(model)(w, adapter(state, 0), read), jl.lift(model)
    moved = {
        name: np.abs(tuned(w, adapter(update(state, new), 0), read) - before).max()
        for name, new in (("clear", clear), ("free", free))
    }
    assert moved["clear"] < 1e-5 and moved["free"] > 0.1, moved
    assert float(penalty(state, clear)) < 1e-10 and float(penalty(state, free)) > 0.01


def test_other_methods_are_refused():
    with pytest.raises(ValueError, match="got DoRA"):
        init(tiny.fresh(jl.DoRA(2), PARAMS))
    with pytest.raises(ValueError, match="expected LoRA with a trained a"):
        init(tiny.fresh(jl.LoRA(2, freeze_a=True), PARAMS))
