"""How good merged adapters are, on a real encoder and real tasks.

    python -m experiments.merging.text --workdir=runs/merging_quality

Trains LoRA adapters of MiniLM-L6 on eight tasks of eight corpora (three seeds, two ranks), merges
2, 4 and 8 of them by the methods of `jlora.merging`, and counts the test rows that each merge gets
right: see `cells`. Finished cells are kept in the workdir; the same command
resumes. `--docs` writes the table, the plot and the figures into a folder of documents;
`--quick` does all of it on a random encoder and made-up sentences. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.config import Config
from experiments.merging import cells as lib
from experiments.merging import report as report_lib
from experiments.progress import Progress
from experiments.stages import world as world_lib
from experiments.workdir import REDO, Stage, read_json, write_json

REAL = Config(
    tasks="merging", head="label_text", canonical="none", layers=2, max_length=24, eval_rows=100,
    zoo_seeds=2, references=0, zoo_steps=30, zoo_lr=5e-3, zoo_snapshots=1, zoo_chunk=12,
    zoo_segment=10,
)  # fmt: skip
QUICK = dataclasses.replace(
    REAL, base="tiny", tasks="toy", max_length=16, train_texts=60, eval_rows=20, examples=4,
    zoo_steps=10, zoo_chunk=4, zoo_segment=10, zoo_seeds=1,
)  # fmt: skip
QUICK_PLAN = lib.Plan(
    sizes=(2, 4), ranks=(2, 3), test_rows=12, validation_rows=8, learn_steps=2, learn_rows=2,
    methods=("task_arithmetic", "ties", "dare_linear", "consensus", "slerp", "tsv", "peft_linear"),
    learned=("adamerging",),
)  # fmt: skip


def measure(
    config: Config, plan: lib.Plan, workdir: Path, cache: Path | None = None, seeds: int = 0
) -> dict[str, Any]:
    """Everything that is in the JSON file: settings, and accuracies of each cell.

    `seeds` > 0 judges only the first ones.
    """
    world = world_lib.build(config, workdir, cache)
    bench = lib.train(world, plan, workdir)
    seeds = min(seeds, config.zoo_seeds + 1) if seeds else config.zoo_seeds + 1
    return {
        "config": dataclasses.asdict(config),
        **judged(bench, plan, seeds, workdir, key(config, plan)),
    }


def judged(
    bench: lib.Bench, plan: lib.Plan, seeds: int, workdir: Path, stage_key: str
) -> dict[str, Any]:
    """What is in the JSON file of any bench, less its config; finished cells are read back."""
    names = list(bench.tasks)
    cells = [(s, m) for s in lib.settings(plan, names, seeds)
             for m in (*plan.methods, *plan.learned) if fits(s, m)]  # fmt: skip
    cells.sort(key=lambda cell: cell[0].seed)  # stable: a seed is finished before the next
    stage = Stage(workdir, "merges", stage_key)
    folder = stage.open()
    results: dict[str, Any] = {}
    with Progress(workdir, "merge", len(cells), "merge") as bar:
        for setting, method in cells:
            file = folder / f"{setting.name.replace(' ', '_')}-{setting.seed}-{method}.json"
            options = repr(lib.METHODS.get(method))
            kept = read_json(file, dict, REDO) if file.is_file() else {}
            if kept.pop("options", None) != options:
                kept = lib.judge(bench, setting, method, plan)
                write_json(file, {**kept, "options": options})
            place = results.setdefault(setting.name, {}).setdefault(method, {})
            place[str(setting.seed)] = kept
            bar.step(1)
    singles = {f"{t}/{s}/{r}": lib.accuracy(bench, a, [t])[t]
               for (t, s, r), a in bench.adapters.items()}  # fmt: skip
    return {
        "plan": dataclasses.asdict(plan),
        "options": {m: {k: v for k, v in lib.METHODS[m].items() if k != "solver"}
                    for m in plan.methods},
        "tasks": names,
        "seeds": seeds,
        "settings": [s._asdict() for s in lib.settings(plan, names, seeds)],
        "base": lib.accuracy(bench, None, names),
        "multitask": lib.accuracy(bench, bench.multitask, names),
        "single": singles,
        "results": results,
    }  # fmt: skip


def fits(setting: lib.Setting, method: str) -> bool:
    """Whether a method takes that many adapters, and is tried there."""
    if setting.name.endswith("mixed") and method not in lib.MIXED:
        return False
    if method in lib.LEARNED:
        return True
    return lib.jl.merging.METHODS[method].size in (None, len(setting.tasks))


def key(config: Config, plan: lib.Plan) -> str:
    """Ten hex digits over all that a cell depends on, less the options of its method."""
    kept = {k: v for k, v in dataclasses.asdict(plan).items() if k not in ("methods", "learned")}
    blob = json.dumps([config.key("zoo"), kept], sort_keys=True)
    return hashlib.sha256(blob.encode()).hexdigest()[:10]


def write(
    results: Mapping[str, Any], docs: Path, command: str, name: str = "merging_quality",
    about: str | None = None, empty: str = report_lib.EMPTY,
) -> dict[str, Any]:  # fmt: skip
    """Write figures, plot and page (at first `empty`) below `docs`; returns the summary."""
    summary = report_lib.summarise(results)
    (docs / "results").mkdir(parents=True, exist_ok=True)
    write_json(docs / "results" / f"{name}.json", {**results, "summary": summary})
    (docs / "results" / f"{name}.svg").write_text(
        report_lib.plot(results, summary) + "\n", encoding="utf-8"
    )
    page = docs / f"{name}.md"
    old = page.read_text(encoding="utf-8") if page.is_file() else empty
    text = report_lib.render(results, summary, command, about, name)
    page.write_text(report_lib.between(old, text), encoding="utf-8")
    return summary


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Entry point; returns the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workdir", default="runs/merging_quality", help="everything it writes")
    parser.add_argument("--docs", default="", help="also write table, plot and JSON below here")
    parser.add_argument("--cache", default="", help="asset cache (JLORA_CACHE or ~/.cache/jlora)")
    parser.add_argument("--quick", action="store_true", help="tiny encoder, made-up sentences")
    parser.add_argument("--seeds", type=int, default=0, help="judge only the first ones (0: all)")
    parser.add_argument("--methods", default="", help="only these, joined by commas")
    args = parser.parse_args(argv)
    config, plan = (QUICK, QUICK_PLAN) if args.quick else (REAL, lib.Plan())
    if args.methods:
        chosen = tuple(args.methods.split(","))
        unknown = set(chosen) - {*lib.METHODS, *lib.LEARNED}
        if unknown:
            parser.error(f"--methods: got {sorted(unknown)}, expected some of {[*lib.METHODS]}")
        plan = dataclasses.replace(
            plan,
            methods=tuple(m for m in chosen if m in lib.METHODS),
            learned=tuple(m for m in chosen if m in lib.LEARNED),
        )
    workdir = Path(args.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    compiled(workdir)
    cache = Path(args.cache) if args.cache else None
    results = measure(config, plan, workdir, cache, args.seeds)
    given = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "experiments.merging.text", *given])
    docs = Path(args.docs) if args.docs else workdir / "docs"
    summary = write(results, docs, command)
    means = {n: {m: round(c["tuned"]["mean"], 4) for m, c in methods.items()}
             for n, methods in summary["normalised"].items()}  # fmt: skip
    print(json.dumps({"benchmark": "merging_quality", "normalised_tuned": means}))
    return summary


def compiled(workdir: Path) -> None:
    """Compiled programs are kept in the workdir, so that a resumed run does not compile again."""
    jax = lib.jax
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.fspath(workdir / "compiled"))
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


if __name__ == "__main__":
    main()
