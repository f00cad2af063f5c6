"""Stage `sample`: what is asked for, and that a batch does not change what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.stages import sample
from experiments.stages.sample import Request


def test_every_task_gets_its_samples_and_seen_ones_their_controls(tiny_world, tiny_encoded):
    config, requests = tiny_world.config, sample.requests_of(tiny_world, tiny_encoded)
    for task in tiny_world.tasks:
        own = [r for r in requests if r.task == task.name and r.kind == "generated"]
        assert [r.number for r in own] == list(range(config.samples))
        assert all(r.asked == task.name for r in own)
    wrong = {r.task: r.asked for r in requests if r.kind == "shuffled"}
    assert set(wrong) == set(wrong.values()) == set(tiny_encoded.names)
    assert all(task != asked for task, asked in wrong.items())
    assert {r.task for r in requests if r.kind == "null"} == set(tiny_encoded.names)
    assert all(r.paraphrase == 2 for r in requests if r.kind == "paraphrased")


def test_the_curve_has_each_sampler_at_each_number_of_steps(tiny_world, tiny_encoded):
    found = sample.step_requests(tiny_world, tiny_encoded)
    grid, ddpm = (2, 5, 20), (20, 1000)
    want = {(m, n) for m in ("euler", "heun") for n in grid} | {("ddpm", n) for n in ddpm}
    assert set(found) == want
    for (method, steps), requests in found.items():
        assert {r.kind for r in requests} == {f"{method}/{steps}"}


def test_a_draw_depends_on_the_request_and_not_on_its_batch(tiny_world):
    """Seven requests in batches of three, the last one padded, as one by one."""
    config = tiny_world.config
    requests = [Request("task", "generated", "task", k) for k in range(7)]
    keys = jnp.stack([sample.key_of(config, r) for r in requests])
    calls = []

    @jax.jit
    def draw(keys, shift):
        return jax.vmap(lambda k, s: jax.random.normal(k, (2, 4)) + s)(keys, shift)

    def call(keys, shift):
        calls.append(len(keys))
        return draw(keys, shift)

    shift = jnp.arange(7.0)
    rows = [(r.task, r.kind) for r in requests]
    batches = sample._split(call, (keys, shift), 3, rows)
    assert [len(b.rows) for b in batches] == [3, 3, 1]
    got = np.concatenate([sample._sampled(b) for b in batches])
    assert calls == [3, 3, 3] and got.shape == (7, 2, 4)
    alone = np.concatenate(
        [sample._sampled(b) for b in sample._split(call, (keys, shift), 1, rows)]
    )
    np.testing.assert_array_equal(got, alone)
    same = sample.key_of(config, Request("task", "euler/5", "task", 0))
    assert (same == sample.key_of(config, Request("task", "euler/20", "task", 0))).all()
    assert (same != keys[0]).any()  # another kind, another draw


def test_adapters_are_written_as_files_that_can_be_replaced(tiny_world, tiny_encoded, tmp_path):
    import jlora as jl

    names = [t.name for t in tiny_world.tasks]
    rng = np.random.default_rng(1)
    shape = (len(names), *tiny_encoded.x.shape[1:])
    tokens = (0.1 * rng.normal(size=shape) * tiny_encoded.spec.mask).astype(np.float32)
    samples = sample.Samples(tokens, [(name, "generated") for name in names])
    for _ in range(2):  # a run that was killed after the export does it again
        sample.export(tiny_world, tiny_encoded, samples, tmp_path / "adapters")
    bank = jl.io.restore_adapter(tmp_path / "adapters" / "orbax")
    for k, name in enumerate(names):
        want = sample.adapter_of(tiny_encoded, jnp.asarray(tokens[k]))
        folder = tmp_path / "adapters" / "peft" / name
        assert (folder / "adapter_model.safetensors").is_file() and (folder / "task.json").is_file()
        for path, leaves in want.trainable.items():
            np.testing.assert_array_equal(bank.trainable[path]["b"][k], leaves["b"])
    with pytest.raises(sample.StageError, match="no 'null' adapter was sampled for task 'x'"):
        samples.of("x", "null")
