"""The pieces together: a DiT learns a mixture whose mode the condition picks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora.generation.diffusion import dispersive, dit, ema, guidance, loss, paths, samplers

MODEL = dit.DiT(width=32, depth=2, heads=2, ratio=2)
MODES = jnp.asarray([[[1.0, -1.0], [0.5, 1.5]], [[-1.0, 1.0], [1.5, -0.5]]])  # [2, S, L]
COND = jnp.asarray([[[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]])  # [2, C, E]
SPREAD = 0.2


def learn(objective, steps=400, batch=64):
    """Averaged parameters after a short training; a batch has both modes."""
    model = dit.bind(MODEL)
    params = dit.init(MODEL, jax.random.key(0), (2, 2), (1, 3))
    optimizer = optax.chain(optax.adam(4e-3), ema.average(0.98))
    mode = jnp.arange(batch) % 2

    def cost(params, key):
        key, noise = jax.random.split(key)
        x = MODES[mode] + SPREAD * jax.random.normal(noise, (batch, 2, 2))
        value, out = loss.diffusion_loss(model, params, key, x, COND[mode], objective)
        repel = dispersive.dispersive_loss("infonce_l2", out.hidden, mode, mask="same_condition")
        return value + 0.01 * repel, value

    def step(state, key):
        params, inner = state
        grads, value = jax.grad(cost, has_aux=True)(params, key)
        with jax.numpy_dtype_promotion("standard"):  # adam raises a float to an integer power
            updates, inner = optimizer.update(grads, inner, params)
        return (optax.apply_updates(params, updates), inner), value

    keys = jax.random.split(jax.random.key(1), steps)
    # Compiling costs more than running here: unoptimised code is the quicker way.
    options = {"xla_backend_optimization_level": 0}
    train = jax.jit(lambda s, k: jax.lax.scan(step, s, k), compiler_options=options)
    (_, inner), values = train((params, optimizer.init(params)), keys)
    return ema.averaged(inner), np.asarray(values)


def test_the_condition_picks_the_mode():
    objective = loss.Objective(paths.rectified_flow(), "velocity", times="stratified", drop=0.15)
    params, values = learn(objective)
    assert values[-50:].mean() < 0.5 * values[:10].mean()
    config = samplers.Sampler("euler", 12)
    draw = samplers.build(
        guidance.guided(dit.bind(MODEL)), objective.path, objective.kind, (2, 2), config
    )
    keys = jax.random.split(jax.random.key(2), 128)
    mode = np.arange(128) % 2
    z = np.asarray(draw(params, keys, COND[mode], jnp.float32(1.0)))
    for k in (0, 1):
        centre = z[mode == k].mean(0)
        np.testing.assert_allclose(centre, MODES[k], atol=0.15)
        assert 0.08 < z[mode == k].std(0).mean() < 0.4  # a cloud, not a point
    nearest = np.argmin(((z[:, None] - np.asarray(MODES)) ** 2).sum((2, 3)), 1)
    assert np.mean(nearest == mode) > 0.98
    # Without the condition (scale 0: the null prediction alone) both modes come, whatever is asked.
    free = np.asarray(draw(params, keys, COND[mode], jnp.float32(0.0)))
    nearest = np.argmin(((free[:, None] - np.asarray(MODES)) ** 2).sum((2, 3)), 1)
    assert 0.2 < np.mean(nearest == mode) < 0.8
