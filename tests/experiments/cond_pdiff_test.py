"""The whole experiment in small form, through its command line: resume, determinism, PEFT, users.

One undisturbed run (the smoke flagfile) is shared by all tests; a second one is killed twice.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import app, flags

from experiments import cond_pdiff, program
from experiments.report import names
from experiments.stages import rivals, user_tasks
from tests.experiments import forked

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "experiments" / "flags" / "text_smoke.flags"
USER = Path(__file__).parent / "fixtures" / "user_task"
KINDS = USER.with_name("user_kinds")

pytestmark = pytest.mark.slow


def words(workdir: Path, *more: str) -> list[str]:
    """Of the command line."""
    return [f"--flagfile={SMOKE}", f"--workdir={workdir}", *more]


@pytest.fixture(scope="module")
def server(quick):
    """What all runs but the first import is imported once."""
    with forked.Server(quick, "experiments.stages.report", "tensorboardX") as made:
        yield made


@pytest.fixture(scope="module")
def call(server):
    return lambda workdir, *more: server.call("cond_pdiff", *words(workdir, *more))


def figures(workdir: Path) -> dict:
    report = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    report["config"].pop("command")
    return {k: v for k, v in report.items() if k != "times"}


@pytest.fixture(scope="module")
def finished(quick, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "experiments.cond_pdiff", *words(workdir)]
    done = subprocess.run(command, cwd=ROOT, env=quick, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("stdout", "stderr"):
        (workdir / name).write_text(getattr(done, name), encoding="utf-8")
    return workdir


def test_every_stage_leaves_what_it_promises(finished):
    report = figures(finished)
    for key in ("base", "trained", "soup", "mean_adapter", "pdiff_task_norm", "pdiff_global"):
        assert key in report["summary"]
    cell = next(iter(report["table"].values()))["generated"]
    assert cell["n"] == 3 and 0 <= cell["mean"] <= 1
    assert set(report["unseen"]) == {"unseen_pair", "unseen_label", "unseen_corpus"}
    for level in report["unseen"].values():
        assert set(rivals.KEYS) <= set(level["accuracy"])
        assert level["best_rival"]["method"] in names.rivals("held_out")
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert list(finished.glob("tensorboard/*/events*"))


def test_a_newcomer_sees_a_bar_and_a_line_per_stage_and_the_result(finished):
    """1,102 lines of the checkpointer's INFO messages stood between the bars."""
    lines = (finished / "stderr").read_text(encoding="utf-8").splitlines()
    stages = (
        "data zoo codec rivals denoiser sample evaluate more_steps episodes layered report".split()
    )
    for stage in stages:
        if stage != "report":
            assert any(f"{stage:>10}: 100%" in line for line in lines), stage
        assert (
            sum(line.startswith(f"{stage:>10}: ") and line.endswith(" s)") for line in lines) == 1
        )
    kept = [line for line in lines if line.strip() and "%|" not in line]
    assert len(kept) == len(stages), kept
    shown = (finished / "stdout").read_text(encoding="utf-8").splitlines()
    assert len(shown) < 100 and shown[-1].startswith("Report: ")


def tree(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, by their names."""
    with ocp.StandardCheckpointer() as saver:
        return saver.restore(folder.absolute())


def test_a_killed_run_goes_on_and_ends_bitwise_the_same(finished, call, server, tmp_path):
    """SIGKILL inside the zoo and inside the denoiser; then the same command again.

    The stages in which nothing was killed are those of the undisturbed run: their only input is
    the zoo, whose arrays are compared. What follows the denoiser is computed from both.
    """
    for stage in ("data", "codec", "rivals"):
        (folder,) = finished.glob(f"{stage}-*")
        shutil.copytree(folder, tmp_path / folder.name)
    stages = "--stage=data,zoo,codec,rivals,denoiser,sample,evaluate"
    for mark in ("zoo-*/work_001/step_10", "denoiser-*/work_generator/diffusion/step_50"):
        run = server.start("cond_pdiff", *words(tmp_path, stages))
        for _ in range(6000):
            if list(tmp_path.glob(mark)) or server.ended():
                break
            time.sleep(0.05)
        assert server.kill(run).returncode == -signal.SIGKILL, "the run ended before it was killed"
        (killed,) = tmp_path.glob(mark.split("/")[0])
        assert not (killed / "DONE.json").exists()
    done = call(tmp_path, stages)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("zoo-*/chunk_*", "zoo-*/multitask", "denoiser-*/generator", "denoiser-*/pdiff_*"):
        ours, theirs = sorted(tmp_path.glob(name)), sorted(finished.glob(name))
        assert ours and [p.name for p in ours] == [p.name for p in theirs]
        for one, other in zip(ours, theirs, strict=True):
            chex.assert_trees_all_equal(tree(one), tree(other), strict=True)
    for name in ("sample-*/*.npy", "evaluate-*/**/*.json", "evaluate-*/arrays.npz"):
        ours, theirs = sorted(tmp_path.glob(name)), sorted(finished.glob(name))
        assert ours and [p.name for p in ours] == [p.name for p in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.read_bytes() == other.read_bytes(), one.name


@pytest.fixture
def refuse(capsys):
    """The program in this process, where it ends before it opens anything: (exit code, output)."""
    app.define_help_flags()  # those of every program
    verbosity = flags.FLAGS["verbosity"].value

    def run(*given: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            program.run(cond_pdiff.define_flags, cond_pdiff.main, ["cond_pdiff", *given])
        shown = capsys.readouterr()
        return ended.value.code, shown.out + shown.err

    yield run
    flags.FLAGS["verbosity"].value = verbosity


def test_what_is_wrong_is_found_before_any_stage_is_opened(refuse, tmp_path):
    for flag, text in (
        ("--zoo_lr=-1", "error: zoo_lr: got -1.0, expected > 0"),
        (f"--task_dir={tmp_path / 'nowhere'}", "nowhere is not a folder"),
        ("--tasks=glue:nowhere", "error: tasks: got 'glue:nowhere', expected glue:DIR with DIR a"),
    ):
        code, shown = refuse(*words(tmp_path / "run", flag))
        assert code == 2 and text in shown
        assert "Traceback" not in shown and not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_one_clear_error(finished, call, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    file = max(next(copy.glob("zoo-*/chunk_000")).rglob("*"), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-7])
    done = call(copy, "--stage=report")
    assert done.returncode == 2
    error = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and "damaged" in error[0] and file.name in error[0]
    assert "Traceback" not in done.stderr


def test_an_unknown_value_is_one_clear_error(refuse, tmp_path):
    code, shown = refuse(*words(tmp_path, "--codec=magic"))
    assert code != 0 and "--codec" in shown and "Traceback" not in shown


@pytest.fixture(scope="module")
def users(finished, call, tmp_path_factory) -> tuple[Path, str]:
    """The finished run with three tasks of a user: of two classes, of pairs, of three classes."""
    copy = tmp_path_factory.mktemp("users") / "copy"
    shutil.copytree(finished, copy)
    for folder in (USER, KINDS):
        shutil.copytree(folder, copy.with_name("tasks"), dirs_exist_ok=True)
    done = call(copy, f"--task_dir={copy.with_name('tasks')}", "--stage=sample,evaluate")
    assert done.returncode == 0, done.stderr[-3000:]
    return copy / "user", done.stdout


def test_a_users_task_gets_an_adapter_from_its_description(users):
    folder, shown = users
    name = "birds_or_mushrooms"
    cells = json.loads((folder / "scores.json").read_text(encoding="utf-8"))[name]
    assert set(user_tasks.ORDER) <= set(cells)
    assert all(cell["n"] == 16 for cell in cells.values())  # texts, not adapters
    assert cells["generated"]["adapters"] == 3
    assert "16 test texts (8 birds, 8 mushrooms): chance is 50.0 %" in shown
    found = json.loads((folder / name / "cross_validation.json").read_text("utf-8"))
    assert found["n"] <= 8 and set(found["figures"]) == {"generated", *names.rivals("user")}
    (first,) = [line for line in shown.splitlines() if line.startswith(f"{name}: ")]
    assert "cross-validated on the" in first
    assert ("is NOT the best" in first) == (found["best"] != "generated")
    assert (folder / name / "discriminant" / "adapter_model.safetensors").is_file()
    assert (folder / name / "peft" / "adapter_model.safetensors").is_file()


def test_tasks_of_three_classes_and_of_pairs_go_the_same_way(users):
    """The zoo has two classes: three get an adapter each, against the rest."""
    folder, shown = users
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert list(scores) == ["answers_or_not", "birds_or_mushrooms", "workshop_notes"]
    assert shown.startswith("answers_or_not: ")
    pairs, three = scores["answers_or_not"], scores["workshop_notes"]
    assert {cell["n"] for cell in three.values()} == {12}
    assert (pairs["generated"]["adapters"], three["generated"]["adapters"]) == (3, 9)
    assert three["trained"]["adapters"] == three["discriminant"]["adapters"] == 1
    assert "(4 bees, 4 bread, 4 bicycles): chance is 33.3 %" in shown
    assert shown.count("The zoo has no task of 3 classes") == 1
    folders = sorted(p.name for p in (folder / "workshop_notes" / "peft").iterdir())
    assert folders == ["0_bees", "1_bread", "2_bicycles"]
    assert (folder / "answers_or_not" / "peft" / "adapter_model.safetensors").is_file()


def test_other_kinds_of_task_go_through_every_stage(call, tmp_path):
    """Three classes, pairs and forms in the zoo; a kind of task that it never saw."""
    few = ("--steps=10", "--task_steps=3", "--zoo_steps=5", "--pdiff_ae_steps=3", "--samples=2",
           "--pdiff_sample_steps=5", "--ddpm_grid=5", "--step_tasks=1", "--more_steps=",
           "--full_steps=0", "--episode_steps=0")  # fmt: skip
    done = call(tmp_path, "--tasks=toy+kinds", *few)
    assert done.returncode == 0, done.stderr[-3000:]
    report = figures(tmp_path)
    assert len(report["table"]) == 8 and "toy--3_labels--0" in report["table"]
    assert set(report["unseen"]["unseen_kind"]["table"]) == {"toy--continues"}
    assert report["claims"][-4]["name"] == "unseen_kind.layered_beats_best_rival"
    assert any(
        "1 of the 12 tasks have more than two classes, at most 3" in note
        for note in report["notes"]
    )
    three = call(tmp_path, "--tasks=toy+kinds", *few, f"--task_dir={KINDS}", "--stage=sample")
    assert three.returncode == 0, three.stderr[-3000:]
    assert "one adapter per class" not in three.stdout  # the zoo has tasks of three classes
    scores = json.loads((tmp_path / "user" / "scores.json").read_text(encoding="utf-8"))
    assert scores["workshop_notes"]["generated"]["adapters"] == 2


def test_glue_from_a_local_folder_goes_the_same_way(call, tmp_path):
    """Two sets in the hub's format; the zoo stage trains on them as on any other task."""
    for name, fields in (("sst2", ["sentence"]), ("mrpc", ["sentence1", "sentence2"])):
        (tmp_path / "glue" / name).mkdir(parents=True)
        for split, rows in (("train", range(200)), ("validation", range(200, 240))):
            lines = [
                dict.fromkeys(
                    fields, f"{chr(97 + i % 26) * (i // 26 + 1)} is {('bad', 'good')[i % 2]}"
                )
                | {"label": i % 2}
                for i in rows
            ]
            text = "\n".join(map(json.dumps, lines))
            (tmp_path / "glue" / name / f"{split}.jsonl").write_text(text, encoding="utf-8")
    done = call(tmp_path / "run", f"--tasks=glue:{tmp_path / 'glue'}", "--stage=data,zoo")
    assert done.returncode == 0, done.stderr[-3000:]
    (zoo,) = (tmp_path / "run").glob("zoo-*")
    runs = json.loads((zoo / "runs.json").read_text(encoding="utf-8"))
    assert {name for _, tasks, _ in runs for name in tasks} == {"glue-sst2", "glue-mrpc"}


# PEFT 0.21 asks newer transformers for an attribute under its old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_generated_peft_adapters_give_the_same_logits_in_torch(finished, tmp_path):
    """The real PEFT on the real torch model, against `jl.lift` on ours, <= 1e-4."""
    import jax
    import jax.numpy as jnp
    import torch
    from peft import PeftModel
    from transformers import BertModel

    import jlora as jl
    from experiments.stages import tiny_base
    from jlora.models import encoder

    config, params, tokenizer = tiny_base.make()
    encoder.save(tmp_path / "base", config, params)
    folder = next(finished.glob("sample-*/adapters/peft/*"))
    ids, mask = tokenizer.encode_batch(["rowing a small boat", "a pot of soup with salt"], 16)

    model = BertModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    tuned = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        theirs = tuned(torch.tensor(ids), torch.tensor(mask.astype(int))).last_hidden_state
        plain = tuned.get_base_model()
        with tuned.disable_adapter():
            before = plain(torch.tensor(ids), torch.tensor(mask.astype(int))).last_hidden_state

    def apply(params, ids, mask):
        return encoder.run(params, encoder.embed(config, params, ids), mask, config)

    adapter = jl.io.load_peft(folder, jl.io.bert(), params, layout="in_out")
    ours = jax.jit(jl.lift(apply))(params, adapter, jnp.asarray(ids), jnp.asarray(mask))
    real = mask[..., None]
    assert np.abs((np.asarray(ours) - theirs.numpy()) * real).max() <= 1e-4
    assert np.abs((before.numpy() - theirs.numpy()) * real).max() > 1e-3  # it does something
