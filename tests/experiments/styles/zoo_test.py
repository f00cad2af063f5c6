"""The zoo: its loss by numpy, runs that resume with the same bits, adapters of their own style."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.pictures.data import scaled
from experiments.pipeline import Context
from experiments.styles import pictures, zoo, zoo_training
from experiments.workdir import StageError
from jlora.models import dit


def test_runs_start_alike_and_differ_by_style(context):
    world, found = context.products["data"], context.products["zoo"]
    assert [run.style for run in found.runs] == [style.name for style in world.styles]
    start = zoo_training.template(world).trainable
    assert set(start) == {f"blocks/{part}/kernel" for part in (
        "attention/query", "attention/key", "attention/value", "attention/out", "ffn/up",
        "ffn/down")}  # fmt: skip
    for path, leaves in found.trainable.items():
        assert leaves["a"].shape[:3] == (9, 2, 2)  # runs, snapshots, layers
        moved = np.abs(leaves["a"] - np.asarray(start[path]["a"])).max((1, 2, 3, 4))
        assert (moved > 0).all()  # A is trained, from one start for all
        assert np.abs(np.diff(leaves["b"][:, -1], axis=0)).max((1, 2, 3)).all()
    assert np.isfinite(found.loss).all()


def test_the_loss_is_that_of_the_docstring(context):
    world = context.products["data"]
    drawn, style = world.test["google hue 60"], world.base.config
    got = zoo_training.held_out_loss(world, world.base.params, drawn, 2)
    from scipy.stats import logistic, norm

    t = logistic.cdf(norm.ppf([0.25, 0.75])).astype(np.float32)
    noise = np.random.default_rng(1).normal(size=(2, 2, 32, 32, 3)).astype(np.float32)
    x = scaled(drawn.pixels)
    condition = dit.Condition(jnp.int32(world.token), jnp.asarray(drawn.words[1]))
    each = []
    for k in range(2):
        z = (1 - t[k]) * x[1] + t[k] * noise[1, k]
        out = dit.forward(world.base.params, z, jnp.float32(t[k]), condition, config=style)
        each.append(np.mean((np.asarray(out.velocity) - (noise[1, k] - x[1])) ** 2))
    np.testing.assert_allclose(got[1], np.mean(each), rtol=1e-4)
    assert abs(got[0] / np.mean(each) - 1) > 1e-3  # and another picture has another loss


def test_an_adapter_is_better_on_its_style_than_the_base_and_than_another(context):
    world, found = context.products["data"], context.products["zoo"]
    names = ("google hue 60", "google ground 0")

    def loss(adapter, style):
        params = jl.merge(world.base.params, adapter) if adapter else world.base.params
        return zoo_training.held_out_loss(world, params, world.train[style], 2).mean()

    for own in names:
        assert loss(found.last(own), own) < loss(None, own)
    gain = {(a, s): loss(found.last(a), s) for a in names for s in names}
    assert gain[names[0], names[0]] + gain[names[1], names[1]] < (
        gain[names[0], names[1]] + gain[names[1], names[0]]
    )


def test_a_killed_run_ends_with_the_same_bits(context, tmp_path, monkeypatch):
    real, calls = zoo_training.segment, []

    def killed(*given):
        calls.append(1)
        if len(calls) == 4:  # in the second chunk, after its first segment was kept
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(zoo_training, "segment", killed)
    fresh = Context(context.config, tmp_path)
    fresh = fresh.add("data", pictures.STAGE.run(fresh))
    with pytest.raises(KeyboardInterrupt):
        zoo.STAGE.run(fresh)
    found, whole = zoo.STAGE.run(fresh), context.products["zoo"]
    assert len(calls) == 5  # the last segment alone was missing
    jax.tree.map(np.testing.assert_array_equal, found.trainable, whole.trainable)


def test_another_base_is_refused(context, folder, monkeypatch):
    monkeypatch.setattr(pictures, "fingerprint", lambda base: "other")
    with pytest.raises(StageError, match="got another base than"):
        pictures.STAGE.run(Context(context.config, folder))
