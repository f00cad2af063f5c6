"""Every benchmark runs on tiny shapes and prints the figures that the table asks for."""

import collections
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import run, timing

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted({module for module, *_ in run.RUNS.values()})
# Runs by its command line, the others in one process: its process of its own imports least.
COMMAND = "bank_similarity"

SCRIPT = """
import json, sys
from benchmarks import run
print(json.dumps({name: run.quick(name) for name in sys.argv[1:]}))
"""


@pytest.fixture(scope="module")
def call(quick):
    # Another process: the settings of the tests (devices, promotion) are not those of a benchmark.
    # That they run and tell is tested here, not how fast: nothing is optimised. Compiling is part
    # of what they measure, so that no compiled program is read from a file.
    env = {k: v for k, v in quick.items() if k != "JAX_COMPILATION_CACHE_DIR"}

    def run(*command: str) -> tuple[dict, str]:
        command = (sys.executable, *command)
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return run


@pytest.fixture(scope="module")
def command_line(call):
    return call("-m", f"benchmarks.{COMMAND}", "--quick")


@pytest.fixture(scope="module")
def measured(call, command_line):
    others = [module for module in MODULES if module != COMMAND]
    return call("-c", SCRIPT, *others)[0] | {COMMAND: command_line[0]}


def test_command_line(command_line):
    figures, progress = command_line
    assert figures["benchmark"] == COMMAND and figures["environment"]["jax"]
    assert f"{COMMAND}: 1 thread" in progress and figures["ms"].keys() >= {"jlora", "dense"}


@pytest.mark.parametrize("module", MODULES)
def test_runs_and_finds_what_the_table_asks_for(measured, module):
    figures = measured[module]
    rows = [r for r in run.ROWS if run.RUNS[r.run][0] == module]
    assert rows
    for row in rows:
        # Sizes are other ones here: any that is there stands for the size of the row.
        *parents, name = row.figure.split("/")
        within = [f for f in figures.values() if isinstance(f, dict) and name in f]
        holder = within[0] if parents else figures
        needs_mergekit = name.endswith("_vs_mergekit") or name == "memory_at_best"
        if needs_mergekit and figures["mergekit"] is None:  # there is nothing to compare with
            assert holder[name] is None
        else:
            assert np.isfinite(holder[name]), row
    if module == "mixed_batch":
        assert figures["recompiles"] == 0
    if module == "many_adapters":
        assert figures["base_copies"] == 1.0
    if module == "flops":
        assert figures["dense_weight_gradients"] == 0
        assert figures["merge_dense_weight_gradients"] > 0  # the count sees one where there is one


def test_interleaved_runs_change_their_order_and_warm_up_does_not_count():
    calls, settings = [], timing.Settings(repetitions=40)
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = timing.interleave(runs, settings.count(99), settings)
    assert {k: len(v) for k, v in seconds.items()} == {"a": 40, "b": 40, "c": 40}
    turns = ["".join(calls[k : k + 3]) for k in range(0, len(calls), 3)]
    assert len(turns) == 42 and {"".join(sorted(t)) for t in turns} == {"abc"}
    before = collections.Counter(itertools.pairwise(calls))  # who comes before whom
    assert min(before[x, y] for x in "abc" for y in "abc" if x != y) > 8
    again: list[str] = []
    timing.interleave({n: lambda n=n: again.append(n) for n in "abc"}, 40, settings)
    assert again == calls


def test_a_used_up_input_is_made_anew_each_time():
    made, used = [], []

    def make():
        made.append(len(made))
        return made[-1]

    settings = timing.Settings(quick=True)
    timing.interleave({"a": timing.Fresh(make, used.append)}, settings.count(99), settings)
    assert used == made == [0, 1, 2, 3]


def test_figures_of_a_sample():
    seconds = {"a": [0.004, 0.002, 0.003, 0.009, 0.005]}
    assert timing.best(seconds) == {"a": 2.0}
    assert timing.spread(seconds) == {"a": [2.0, 3.0, 4.0]}
    assert timing.ratio_of_extras(3.0, 1.5, 100.0) == 2.0
    # An extra below a thousandth of the whole is noise and counts as that much.
    assert timing.ratio_of_extras(3.0, -1.0, 100.0) == 30.0


def test_transient_memory_sees_what_a_call_allocates():
    small = timing.transient_mib(lambda: None)
    large = timing.transient_mib(lambda: np.ones(8 << 20))
    if large is not None:
        assert small < 16 < 48 < large < 80


def test_table_says_what_is_met_and_what_is_not():
    found = {"flops": {"over_bound": 0.04, "environment": {"cpu": "X"}}, "dora_step": {}}
    text = run.table(found)
    assert "Measured on: cpu X." in text and text.count("| yes |") == 1
    assert "0.04 |" in text and "dora" not in text
    found["flops"]["over_bound"] = 0.06
    assert run.table(found).count("| **no** |") == 1
    found["trace_time"] = {"lifted_over_plain": 1.2, "threads_2": {"lifted_over_plain": 1.3}}
    assert "| 1.20 | 1.30 | ≤ 1.5 | yes |" in run.table(found)


def test_page_keeps_what_is_around_the_table():
    page = f"above\n{run.BEGIN}\nold\n{run.END}\nbelow\n"
    once = run.render({}, page)
    assert once.startswith("above\n") and once.endswith("\nbelow\n") and "old" not in once
    assert run.render({}, once) == once
    with pytest.raises(ValueError, match="once each"):
        run.render({}, "no markers")


def test_kept_page_is_the_rendering_of_the_kept_figures():
    found = json.loads(run.FIGURES.read_text())
    page = run.PAGE.read_text()
    assert run.render(found, page) == page


def test_overheads_of_all_cases_together():
    from benchmarks.mixed_batch import together

    cases = [
        {"peft_overhead_vs_base": p, "overhead_vs_base": o} for p, o in ((1.1, 0.99), (1.3, 1.05))
    ]
    assert together(cases) == pytest.approx(0.4 / 0.04)
    assert together(cases[:1]) == pytest.approx(0.1 / 1e-3)  # less than nothing counts as a little
