"""The resumable loop: killed at any chunk it ends bitwise as if it had not been."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.stages import train_loop


def step(state, data, key):
    """Noisy descent on a quadratic; NaN from the step in `data` on."""
    noise = jax.random.normal(key, state["x"].shape)
    x = state["x"] - 0.1 * (state["x"] - data["goal"]) + 0.01 * noise
    count = state["count"] + 1
    bad = jnp.where(count > data["until"], jnp.nan, 0.0)
    return {"x": x, "count": count}, {"loss": jnp.sum(jnp.square(x - data["goal"])) + bad}


def train(folder, bar, until=100):
    state = {"x": jnp.zeros(3), "count": jnp.int32(0)}
    data = {"goal": jnp.arange(3.0), "until": jnp.int32(until)}
    return train_loop.train(
        step, state, data, jax.random.key(4), steps=10, chunk=4, save_every=4, folder=folder,
        bar=bar, label="toy",
    )  # fmt: skip


def test_a_killed_loop_ends_bitwise_the_same(tmp_path, bar):
    state, curves = train(tmp_path / "a", bar)
    assert bar.count == 10 and len(curves["loss"]) == 10 and int(state["count"]) == 10
    assert curves["loss"][-1] < curves["loss"][0]

    class Killed(type(bar)):
        def step(self, count, **shown):
            super().step(count)
            if self.count > 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", Killed())  # step 4 is saved, step 8 is not
    assert [p.name for p in sorted((tmp_path / "b").glob("step_*"))] == ["step_4"]
    second = type(bar)()
    again, more = train(tmp_path / "b", second)
    np.testing.assert_array_equal(again["x"], state["x"])
    assert more == curves and second.count == 10
    assert [p.name for p in (tmp_path / "b").glob("step_*")] == ["step_10"]  # older ones are gone


def test_a_loss_that_is_not_finite_is_named_with_its_step(tmp_path, bar):
    with pytest.raises(FloatingPointError, match=r"^toy: the loss is not finite at step 6$"):
        train(tmp_path, bar, until=6)
