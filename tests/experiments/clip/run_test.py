"""From pictures and texts to a checked directory: the loss, the batches, resuming, and the card."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import base_training
from experiments.clip import base_c, card, data, model, quality, run, settings, texts, train
from experiments.pictures import sources
from experiments.workdir import StageError
from jlora.generation.diffusion import ema

S = settings.Settings(
    styles="google,twitter", width=8, depth=1, heads=1, ffn=8, patch=16, joint=4, steps=4, batch=6,
    save_every=2, ema=0.5, lr=1e-2, optimizer="adamw",
)  # fmt: skip

STATES = []  # after every step of every run of this file


def drawn(styles, cache=None):
    """Forty names in two styles, of two categories."""
    random, out = np.random.default_rng(0), []
    for style in styles:
        for n in range(40):
            pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
            words = ("left", "hand") if n == 0 else ("thing", f"number{n}")
            picture = sources.Picture(style, words, f"category {n % 2}", f"emoji {words}", pixels)
            out.append(picture)
    return out


def embed(names, cache=None):
    """Unit vectors of five numbers."""
    x = np.random.default_rng(1).normal(size=(len(names), 5)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module", autouse=True)
def found():
    """The pairs of all tests, and one compiled step for all runs, whose states are kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "pictures", drawn)
        patch.setattr(texts, "embed", embed)
        compiled = train.make(S, S.config(5))

        def step(state, given):
            state, report = compiled(state, given)
            STATES.append(jax.device_get(state))
            return state, report

        patch.setattr(train, "make", lambda settings, config: step)
        pairs = data.gathered(drawn(S.chosen), S.chosen)
        yield dataclasses.replace(pairs, embeddings=embed(pairs.names + pairs.labels))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, card, states) of a run that was not killed."""
    folder, before = tmp_path_factory.mktemp("whole"), len(STATES)
    return folder, run.run(S, folder), STATES[before : before + S.steps]


def test_the_loss_is_its_equation_and_leaves_out_texts_that_are_true():
    z = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
    also = np.zeros((5, 5), bool)
    also[1, 3] = also[0, 4] = True

    def reference(also):
        total = 0.0
        for i in range(5):
            row = [z[i, j] for j in range(5) if not also[i, j]]
            column = [z[j, i] for j in range(5) if not also[j, i]]
            total += sum(np.log(np.exp(x).sum()) - z[i, i] for x in (row, column))
        return total / 10

    got = float(train.contrastive(jnp.asarray(z), jnp.asarray(also)))
    assert got == pytest.approx(reference(also), rel=1e-5)
    assert got != pytest.approx(reference(np.zeros_like(also)), rel=1e-3), "mutation: no mask"


def test_logits_are_cosines_times_the_scale_and_the_common_text_is_taken_off():
    config = S.config(5)
    params = jax.jit(model.init, static_argnums=1)(jax.random.key(0), config, jnp.arange(5.0))
    e = embed(["a", "b"])
    x = np.random.default_rng(2).normal(size=(3, 32, 32, 3)).astype(np.float32)
    u = np.asarray(jax.jit(model.images, static_argnums=0)(config, params, x))
    v = (e - np.arange(5.0)) @ np.asarray(params["text"]["kernel"])
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    got = jax.jit(model.logits, static_argnums=0)(config, params, x, e)
    np.testing.assert_allclose(got, u @ v.T / 0.07, rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose((u**2).sum(1), 1.0, rtol=1e-5)


def test_a_batch_follows_from_seed_and_step_and_knows_what_is_also_true(found):
    many = dataclasses.replace(S, batch=300, categories=0.5)
    one, other = train.batch(found, many, 0), train.batch(found, many, 1)
    jax.tree.map(np.testing.assert_array_equal, one, train.batch(found, many, 0))
    assert (one.texts != other.texts).any()
    rows = {row.tobytes(): n for n, row in enumerate(found.embeddings)}
    text = np.asarray([rows[row.tobytes()] for row in one.texts])
    assert 0.4 < (text >= len(found.names)).mean() < 0.6
    used = set(text[text < len(found.names)].tolist())
    assert used and not used & set(found.name[found.measured].tolist())
    assert not one.also.diagonal().any()
    named = np.flatnonzero(text < len(found.names))
    same = (text[named][:, None] == text[named][None]) & ~np.eye(len(named), dtype=bool)
    np.testing.assert_array_equal(one.also[np.ix_(named, named)], same)
    label = {n: found.label[found.name == n][0] + len(found.names) for n in used}
    for i in named[:20]:
        true = text == label[text[i]]
        assert one.also[i][true].all() and not one.also[i][(text != text[i]) & ~true].any()
    assert found.sided.sum() == 1 and found.names[int(found.sided.argmax())] == "left hand"


def test_a_killed_run_ends_with_the_same_bits(whole, tmp_path, monkeypatch):
    real = train.batch

    def killed(found, settings, step):
        if step == 3:
            raise KeyboardInterrupt
        return real(found, settings, step)

    monkeypatch.setattr(train, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        run.run(S, tmp_path)
    monkeypatch.setattr(train, "batch", real)
    again = run.run(S, tmp_path)
    assert again["files"] == whole[1]["files"] and again["quality"] == whole[1]["quality"]


def test_the_directory_is_what_the_card_says(whole, found, tmp_path):
    folder, written, _ = whole
    read = base_c.load(folder / "model")
    assert read.card == json.loads(json.dumps(written))
    assert read.names == found.names and read.labels == ("category 0", "category 1")
    np.testing.assert_allclose(read.embeddings, found.embeddings, atol=1e-3)
    page = (folder / "model/README.md").read_text()
    assert page == card.page(written) and written["files"]["model.safetensors"] in page
    assert "zero-shot" in "\n".join(run.lines(written, folder))
    pixels = card.shown(folder / "model" / card.EXAMPLES, 32)
    chosen = card.examples(found, S.seed)
    np.testing.assert_array_equal(pixels, found.pixels[chosen])
    same = dataclasses.replace(found, embeddings=read.embeddings)
    said = card.read(read.config, read.params, same, pixels, written["held_out"])
    assert written["examples"] == [
        [found.names[n], s] for n, s in zip(found.name[chosen], said, strict=True)
    ]
    for path in (folder / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / card.TEXTS).write_bytes(b"")
    with pytest.raises(StageError, match=r"texts.safetensors: sha256: got"):
        base_c.load(tmp_path)


def test_the_averaged_weights_are_written(whole):
    folder, _, states = whole
    assert [int(state.step) for state in states] == [1, 2, 3, 4]
    average = ema.averaged(states[-1].optimizer)
    written = model.load(folder / "model")[1]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-3), written, average)
    last = states[-1].params
    apart = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), written, last)
    assert max(jax.tree.leaves(apart)) > 4e-3, "and not the last ones"


def test_muon_gets_the_kernels_of_the_blocks_and_adamw_the_rest():
    def shapes(settings):
        config, mean = settings.config(5), jax.ShapeDtypeStruct((5,), jnp.float32)
        return jax.eval_shape(lambda m: train.initial(settings, config, m), mean)

    found = base_training.matrices(shapes(S).params, "layers")
    blocks = {k for part in found["vit"]["layers"].values() for k in part}
    assert blocks == {"query", "key", "value", "out", "norm", "up", "down"}
    assert found["vit"]["layers"]["ffn"]["up"]["kernel"] is not None
    rest = [found["vit"]["embeddings"], found["image"], found["text"], found["scale"]]
    rest += [found["vit"]["layers"]["ffn"]["up"]["bias"], found["vit"]["layers"]["ffn"]["norm"]]
    assert all(x is None for x in jax.tree.leaves(rest, is_leaf=lambda x: x is None))
    muon = shapes(dataclasses.replace(S, optimizer="muon"))
    assert len(jax.tree.leaves(muon.optimizer)) < len(jax.tree.leaves(shapes(S).optimizer))


def test_a_file_that_does_not_fit_is_refused(whole, tmp_path):
    config, params = model.load(whole[0] / "model")
    with pytest.raises(ValueError, match=r"image/kernel: got float16\[8, 3\], expected float16"):
        model.save(tmp_path, config, params | {"image": {"kernel": jnp.ones((8, 3))}})
    with pytest.raises(ValueError, match=r"missing or surplus \['more'\]"):
        model.save(tmp_path, config, params | {"more": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"scale: got 1 numbers that are not finite"):
        model.save(tmp_path, config, params | {"scale": jnp.float32(1e9)})


def test_figures_are_shares_and_a_perfect_model_is_right(found):
    u = np.asarray(embed(["x"] * 42))[np.r_[found.name]]
    rows = found.measured[found.style[found.measured] == 0]
    v = embed(["x"] * 42)
    assert quality.zero_shot(u, v, found, rows) == [1.0, 1.0]
    assert quality.zero_shot(u, v, found, rows, permuted=0)[0] < 0.6, "texts exchanged"
    scores = np.asarray([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    assert quality.top(scores, np.asarray([2, 0])) == [0.5, 1.0]


def test_the_rival_is_a_ridge_regression(found):
    random = np.random.default_rng(3)
    features = random.normal(size=(len(found.pixels), 3))
    got, centred = quality.ridge(features, found)
    x, e = features[found.train], found.embeddings[found.name[found.train]].astype(np.float64)
    middle = x.mean(0)
    wide = x - middle
    rho = quality.RIDGE * (wide**2).sum() / 3
    extended = np.concatenate([wide, np.sqrt(rho) * np.eye(3)])
    wanted = np.concatenate([e - e.mean(0), np.zeros((3, 5))])
    weights = np.linalg.lstsq(extended, wanted, rcond=None)[0]
    np.testing.assert_allclose(got, (features - middle) @ weights, atol=1e-9)
    np.testing.assert_allclose(centred, found.embeddings - e.mean(0), atol=1e-6)
    squares = quality.colours(found.pixels[:1]).reshape(8, 8, 3)
    mean = found.pixels[0, 4:8, 8:12].astype(float).mean((0, 1)) / 127.5 - 1
    np.testing.assert_allclose(squares[1, 2], mean, atol=1e-5)


def test_what_a_run_takes_and_what_cannot_work(tmp_path):
    assert "parameters: 886,017 (1.77 MB in float16)" in run.dry(settings.Settings())[0]
    for wrong, said in (
        ({"styles": "google,mnist"}, "styles: got 'mnist'"),
        ({"styles": "google,google"}, "styles: got 'google,google'"),
        ({"heads": 7}, "width 128 is not a multiple of heads 7"),
        ({"patch": 5}, "side 32 is not a multiple of patch 5"),
        ({"warmup": 0.8}, "decay: got 0.5"),
        ({"batch": 1}, "batch: got 1"),
    ):
        with pytest.raises(ValueError, match=said):
            settings.check(settings.Settings(**wrong))
    assert settings.Settings(steps=9).key() == settings.Settings().key()
    assert settings.Settings(seed=9).key() != settings.Settings().key()
    assert data.load(tmp_path) is None
    lost = [dataclasses.replace(p, group="emoji other") for p in drawn(("google",))]
    mixed = [*drawn(("google",)), *lost]
    if len({p.held_out for p in lost}) == 1:
        with pytest.raises(ValueError, match="got pictures of both kinds"):
            data.gathered(mixed, ("google",))
