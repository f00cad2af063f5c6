"""Gradients of thin products under vmap stay away from XLA kernels that abort the process.

A failed check inside XLA ends the process (exit 134), so the programs run in one of their own.
"""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = '''
import json, sys
import jax, jax.numpy as jnp, numpy as np
import jlora as jl

GROUPS = json.loads(sys.argv[1])  # programs, each of several (stack, batch, rank, d_out)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def gradients(run, adapter):
    def loss(trainable):
        return jnp.sum(jnp.sin(run(adapter.replace(trainable=trainable))))

    return jax.grad(loss)(adapter.trainable)


def stacked(method, stack, batch, d_out):
    """A weight with a stack axis: (gradient by lift, gradient by merge)."""
    fn = lambda p, x: jnp.einsum("sbi,sio->sbo", x, p["w"])
    p, x = {"w": draw(0, stack, 36, d_out)}, draw(1, stack, batch, 36)
    a = jl.init(jax.random.key(0), fn, p, x, methods={"w": method})
    a = a.replace(trainable=jax.tree.map(lambda t: t + 0.1, a.trainable))
    lifted = gradients(lambda a: jl.lift(fn)(p, a, x), a)
    return lifted, gradients(lambda a: fn(jl.merge(p, a), x), a)


def banked(rank, stack, batch, d_out):
    """One step of a bank: (gradient by vmap, by a loop)."""
    fn, p = lambda p, x: x @ p["w"], {"w": draw(0, 36, d_out)}
    xs = draw(1, stack, batch, 36)
    a = jl.init(jax.random.key(0), fn, p, xs[0], methods={"w": jl.LoRA(rank)})
    a = a.replace(trainable=jax.tree.map(lambda t: t + 0.1, a.trainable))
    step = lambda a, x: gradients(lambda a: jl.lift(fn)(p, a, x), a)
    loop = [step(a, x) for x in xs]
    return jax.vmap(step)(jl.stack([a] * stack), xs), jax.tree.map(lambda *t: jnp.stack(t), *loop)


def everything(rows):
    out = [stacked(jl.LoRA(r), s, b, o) for s, b, r, o in rows]
    s, b, r, o = rows[0]
    return [*out, stacked(jl.DoRA(r), s, b, o), banked(r, s, b, o)]


for rows in GROUPS:
    for got, expected in jax.jit(lambda: everything(rows))():
        for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(g, e, rtol=2e-3, atol=2e-3, err_msg=str(rows))
print("done", len(GROUPS))
'''


def checked(groups):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", PROGRAM, json.dumps(groups)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    said = f"done {len(groups)}"
    assert done.returncode == 0 and done.stdout.strip() == said, done.stderr[-2000:]


def test_batched_gradients_compile_and_are_right():
    rows = [(5, 2, 4, 6), (2, 3, 16, 6), (25, 8, 1, 2)]
    checked([rows])


@pytest.mark.long
@pytest.mark.parametrize("stack", (1, 2, 3, 5, 9, 16, 25))
def test_all_stacks_and_batches(stack):
    """Batches of 1 to 8 and ranks of 1 to 16, a program per batch."""
    checked([[(stack, batch, r, 6) for r in (4, 1, 2, 8, 16)] for batch in range(1, 9)])
