"""Three jobs in packed steps: each ends as it does alone; a stopped run ends with the same bits."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import tune_many
from experiments.tuning import jobs_file, run
from jlora.models import decoder
from tests.experiments.finetuning.conftest import CONFIG, chat, letters

HEAD = (
    "base: model\ncapacity: 64\nrows: 2\nblock: 8\nsave_every: 2\nlr: 2.0e-2\nwarmup: 0.0\njobs:\n"
)
JOBS = {
    "short": "{name: short, data: short.jsonl, rank: 1, batch: 3, epochs: 2}",
    "long": "{name: long, data: long.jsonl, rank: 4, lr: 5.0e-3, batch: 2}",
    "third": "{name: third, data: third.jsonl, rank: 2, alpha: 4, batch: 2, steps: 3, seed: 7}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama and the examples of three jobs."""
    made = tmp_path_factory.mktemp("tuning")
    decoder.save(made / "model", CONFIG, decoder.init(jax.random.key(0), CONFIG))
    letters().save_pretrained(made / "model")
    texts = {
        "short": [chat(x, x * (1 + 2 * n)) for n, x in enumerate("abcd")],
        "long": [chat(f"say {x} and {x}", x * 9) for x in "efg"],
        "third": [chat(x * (1 + 3 * n), x * 2) for n, x in enumerate("hijklm")],
    }
    for name, records in texts.items():
        lines = "".join(json.dumps(r) + "\n" for r in records)
        (made / f"{name}.jsonl").write_text(lines)
    return made


def prepare(folder, *names):
    path = folder / f"{'_'.join(names)}.yaml"
    path.write_text(HEAD + "".join(f"  - {JOBS[n]}\n" for n in names))
    return run.prepare(jobs_file.read(path))


def weights(workdir, name):
    return load_file(workdir / name / "peft/adapter_model.safetensors")


@pytest.fixture(scope="module")
def together(folder):
    work = prepare(folder, *JOBS)
    return work, run.run(work, folder / "together")


def test_the_plan_is_that_of_the_data(together):
    work, _ = together
    assert [len(b) for b in work.order] == [3, 2, 3]  # two epochs of 4 by 3, one of 3 by 2, 3 steps
    short = sum(work.order[0], ())
    assert sorted(short[:4]) == sorted(short[4:8]) == [0, 1, 2, 3]  # the last step is filled up
    tokens = sum(len(work.documents[n][i].ids) for n in range(3) for b in work.order[n] for i in b)
    assert work.waste.packed == pytest.approx(1 - tokens / (len(work.steps) * 2 * 64))
    assert any(len({p.job for p in m}) > 1 for m in work.plan.microbatches)
    said = "\n".join(run.describe(work))
    assert (
        "short: 4 examples, 3 steps of 3, rank 1" in said
        and "packed steps of 2 rows of 64 tokens" in said
    )


def test_the_first_loss_is_the_mean_over_learned_tokens(folder, together):
    """One document at a time through the bare decoder."""
    work, report = together
    params = decoder.load(folder / "model")[1]
    forward = jax.jit(lambda ids: decoder.forward(params, ids, config=CONFIG).logits)
    for n, name in enumerate(JOBS):
        total, count = 0.0, 0
        for i in work.order[n][0]:
            d = work.documents[n][i]
            ids = jnp.asarray(np.pad(d.ids, (0, 48 - len(d.ids))))[None]
            score = np.asarray(jax.nn.log_softmax(forward(ids)))[0]
            for t in range(1, len(d.ids)):
                if d.learned[t]:
                    total, count = total - score[t - 1, d.ids[t]], count + 1
        assert report["jobs"][name]["losses"][0] == pytest.approx(total / count, rel=2e-5)


@pytest.mark.parametrize("name", ["short", "long"])
def test_a_job_ends_as_it_does_alone(folder, together, name):
    work = prepare(folder, name)
    run.run(work, folder / f"alone_{name}")
    ours, alone = weights(folder / "together", name), weights(folder / f"alone_{name}", name)
    assert ours.keys() == alone.keys()
    for key, t in alone.items():
        assert ours[key].shape == t.shape
        np.testing.assert_allclose(ours[key], t, atol=2e-4)
    moved = max(np.abs(t).max() for key, t in ours.items() if "lora_B" in key)
    assert moved > 5e-3  # of a fresh adapter it is 0


def test_a_stopped_run_ends_with_the_same_bits(folder, together):
    work, report = together
    half = folder / "half"
    shutil.copytree(folder / "together" / f"train-{work.key}", half / f"train-{work.key}")
    newest = run.checkpoints(half / f"train-{work.key}")[-1]
    shutil.rmtree(newest)
    assert run.checkpoints(half / f"train-{work.key}")
    again = run.run(work, half)
    assert again == report
    for name in JOBS:
        ours, theirs = weights(half, name), weights(folder / "together", name)
        assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)


def test_the_command(folder, capsys, monkeypatch):
    prepare(folder, *JOBS)
    path = folder / "_".join(JOBS)
    words = ["tune_many", f"--jobs={path}.yaml", f"--workdir={folder / 'dry'}", "--dry_run"]
    with pytest.raises(SystemExit) as end:
        tune_many.program.run(tune_many.define_flags, tune_many.main, words)
    assert not end.value.code and "3 jobs over" in capsys.readouterr().out
    assert not (folder / "dry").exists()
    with pytest.raises(SystemExit) as end:
        tune_many.program.run(tune_many.define_flags, tune_many.main, ["tune_many", "--jobs=none"])
    assert end.value.code == 2
    assert "error: none: cannot be read" in capsys.readouterr().err
    assert run.lines({"plan": [], "jobs": {"a": {"losses": [2.0, 1.0]}}}, path)[-1].startswith(
        "a: "
    )
