"""Every stage on a random base and drawn shapes; each function is compiled once."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora as jl
from experiments.pictures.data import scaled
from experiments.pipeline import Context
from experiments.styles import (
    conditions,
    evaluate,
    generate,
    generators,
    pdiff,
    pictures,
    report,
    sample,
    zoo,
    zoo_training,
)
from experiments.styles.settings import Settings
from experiments.workdir import StageError
from jlora.models import dit

pytestmark = pytest.mark.slow
SMALL = Settings(
    base="tiny", preset="smoke", pictures=16, measured=2, rank=2, alpha=4.0, zoo_steps=6,
    zoo_batch=4, zoo_lr=1e-2, zoo_snapshots=2, zoo_chunk=5, zoo_segment=3, shots=4, draws=2,
    seen_measured=2, basis=6, components=4, flow_steps=4, width=8, depth=1,
    pdiff_ae_steps=3, pdiff_ae_width=2, pdiff_steps=3, pdiff_width=2, samples_each=2,
    few_steps="5,6", pdiff_levels=2, loss_pictures=2, loss_times=2,
    sampled=1, samples=2, sample_seeds=2, sample_steps=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("styles")


@pytest.fixture(scope="module")
def context(folder):
    """Styles and zoo."""
    found = Context(SMALL, folder)
    for stage in (pictures.STAGE, zoo.STAGE):
        found = found.add(stage.name, stage.run(found))
    return found


@pytest.fixture(scope="module")
def whole(context):
    """All stages."""
    for stage in (generate.STAGE, evaluate.STAGE, sample.STAGE, report.STAGE):
        context = context.add(stage.name, stage.run(context))
    return context


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


def test_generators_are_fitted_on_seen_styles_alone(context, whole):
    world, found = context.products["data"], context.products["zoo"]
    rows = [k for k, run in enumerate(found.runs) if run.style not in
            [style.name for style in world.at("seen")]]  # fmt: skip
    assert len(rows) == 5

    def poisoned(x):
        x = x.copy()
        x[rows] = np.nan
        return x

    features = whole.products["generate"].prepared.features
    bad = found._replace(trainable=jax.tree.map(poisoned, found.trainable))
    given = generators.examples(world, bad, features)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(given.bank.trainable))
    assert len(given.tasks) == 4 * 2 * 2 and given.theta.shape[0] == 4 * 2
    size = 1 + np.abs(given.centre)  # some features hardly vary around a large number
    np.testing.assert_allclose(given.conditions.mean(0) / size, 0, atol=1e-5)


def test_the_mean_adapter_is_the_mean_of_deltas(context, whole):
    written, zoos = whole.products["generate"], context.products["zoo"]
    path = "blocks/ffn/down/kernel"
    deltas = []
    for style in context.products["data"].at("seen"):
        leaves = jax.tree.map(lambda x, s=style: x[zoos.of(s.name)[0]], zoos.trainable[path])
        scale = np.asarray(zoos.template.frozen[path]["scale"])[0]
        deltas.append(np.mean(scale * leaves["a"] @ leaves["b"], axis=0))
    got = written.adapter("mean", "google hue 60")
    made = np.asarray(got.frozen[path]["a"]) @ got.trainable[path]["b"]
    q = np.asarray(got.frozen[path]["a"])
    inside = q @ (q.swapaxes(-1, -2) @ np.mean(deltas, axis=0))
    np.testing.assert_allclose(made, inside, atol=1e-4 * np.abs(inside).max() + 1e-7)
    assert np.abs(made - deltas[0]).max() > 1e-3 * np.abs(made).max()


def test_conditions_are_statistics_of_few_pictures(context, whole):
    world, found = context.products["data"], whole.products["generate"].prepared.features
    rows = conditions.rows(world, "google hue 60", "query")
    assert len(set(rows.tolist())) == SMALL.shots
    own = found.of["google hue 60"][rows]
    got = conditions.condition(world, found, "google hue 60")
    np.testing.assert_allclose(got, np.concatenate([own.mean(0), own.std(0)]))
    assert own.shape[1] == 64 + 2 * (24 + 48 + 96 + 96)
    other = conditions.condition(world, found, "google ground 0")
    again = conditions.condition(world, found, "google hue 60", "another draw")
    assert np.linalg.norm(got - other) > np.linalg.norm(got - again) > 0


def test_cond_p_diff_writes_factors_of_the_zoo(context, whole):
    written, zoos = whole.products["generate"], context.products["zoo"]
    same = pdiff.unflat(zoos.template, pdiff.flat(zoos.last("google hue 60")))
    jax.tree.map(np.testing.assert_array_equal, same.trainable,
                 zoos.last("google hue 60").trainable)  # fmt: skip
    first, second = (written.adapter("pdiff", "google hue 60", k) for k in (0, 1))
    shapes = jax.tree.map(np.shape, first.trainable)
    assert shapes == jax.tree.map(np.shape, zoos.template.trainable)
    assert np.abs(pdiff.flat(first) - pdiff.flat(second)).max() > 0  # another key
    assert written.walk.shape[:2] == (generate.WALKS, 101)
    assert written.latents.shape == (8, written.walk.shape[2])


def test_scores_are_losses_of_the_adapters(context, whole):
    world, scores = context.products["data"], whole.products["evaluate"]
    written = whole.products["generate"]
    style = "google hue 150"  # between seen ones
    assert scores.level[style] == "interior" and style in scores.styles
    losses = [
        zoo_training.held_out_loss(
            world, jl.merge(world.base.params, written.adapter("flow", style, k)),
            world.test[style], 2,
        ).mean()
        for k in (0, 1)
    ]  # fmt: skip
    assert scores.loss["flow"][style] == pytest.approx(np.mean(losses))
    assert scores.loss["original"][style] < scores.loss["base"][style]
    assert scores.loss["few"] == scores.loss[f"few {scores.few_steps}"]
    assert set(scores.loss["soup"]) == {s for s in scores.styles if scores.level[s] == "seen"}


def test_pictures_follow_from_names_seed_and_adapter(context, whole):
    world, drawn = context.products["data"], whole.products["sample"]
    style = "google hue 150"
    assert drawn.styles[0] == "google hue 60" and style in drawn.styles
    of = drawn.pixels[style]
    assert of["flow"].shape == (2, 2, 32, 32, 3) and of["flow"].dtype == np.uint8
    again = sample.draw(world, world.base.params, world.test[style].words, 1)
    np.testing.assert_array_equal(again, of["base"][1])
    assert (of["base"][0] != of["base"][1]).any() and (of["base"][0] != of["original"][0]).any()
    found = whole.products["generate"].prepared.features
    real = sample.figures(world, found, style, world.test[style])
    assert real["frechet"] == pytest.approx(0, abs=1e-3) and real["style distance"] == 0
    assert drawn.figures[style]["base"]["frechet"][0] > 0.01


def test_the_report_is_whole_and_a_second_run_reads_it(context, whole, folder):
    text = (folder / "report.html").read_text()
    assert "<script" not in text and text.count("data:image/png") == 4 + 3 and "<svg" in text
    kept = json.loads((folder / "report.json").read_text())
    assert kept["losses"]["interior"]["loss"]["flow"]["n"] == 2
    assert "kernel ridge" in "\n".join(report.lines(whole.products["report"], folder))
    again = Context(SMALL, folder)
    stages = (pictures, zoo, generate, evaluate, sample, report)
    zoo_training.fresh.cache_clear()  # as in a new process
    for module in stages:
        again = again.add(module.STAGE.name, module.STAGE.run(again))
    assert json.loads((folder / "report.json").read_text()) == kept
