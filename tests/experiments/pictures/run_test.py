"""Training from pictures to a checked directory: the same bits when resumed, and a card."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments.pictures import base_d, classifier, data, run, settings, sources, train
from experiments.workdir import StageError
from jlora.generation.diffusion import ema
from jlora.models import dit

S = settings.Settings(
    styles="google,mnist", width=8, depth=1, heads=1, ffn=8, patch=16, rank=2, steps=4, batch=4,
    save_every=2, classifier_steps=3, samples=6, sample_steps=2, ema=0.5, lr=1e-2,
)  # fmt: skip


def drawn(styles, cache=None):
    """Forty pictures per style, red or grey, of two labels."""
    random, out = np.random.default_rng(0), []
    for style in styles:
        for n in range(40):
            pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
            pixels[..., 1:] //= 1 + 3 * (style == "google")
            words = ("thing", f"number{n}")
            out.append(sources.Picture(style, words, f"label {n % 2}", f"{style} {n}", pixels))
    return out


@pytest.fixture(scope="module", autouse=True)
def states():
    """One compiled step for all runs, whose states are kept; a classifier with a few channels."""
    with pytest.MonkeyPatch.context() as patch:
        found = data.gathered(drawn(S.chosen), S.chosen)
        compiled, kept = train.make(S, train.architecture(S, found)), []

        def step(state, *given):
            state, report = compiled(state, *given)
            kept.append(jax.device_get(state))
            return state, report

        patch.setattr(train, "make", lambda settings, config: step)
        patch.setattr(sources, "pictures", drawn)
        patch.setattr(classifier, "CHANNELS", (8,))
        yield kept


@pytest.fixture(scope="module")
def whole(tmp_path_factory, states):
    """(folder, card, states) of a run that was not killed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run.run(S, folder), states[: S.steps]


def test_a_killed_run_ends_with_the_same_bits(whole, tmp_path, monkeypatch):
    real = train.rows

    def killed(found, settings, step):
        if step == 3:
            raise KeyboardInterrupt
        return real(found, settings, step)

    monkeypatch.setattr(train, "rows", killed)
    with pytest.raises(KeyboardInterrupt):
        run.run(S, tmp_path)
    monkeypatch.setattr(train, "rows", real)
    found = run.run(S, tmp_path)
    assert found["files"] == whole[1]["files"]
    assert found["quality"] == whole[1]["quality"]


def test_the_directory_is_what_the_card_says(whole, tmp_path):
    folder, card, _ = whole
    read = base_d.load(folder / "model")
    assert read.card == json.loads(json.dumps(card))
    assert read.names["styles"] == ["google", "mnist"] and read.config.styles == 2
    assert read.config.words == len(read.names["vocabulary"]) + 2
    assert card["pictures"]["google"][0] + card["pictures"]["google"][1] == 40
    accuracy = card["quality"]["accuracy"]
    assert set(accuracy) == {"samples of seen names", "samples of held-out names",
                             "real training pictures", "real held-out pictures"}  # fmt: skip
    assert accuracy["samples of seen names"]["pictures"] == 6
    page = (folder / "model/README.md").read_text()
    assert card["files"]["model.safetensors"] in page and "| real held-out pictures |" in page
    assert "Fréchet" in "\n".join(run.lines(card, folder))
    for path in (folder / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "names.json").write_text("{}")
    with pytest.raises(StageError, match=r"names.json: sha256: got"):
        base_d.load(tmp_path)


def test_the_averaged_weights_are_written(whole):
    folder, _, states = whole
    assert [int(state.step) for state in states] == [1, 2, 3, 4]
    kept = [state.params for state in states]
    weights = 0.5 ** np.arange(S.steps, 0, -1)
    mean = jax.tree.map(
        lambda *x: sum(w * y for w, y in zip(weights, x, strict=True)) / weights.sum(), *kept
    )
    got = ema.averaged(states[-1].optimizer)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, mean)
    written = dit.load(folder / "model")[1]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3), written, mean)
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), written, kept[-1])
    assert max(jax.tree.leaves(moved)) > 3e-3  # and not the last ones


def test_rows_follow_from_seed_and_step_and_styles_are_even():
    found = data.gathered(drawn(S.chosen), S.chosen)
    many = dataclasses.replace(S, batch=400)
    one, two = train.rows(found, many, 0), train.rows(found, many, 1)
    np.testing.assert_array_equal(one, train.rows(found, many, 0))
    assert (one != two).any() and not found.held_out[one].any()
    uneven = dataclasses.replace(found, held_out=found.held_out | (np.arange(80) < 30))
    assert 0.4 < (uneven.style[train.rows(uneven, many, 0)] == 1).mean() < 0.6


def test_moved_pictures_are_the_picture_on_white():
    pixels = np.zeros((50, 8, 8, 3), np.uint8)
    got = classifier.moved(pixels, np.random.default_rng(0))
    assert got.shape == pixels.shape
    zeros = (got == 0).all(-1).sum((1, 2))
    assert set(zeros) <= {a * b for a in (6, 7, 8) for b in (6, 7, 8)} and len(set(zeros)) > 3


def test_what_a_run_takes_and_what_cannot_work():
    assert "parameters: 2,929,424 (5.86 MB in float16)" in run.dry(settings.Settings())[0]
    for wrong, said in (
        ({"styles": "google,photos"}, "styles: got 'photos'"),
        ({"styles": "mnist,mnist"}, "styles: got 'mnist,mnist'"),
        ({"heads": 7}, "width: got 160"),
        ({"patch": 5}, "patch: got 5"),
        ({"warmup": 0.8}, "decay: got 0.3"),
        ({"lr": 0.0}, "lr: got 0.0"),
    ):
        with pytest.raises(ValueError, match=said):
            settings.check(settings.Settings(**wrong))
    assert settings.Settings(steps=9).key() == settings.Settings().key()
    assert settings.Settings(seed=9).key() != settings.Settings().key()
