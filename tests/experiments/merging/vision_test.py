"""Vision merging: pictures and splits, heads by numpy, a whole tiny run, the kept page."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.merging import cells as lib
from experiments.merging import report as report
from experiments.merging import text as quality
from experiments.merging import vision as command
from experiments.merging import vision_data as data_lib
from experiments.merging import vision_train as training
from jlora.models.vit import Vit

DOCS = Path(__file__).parents[3] / "docs"
SPEC = command.QUICK


def test_rows_are_balanced_and_use_every_item():
    items = [[lambda d, v=10 * k + i: np.full((32, 32, 3), v, np.uint8) for i in range(2 + k)]
             for k in range(3)]  # fmt: skip
    got = data_lib.rows(items, 12, 0)
    assert np.bincount(got.label).tolist() == [4, 4, 4]
    assert (got.images[:, 0, 0, 0] // 10 == got.label).all()
    for k in range(3):
        assert len(set(got.images[got.label == k, 0, 0, 0])) == 2 + k
    with pytest.raises(ValueError, match="no items"):
        data_lib.rows([items[0], []], 4, 0)


def test_a_picture_is_placed_whole_on_one_ground():
    """A red upper half is in the upper half of the square, and the ground has one colour."""
    half = np.zeros((64, 64, 4), np.uint8)
    half[:32] = (255, 0, 0, 255)
    got = data_lib.placed(np.random.default_rng(3), Image.fromarray(half))
    red = (got == (255, 0, 0)).all(-1)
    assert 200 < red.sum() < 600  # half of a square of 24 to 32 pixels
    assert np.nonzero(red)[0].mean() < 16
    assert (got[-1] == got[-1, 0]).all()


def test_a_letter_is_drawn_in_one_ink_on_one_ground():
    item = data_lib.glyph("DejaVuSans-Bold", "O")
    got = item(np.random.default_rng(0)).astype(int)
    assert (got[0] == got[0, 0]).all()
    far = np.abs(got - got[0, 0]).sum(-1) > 100
    assert 60 < far.sum() < 400 and not far[16, 16].any()  # an O is hollow


def test_splits_of_names_are_six_one_three_tenths_and_half_is_pre_trained():
    names = [f"{k:04x}" for k in range(3000)]
    parts = [data_lib.part(n) for n in names]
    for split, want in (("train", 0.6), ("validation", 0.1), ("test", 0.3)):
        assert parts.count(split) / 3000 == pytest.approx(want, abs=0.03)
    assert np.mean([data_lib.pre_trains(n) for n in names]) == pytest.approx(0.5, abs=0.03)


def test_heads_are_whitened_prototypes_and_never_choose_a_class_that_is_not_there(monkeypatch):
    _, tasks = data_lib.made_up((24, 8, 8), 3)  # 2, 3 and 4 classes
    params = Vit(SPEC.vit).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    head = training.heads(SPEC, params, tasks)
    x = Vit(SPEC.vit).apply({"params": params}, jnp.asarray(tasks[1].splits["train"].images)
                            .astype(jnp.float32) / 127.5 - 1.0)  # fmt: skip
    f, label = np.asarray(x).mean(1), tasks[1].splits["train"].label
    means = np.stack([f[label == k].mean(0) for k in range(3)])
    middle = means.mean(0)
    cov = np.cov((f - means[label]).T, bias=True)
    cov = cov + SPEC.ridge * np.diag(cov).mean() * np.eye(len(cov))
    unit = np.linalg.solve(cov, (means - middle).T).T
    unit /= np.sqrt((unit * (means - middle)).sum(1))[:, None]

    def check():
        rows = jnp.asarray(tasks[1].splits["train"].images[:5])
        own = (jnp.broadcast_to(h[1], (5, *h[1].shape)) for h in head)
        got = np.asarray(training.classifier(SPEC.vit, 2.0)(params, rows, *own))
        np.testing.assert_allclose(got[:, :3], 2.0 * (f[:5] - middle) @ unit.T, atol=2e-3)
        assert (got[:, 3] < -1e29).all()

    check()
    real = training.features
    monkeypatch.setattr(training, "features", lambda *a: 1.2 * real(*a))
    with pytest.raises(AssertionError):
        check()


def test_a_tiny_run_from_training_to_the_page(tmp_path, monkeypatch):
    args = ["--quick", f"--workdir={tmp_path / 'run'}", f"--docs={tmp_path / 'docs'}"]
    first = command.main(args)
    found = json.loads((tmp_path / "docs/results/merging_vision.json").read_text())
    assert set(found["results"]) == {"2", "2 mixed"}
    assert found["classes"] == {"toy0": 2, "toy1": 3}
    assert set(found["single"]) >= {"toy0/0/2", "toy1/0/2", "toy1/0/3"}
    assert "toy0/0/3" not in found["single"]  # only every second task has one of the other rank
    page = (tmp_path / "docs/merging_vision.md").read_text()
    assert page.startswith(command.TITLE) and "pre-trained here" in page
    # nothing is trained or judged again
    monkeypatch.setattr(lib, "judge", lambda *a: pytest.fail("a finished cell was judged again"))
    monkeypatch.setattr(training, "adapt", lambda *a: pytest.fail("trained again"))
    assert command.main(args) == first


def test_the_kept_page_is_the_rendering_of_the_kept_figures():
    found = json.loads((DOCS / "results/merging_vision.json").read_text(encoding="utf-8"))
    page = (DOCS / "merging_vision.md").read_text(encoding="utf-8")
    line = next(x for x in page.splitlines() if x.startswith("Made by `"))
    summary = report.summarise(found)
    text = report.render(found, summary, line[9:-2], command.about(found), "merging_vision")
    assert report.between(page, text) == page
    assert summary == found["summary"]
    assert found["plan"]["methods"] == list(command.PLAN.methods)
    assert quality.report_lib.plot(found, summary).startswith("<svg")
