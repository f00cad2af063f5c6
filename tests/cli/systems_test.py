"""`jlora systems`: what it prints, for people and for programs."""

import json
from collections import Counter

import pytest

from jlora import registry
from jlora.cli import main as command
from jlora.cli import systems


def test_the_table_has_every_system_and_can_be_filtered(capsys):
    assert command.main(["systems"]) == 0
    out = capsys.readouterr().out
    assert all(p.system.name in out for p in registry.systems())
    assert command.main(["systems", "dora"]) == 0
    out = capsys.readouterr().out
    assert "DoRA" in out and "VeRA" not in out
    assert command.main(["systems", "no such thing"]) == 1


def test_absent_rows_are_listed_when_asked_for(capsys):
    absent = [r.row.name for r in registry.work_list(registry.checkout()) if not r.systems]
    systems.main([])
    assert absent[0] not in capsys.readouterr().out
    systems.main(["--all"])
    out = capsys.readouterr().out
    assert all(name in out for name in absent)


def test_json_for_programs_counts_all_97_rows(capsys):
    systems.main(["--json"])
    data = json.loads(capsys.readouterr().out)
    assert sum(data["work_list"].values()) == 97
    states = {row: e["state"] for e in data["systems"] for row in e["rows"]}
    assert set(states) == set(range(1, 98))
    assert Counter(states.values())["absent"] == data["work_list"]["absent"]
    for e in data["systems"]:
        assert e["state"] != "partial" or e["missing"], e["name"]
        if e["state"] != "absent":
            assert e["tests"] and e["module"].startswith("jlora.")


@pytest.mark.parametrize(("argv", "status"), [([], 2), (["--help"], 0), (["sing"], 2)])
def test_the_command_says_what_it_can_do(capsys, argv, status):
    assert command.main(argv) == status
    out = capsys.readouterr()
    assert all(name in out.out + out.err for name in command.COMMANDS)
