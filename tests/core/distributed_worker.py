"""One of two processes that train one adapter together; see distributed_test.py.

    python distributed_worker.py PROCESS PORT FOLDER OUT HOLD

Every process has two devices (set by XLA_FLAGS) of a mesh [fsdp 2, tensor 2], so that base, adapter
and batch are split between the processes. The state (adapter and momentum) is saved every `EVERY`
steps, and a run goes on from what it finds in FOLDER. At step HOLD (-1: never) it starts a
checkpoint, says "holding" and waits to be killed. The adapter at the end is written to OUT.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora as jl

STEPS, EVERY, D, F, L = 7, 2, 8, 16, 2
SPECS = {"up": P(None, "fsdp", "tensor"), "down": P(None, "tensor", "fsdp")}


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) / 4


PARAMS = {"up": draw(1, L, D, F), "down": draw(2, L, F, D)}


def model(params, x):
    def block(h, w):
        return h + jnp.tanh(h @ w["up"]) @ w["down"], None

    return jax.lax.scan(block, x, params)[0]


def batch(step):
    """x [8, D] of a step: the same in every run."""
    return draw(100 + step, 8, D)


def fresh(params):
    return jl.init(jax.random.key(0), model, params, batch(0), methods={"": jl.LoRA(2, alpha=4.0)})


optimizer = optax.sgd(0.1, momentum=0.9)


def update(trainable, velocity, adapter, params, x):
    """One step on the mean square of the output; returns the new (trainable, velocity)."""

    def loss(trainable):
        return jnp.mean((jl.lift(model)(params, adapter.replace(trainable=trainable), x) - 1) ** 2)

    updates, velocity = optimizer.update(jax.grad(loss)(trainable), velocity)
    return optax.apply_updates(trainable, updates), velocity


def main(process, port, folder, out, hold):
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def put(t, spec):
        t = np.asarray(t)
        return jax.make_array_from_callback(t.shape, NamedSharding(mesh, spec), t.__getitem__)

    params = {name: put(w, SPECS[name]) for name, w in PARAMS.items()}
    shapes = jax.eval_shape(fresh, params)
    places = jl.specs(shapes, SPECS, mesh, fsdp=())
    adapter = jax.jit(fresh, out_shardings=places)(params)
    split = adapter.trainable["up"]["a"]
    assert not split.is_fully_addressable and split.sharding.spec == P(None, "fsdp", None)
    everywhere = NamedSharding(mesh, P())
    kept = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, place: place,
        jax.eval_shape(optimizer.init, adapter.trainable),
        places.trainable,
        transform_non_params=lambda _: everywhere,
    )
    state = (adapter.trainable, jax.jit(optimizer.init, out_shardings=kept)(adapter.trainable))
    step = jax.jit(update, out_shardings=(places.trainable, kept))

    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(folder, options=options) as manager:
        start = manager.latest_step() or 0
        if start:
            leaves, tree = jax.tree.flatten(state)
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, leaves)
            state = tree.unflatten(manager.restore(start, args=ocp.args.StandardRestore(like)))
        print("from", start, flush=True)
        for n in range(start, STEPS):
            state = step(*state, adapter, params, put(batch(n), P("fsdp")))
            if (n + 1) % EVERY == 0 or n == hold:
                manager.save(n + 1, args=ocp.args.StandardSave(jax.tree.leaves(state)))
            if n == hold:
                print("holding", flush=True)
                time.sleep(600)
    jl.io.save_adapter(out, adapter.replace(trainable=state[0]))
    print("done", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
