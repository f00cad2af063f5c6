r"""Runs the benchmarks one after the other and writes their table.

``python -m benchmarks.run [--quick] [--only=NAME,...]``: about an hour on two quiet cores.
Every object of figures goes to ``docs/results/benchmarks.json``, the table to
``docs/benchmarks.md`` between its markers; with ``--only`` the others keep their last figures.
``--render`` makes the table again from the kept figures. ``--quick`` shows in minutes that every
benchmark runs, and writes nothing: tiny shapes, all in one process (once where runs differ by an
option alone), nothing optimised.

A row is one figure, its aim, and whether it is met: by CPU time on one core, and alongside it by
wall time on two. The last line of stdout is one JSON object ``{row: [figure, met]}``.
"""

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import timing

DOCS = Path(__file__).resolve().parents[1] / "docs"
FIGURES, PAGE = DOCS / "results" / "benchmarks.json", DOCS / "benchmarks.md"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"

RUNS: dict[str, tuple[str, ...]] = {  # name of a run: module and options
    "lora_step": ("lora_step",),
    "lora_step_plain": ("lora_step", "--plain-malloc"),
    "dora_step": ("dora_step",),
    "dora_step_plain": ("dora_step", "--plain-malloc"),
    "decoder_step": ("decoder_step",),
    "methods": ("methods",),
    "many_adapters": ("many_adapters",),
    "many_adapters_plain": ("many_adapters", "--plain-malloc"),
    "mixed_batch": ("mixed_batch",),
    "serving": ("serving",),
    "routing": ("routing",),
    "merge_export": ("merge_export",),
    "trace_time": ("trace_time",),
    "flops": ("flops",),
    "merge_core_svd": ("merge_core_svd",),
    "merge_ties": ("merge_ties",),
    "bank_similarity": ("bank_similarity",),
    "initialisations": ("initialisations",),
}


QUICK = {
    "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


class Row(NamedTuple):
    """One figure of the table."""

    run: str  # key of RUNS
    figure: str  # path in its JSON object, parts joined by '/'
    text: str
    aim: tuple[str, float] | None = None  # (">=" or "<=", value)


def _steps(run: str, note: str = "") -> list[Row]:
    rows = []
    for size in ("16x64", "2x32"):
        rows += [
            Row(run, f"{size}/ratio_vs_peft", f"torch + PEFT / jlora, {size}{note}", (">=", 1.0)),
            Row(run, f"{size}/matmul_ratio", f"of which bare products, torch / XLA, {size}{note}"),
            Row(
                run,
                f"{size}/ratio_vs_peft_equal_matmul",
                f"torch + PEFT with XLA's time for the products / jlora, {size}{note}",
            ),
            Row(run, f"{size}/ratio_vs_hand", f"hand-written / jlora, {size}{note}", (">=", 0.95)),
            Row(run, f"{size}/ratio_vs_merge", f"merge in the loss / jlora, {size}{note}"),
        ]
    return rows


def _adapters(run: str = "", note: str = "") -> list[Row]:
    dora, many, extra = f"dora_step{run}", f"many_adapters{run}", "PEFT's extra / jlora's extra"
    return [
        Row(dora, "16x64/dora_over_lora", f"DoRA / LoRA in jlora, 16x64{note}", ("<=", 1.15)),
        Row(dora, "16x64/extra_ratio_vs_peft", f"{extra}, 16x64{note}", (">=", 2.0)),
        Row(dora, "16x64/extra_ratio_of_medians", f"the same of medians, 16x64{note}"),
        Row(dora, "16x64/extra_ratio_at_best", f"PEFT's extra / that of a gain alone, 16x64{note}"),
        Row(dora, "2x32/dora_over_lora", f"DoRA / LoRA in jlora, 2x32{note}"),
        Row(dora, "2x32/extra_ratio_vs_peft", f"{extra}, 2x32{note}", (">=", 2.0)),
        Row(many, "ratio_vs_sequential", f"16 in sequence / at once{note}", (">=", 1.3)),
        Row(many, "ratio_at_best", f"16 in sequence / one adapter on all tokens{note}"),
        Row(many, "ratio_vs_peft", f"PEFT's 16 in sequence / at once{note}", (">=", 1.5)),
        Row(many, "base_copies", f"copies of the base in memory{note}", ("<=", 1.0)),
    ]


def _decoder() -> list[Row]:
    run, rows, peft = "decoder_step", [], "torch + PEFT"
    for size in ("1x512", "4x128"):
        rows += [
            Row(run, f"{size}/ratio_vs_peft", f"{peft} / jlora, {size}", (">=", 1.1)),
            Row(run, f"{size}/ratio_vs_hand", f"hand-written / jlora, {size}", (">=", 0.95)),
            Row(run, f"{size}/memory_vs_peft", f"memory, jlora / {peft}, {size}", ("<=", 0.9)),
            Row(run, f"{size}/memory_vs_hand", f"memory, hand-written / jlora, {size}"),
        ]
    return [*rows, Row(run, "decode_over_base", "a decoded token, lifted / bare", ("<=", 1.05))]


def _methods() -> list[Row]:
    """A row per method, and one more where PEFT has it."""
    rows = []
    for name in METHODS[1:]:
        rows.append(Row("methods", f"{name}/over_lora", f"a step of {name} / LoRA's", ("<=", 1.3)))
        if name not in WITHOUT_PEFT:
            text = f"{name}, PEFT / jlora"
            rows.append(Row("methods", f"{name}/ratio_vs_peft", text, (">=", 1.0)))
    return rows


def _starts() -> list[Row]:
    """Time and memory of each start of LoRA, where PEFT's runs without a GPU."""
    run, rows = "initialisations", []
    for name, text in STARTS.items():
        rows += [
            Row(run, f"{name}/ratio_vs_peft", f"{text}, PEFT / jlora", (">=", 1.0)),
            Row(run, f"{name}/memory_vs_peft", "its memory / jlora's", (">=", 1.0)),
        ]
    return rows


def _routing() -> list[Row]:
    """Per number of experts and tokens, the fastest back-end against loops."""
    rows = []
    for size in ("8x1024", "28x1024", "8x8", "28x8"):
        rows += [
            Row("routing", f"{size}/ratio_vs_loop", f"loop / routing, {size}", (">=", 1.0)),
            Row("routing", f"{size}/ratio_vs_torch_loop", "torch's loop by indices", (">=", 1.0)),
            Row("routing", f"{size}/ratio_vs_peft", "PEFT's X-LoRA layer", (">=", 1.0)),
            Row("routing", f"{size}/default_over_best", "the default back-end / the fastest"),
            Row("routing", f"{size}/grad_ratio_vs_loop", "loop, with gradients", (">=", 1.0)),
            Row(
                "routing",
                f"{size}/grad_ratio_vs_torch_loop",
                "torch's loop, with gradients",
                (">=", 1.0),
            ),
        ]
    return rows


STARTS = {  # of benchmarks.initialisations
    "pissa": "PiSSA, 24 sites of 1024²",
    "pissa_4": "PiSSA, randomised",
    "olora": "OLoRA",
    "eva": "EVA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
}
METHODS = (
    "LoRA DoRA AdaLoRA LoHa LoKr HiRA DeLoRA GraLoRA MiSS BAT C3A HRA OFT BOFT RoAd IA3 VeRA VBLoRA"
    " UniLoRA RandLoRA FourierFT WaveFT SHiRA PEANuT DEFT LoRAXS LoLDU NOLA"
).split()  # those of benchmarks.methods, which imports JAX
WITHOUT_PEFT = ("RoAd", "IA3", "LoRAXS", "LoLDU", "NOLA")  # PEFT's first two scale biases
MIXED = (
    ("overhead_vs_base", "32 rows, worst case / base alone", ("<=", 1.15)),
    ("peft_overhead_vs_base", "PEFT in that case / torch base alone", None),
    ("overhead_ratio_vs_peft", "PEFT's overhead / jlora's, least", (">=", 3.0)),
    ("overhead_ratio_together", "the same, six cases together", (">=", 3.0)),
    ("overhead_ratio_at_best", "PEFT's overhead / that of one adapter for all rows", None),
    ("recompiles", "compilations when adapters are swapped", ("<=", 0)),
)
SERVING = (
    ("throughput_vs_swap", "one adapter at a time / mixed, Zipf over 200", (">=", 2.0)),
    ("throughput_vs_padded", "all of the largest rank / mixed ranks", (">=", 1.0)),
    ("overhead_vs_base", "32 adapters of ranks 4 to 64 / base alone", ("<=", 1.15)),
    ("overhead_of_half", "the same, components in float16", None),
    ("overhead_of_reading", "the same, their numbers summed and no more", None),
    ("overhead_of_small", "32 adapters of rank 4 / base alone", ("<=", 1.15)),
    ("overhead_at_best", "one adapter of rank 16 / base alone", None),
    ("smollm2/overhead_vs_base", "SmolLM2, 32 adapters of ranks 4 to 64 / base", ("<=", 1.15)),
    ("smollm2/overhead_of_half", "the same, components in float16", None),
    ("smollm2/overhead_of_reading", "the same, their numbers summed and no more", None),
    ("logits_difference", "logits, served - merged, largest", ("<=", 1e-3)),
    ("half_logits_difference", "logits, components in float16 - float32, largest", None),
)


ROWS = [
    *_steps("lora_step"),
    Row("lora_step", "memory_vs_hand", "memory, hand-written / jlora", (">=", 0.95)),
    Row("lora_step", "memory_vs_merge", "memory, merge in the loss / jlora"),
    *_steps("lora_step_plain", ", plain malloc"),
    *_decoder(),
    *_methods(),
    *_adapters(),
    *(Row("mixed_batch", *row) for row in MIXED),
    *(Row("serving", *row) for row in SERVING),
    *_routing(),
    *_adapters("_plain", ", plain malloc"),
    Row("merge_export", "ratio_vs_peft", "merge_and_unload / merge, in place", (">=", 1.0)),
    Row("merge_export", "ratio_vs_peft_new", "merge_and_unload / merge into new weights"),
    Row("merge_export", "save_ratio_vs_peft", "save_pretrained / save_peft"),
    Row("trace_time", "lifted_over_plain", "trace and compile, lifted / plain, worst", ("<=", 1.5)),
    Row("flops", "over_bound", "FLOPs over 2u + 3v + attention", ("<=", 0.05)),
    Row("flops", "merge_over_bound", "the same of merging in the loss"),
    Row("flops", "dense_weight_gradients", "dense weight gradients", ("<=", 0)),
    Row("merge_core_svd", "ratio_vs_peft", "PEFT's svd / truncated sum, 2048²", (">=", 10)),
    Row("merge_core_svd", "ratio_vs_dense", "dense SVD in JAX / truncated sum", (">=", 10)),
    Row("merge_ties", "ties/ratio_vs_peft", "PEFT's ties_svd / TIES, 64 sites", (">=", 2)),
    Row("merge_ties", "ties/memory_vs_peft", "its memory / TIES's", (">=", 2)),
    Row("merge_ties", "dare_ties/ratio_vs_peft", "PEFT's dare_ties_svd / DARE-TIES", (">=", 2)),
    Row("merge_ties", "dare_ties/memory_vs_peft", "its memory / DARE-TIES's", (">=", 2)),
    Row("merge_ties", "ties/ratio_vs_mergekit", "mergekit's ties / TIES, dense", (">=", 2)),
    Row("merge_ties", "ties/memory_vs_mergekit", "its memory / TIES's", (">=", 2)),
    Row("merge_ties", "ties/memory_at_best", "its memory / the results alone"),
    Row("merge_ties", "dare_ties/ratio_vs_mergekit", "mergekit's / DARE-TIES, dense", (">=", 2)),
    Row("merge_ties", "dare_ties/memory_vs_mergekit", "its memory / DARE-TIES's", (">=", 2)),
    Row("merge_ties", "dare_ties/memory_at_best", "its memory / the results alone"),
    Row(
        "merge_ties", "ties/in_place/memory_vs_mergekit", "its memory / TIES's in place", (">=", 2)
    ),
    Row(
        "merge_ties",
        "dare_ties/in_place/memory_vs_mergekit",
        "its memory / DARE-TIES's in place",
        (">=", 2),
    ),
    Row("merge_ties", "large/ratio_vs_peft", "PEFT's ties_svd / TIES, one site of 2048²"),
    Row("merge_ties", "large/memory_vs_peft", "its memory / TIES's"),
    Row("bank_similarity", "ratio_vs_dense", "cosines of 512 adapters, dense torch / factored"),
    Row("bank_similarity", "memory_vs_dense", "the same, memory"),
    *_starts(),
]


def met(row: Row, value: float) -> bool | None:
    """Whether a figure meets its aim; None without an aim."""
    if row.aim is None:
        return None
    sign, aim = row.aim
    value = round(value, 6)
    return value >= aim if sign == ">=" else value <= aim


def look(figures: Any, path: str) -> float | None:
    """The figure at `path`; None where the run or the figure is missing."""
    for part in path.split("/"):
        if not isinstance(figures, dict) or part not in figures:
            return None
        figures = figures[part]
    return figures


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| benchmark | figure | one core, CPU time | two cores, wall time | aim | met |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        figures = results.get(row.run, {})
        value, wall = look(figures, row.figure), look(figures, f"threads_2/{row.figure}")
        if value is None:
            continue
        verdict = {None: "", True: "yes", False: "**no**"}[met(row, value)]
        aim = (
            f"{row.aim[0]} {row.aim[1]:g}".replace(">=", "≥").replace("<=", "≤") if row.aim else ""
        )
        wall = "" if wall is None else f"{wall:.2f}"
        lines.append(f"| {row.run} | {row.text} | {value:.2f} | {wall} | {aim} | {verdict} |")
    seen = next(iter(results.values()), {}).get("environment", {})
    parts = [f"{k} {seen[k]}" for k in ("cpu", "python", "jax", "torch", "peft") if seen.get(k)]
    measured_on = f"Measured on: {', '.join(parts)}." if parts else "Not measured yet."
    return "\n".join([measured_on, "", *lines])


def render(figures: dict[str, Any], page: str) -> str:
    """`page` with the table between the markers; ValueError where they are missing."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"expected {BEGIN} and {END} once each")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table(figures)}\n{END}{rest.split(END)[1]}"


@functools.cache
def quick(module: str) -> dict[str, Any]:
    """The figures of a benchmark on tiny shapes, in this process."""
    os.environ |= QUICK  # before JAX is imported
    measure = importlib.import_module(f"benchmarks.{module}").measure
    return json.loads(json.dumps(measure(timing.Settings(quick=True)), default=float))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; writes nothing")
    parser.add_argument("--only", default=",".join(RUNS), help="names of runs, by commas")
    parser.add_argument("--render", action="store_true", help="the table from kept figures")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - RUNS.keys():
        parser.error(f"--only: got {sorted(unknown)}, expected some of {list(RUNS)}")
    kept = json.loads(FIGURES.read_text()) if FIGURES.exists() and not args.quick else {}
    kept = {name: kept[name] for name in RUNS if name in kept}
    for k, name in enumerate([] if args.render else args.only.split(",")):
        timing.note(f"[{k + 1}/{len(args.only.split(','))}] {name}")
        start = time.perf_counter()
        if args.quick:
            kept[name] = quick(RUNS[name][0])
        else:
            command = [sys.executable, "-m", f"benchmarks.{RUNS[name][0]}", *RUNS[name][1:]]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            kept[name] = json.loads(done.stdout.strip().splitlines()[-1])
        timing.note(f"{name}: {time.perf_counter() - start:.0f} s")
        if not args.quick:
            kept = {run: kept[run] for run in RUNS if run in kept}
            FIGURES.parent.mkdir(parents=True, exist_ok=True)
            FIGURES.write_text(json.dumps(kept, indent=1) + "\n")
    if not args.quick:
        PAGE.write_text(render(kept, PAGE.read_text()))
    values = {f"{r.run}/{r.figure}": (look(kept.get(r.run), r.figure), r) for r in ROWS}
    print(json.dumps({k: [v, met(r, v)] for k, (v, r) in values.items() if v is not None}))


if __name__ == "__main__":
    main()
