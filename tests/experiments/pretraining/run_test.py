"""Training from texts to a checked directory: resumes with the same bits, says how good it is."""

import json

import jax
import numpy as np
import pytest

from experiments.pretraining import base_l, card, run, settings, texts, tokens, train
from experiments.workdir import StageError
from jlora.models import decoder

WORDS = "the whale swam under a white ship and every sailor saw how it went down again".split()
S = settings.Settings(
    sources="grimm", vocab=280, layers=1, width=16, heads=2, kv_heads=1, ffn=16, context=16,
    steps=6, batch=4, save_every=2, eval_rows=6, lr=1e-2,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """One compiled step for all runs."""
    with pytest.MonkeyPatch.context() as patch:
        step = train.make(S)
        patch.setattr(train, "make", lambda settings: step)
        patch.setattr(texts, "documents", documents)
        yield


def documents(sources, cache=None):
    draw = np.random.default_rng(0)
    return [
        texts.Document("grimm", f"{n}", " ".join(draw.choice(WORDS, 60)) + " ⚓") for n in range(60)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, card) of a run that was not killed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run.run(S, folder)


def test_documents_are_held_out_as_wholes():
    kinds = [d.held_out for d in documents("")]
    assert 0 < sum(kinds) < 15
    tokenizer = tokens.train(documents(""), 280)
    streams = [tokens.stream(tokenizer, documents(""), held) for held in (False, True)]
    ends = [int((s == tokenizer.token_to_id(tokens.END)).sum()) for s in streams]
    assert ends == [len(kinds) - sum(kinds), sum(kinds)]
    text = tokenizer.decode(streams[1].tolist())
    want = [d.text for d in documents("") if d.held_out]
    assert text == "".join(want)
    assert tokens.lengths(tokenizer)[streams[1]].sum() == len(text.encode())


def test_a_killed_run_ends_with_the_same_bits(whole, tmp_path, monkeypatch):
    real = train.rows

    def killed(stream, settings, step):
        if step == 3:
            raise KeyboardInterrupt
        return real(stream, settings, step)

    monkeypatch.setattr(train, "rows", killed)
    with pytest.raises(KeyboardInterrupt):
        run.run(S, tmp_path)
    monkeypatch.setattr(train, "rows", real)
    found = run.run(S, tmp_path)
    assert found["files"] == whole[1]["files"]
    assert found["quality"] == whole[1]["quality"]


def test_the_card_measures_what_was_written(whole):
    folder, found = whole
    read = base_l.load(folder / "model")
    assert read.config == S.config() and read.card == json.loads(json.dumps(found))
    data = run.data(S, folder / f"train-{S.key()}", None)
    starts = card.measured_rows(S, len(data.held_out))
    ids = data.held_out[starts[:, None] + np.arange(17)[None]].astype(np.int32)
    logits = decoder.forward(read.params, ids[:, :-1], config=read.config).logits
    nats = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), ids[:, 1:, None].astype(np.int64), -1
    )
    assert found["quality"]["decoder"]["loss"] == pytest.approx(nats.mean(), abs=1e-4)
    size = tokens.lengths(read.tokenizer)[ids[:, 1:]].sum()
    bits = nats.sum() / np.log(2) / size
    assert found["quality"]["decoder"]["bits_per_byte"] == pytest.approx(bits, abs=1e-3)
    page = (folder / "model/README.md").read_text()
    assert f"| decoder | {found['quality']['decoder']['loss']} |" in page
    assert found["files"]["model.safetensors"] in page and "4-gram" in page
    assert "perplexity" in "\n".join(run.lines(found, folder))


def test_training_lowers_the_loss_and_random_labels_do_not_fall_as_far(whole):
    fresh = decoder.init(jax.random.key(0), S.config())
    data = run.data(S, whole[0] / f"train-{S.key()}", None)
    starts = card.measured_rows(S, len(data.held_out))
    before = card.row_losses(fresh, data.held_out, starts, S.config(), 16).mean()
    mixed = np.random.default_rng(0).integers(0, 280, len(data.held_out)).astype(np.uint16)
    read = base_l.load(whole[0] / "model").params
    after, other = (
        card.row_losses(read, s, starts, S.config(), 16).mean() for s in (data.held_out, mixed)
    )
    assert after < before - 0.1 < other


def test_a_changed_file_is_refused(whole, tmp_path):
    source = whole[0] / "model"
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(StageError, match=r"config.json: sha256: got"):
        base_l.load(tmp_path)


def test_what_a_run_takes_and_what_cannot_work():
    assert "parameters: 2,927,040 (5.85 MB in float16)" in run.dry(settings.Settings())[0]
    for wrong, said in (
        ({"sources": "moby_dick,web"}, "sources: got 'web'"),
        ({"heads": 5}, "width: got 192"),
        ({"vocab": 100}, "vocab: got 100"),
        ({"lr": 0.0}, "lr: got 0.0"),
    ):
        with pytest.raises(ValueError, match=said):
            settings.check(settings.Settings(**wrong))
    assert settings.Settings(steps=9).key() == settings.Settings().key()
    assert settings.Settings(seed=9).key() != settings.Settings().key()
