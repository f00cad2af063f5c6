"""Records of claims: complete, of the present file, refused without pinned assets."""

import json
import types

import pytest

from experiments.claims import runner
from experiments.claims.protocol import Figures, verdict
from experiments.data.pinned import ASSETS
from jlora import registry
from jlora.cli import claims as command
from tests.experiments.claims.protocol_test import claim, figures

ROOT = registry.checkout()


def toy(**changes):
    return claim(name="do_merging", run=lambda seed, workdir: figures(0.1, seed=seed), **changes)


def test_a_record_holds_what_it_takes_to_believe_and_repeat_it(tmp_path):
    record = runner.measure(toy(), [0, 1, 2], tmp_path)
    assert record["verdict"] == "reproduced"
    assert record["claim_sha256"] == runner.sha256("do_merging")
    assert record["shared_sha256"].keys() == {"text_merges.py"}
    assert record["assets"]["minilm"]["sha256"] == ASSETS["minilm"].sha256
    assert [f["system"] for f in record["figures"]] == [
        list(figures(0.1, seed=s).system) for s in range(3)
    ]
    path = runner.keep(record, tmp_path / "records")
    assert json.loads(path.read_text()) == json.loads(json.dumps(record))
    assert "reproduced" in runner.summary(record) and "minus control" in runner.summary(record)


@pytest.mark.parametrize(
    ("changes", "seeds", "said"),
    [
        ({"assets": ()}, [0, 1, 2], "expected pinned real data"),
        ({"assets": ("my_disk",)}, [0, 1, 2], "got 'my_disk', expected one of"),
        ({}, [0, 1], "expected at least 3 different ones"),
        ({}, [0, 0, 0], "expected at least 3 different ones"),
    ],
)
def test_claims_on_unpinned_data_or_too_few_seeds_are_refused(tmp_path, changes, seeds, said):
    with pytest.raises(ValueError, match=said):
        runner.measure(toy(**changes), seeds, tmp_path)


@pytest.mark.parametrize("name", runner.names())
def test_every_claim_file_is_whole(name):
    found = runner.load(name)
    known = {p.system.name for p in registry.systems()}
    assert set(found.systems) <= known and found.systems
    for text in (found.statement, found.reference, found.baseline, found.control, found.unit):
        assert text
    for system in found.systems:
        placed = next(p for p in registry.systems() if p.system.name == system)
        assert name in placed.system.claims, f"{system} does not name its claim"


def test_every_record_is_of_a_claim_with_enough_seeds_and_pinned_assets():
    for path in sorted((ROOT / registry.RECORDS).glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert record["claim"] == path.stem and path.stem in runner.names()
        assert len(set(record["seeds"])) >= 3
        for name, asset in record["assets"].items():
            assert asset["sha256"] == ASSETS[name].sha256, f"{path.stem}: {name}"
        found = [Figures(*(tuple(f[n]) for n in Figures._fields[:4])) for f in record["figures"]]
        judged = verdict(runner.load(path.stem), found)
        assert (judged.verdict, judged.difference) == (record["verdict"], record["difference"])
        assert judged.control == record["system_minus_control"]


def test_names_that_do_not_exist_are_named(capsys):
    assert command.main(["nothing"]) == 2
    assert "got 'nothing', expected one of" in capsys.readouterr().err


def test_the_command_lists_and_marks_stale_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "checkout", lambda: tmp_path)
    assert command.main([]) == 0
    assert "do_merging: has not been run" in capsys.readouterr().out
    record = runner.measure(toy(), [0, 1, 2], tmp_path)
    runner.keep({**record, "claim_sha256": "0" * 64}, tmp_path / registry.RECORDS)
    command.main([])
    assert "run it again" in capsys.readouterr().out


def test_a_run_writes_its_record_and_a_dry_run_does_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "checkout", lambda: tmp_path)
    monkeypatch.setattr(runner, "load", lambda name: toy())
    words = ["do_merging", "--workdir", str(tmp_path)]
    assert command.main([*words, "--dry_run"]) == 0
    assert not (tmp_path / registry.RECORDS).exists()
    assert command.main(words) == 0
    assert (tmp_path / registry.RECORDS / "do_merging.json").is_file()
    assert "reproduced" in capsys.readouterr().out


def test_mutation_a_claim_under_another_name_is_refused(monkeypatch):
    fake = types.SimpleNamespace(CLAIM=toy()._replace(name="another"))
    monkeypatch.setattr(runner.importlib, "import_module", lambda name: fake)
    with pytest.raises(ValueError, match="got 'another', expected 'do_merging'"):
        runner.load("do_merging")
