r"""Serving 200 adapters of mixed ranks: against one at a time, one rank for all, and the bare base.

``python -m benchmarks.serving``: the engine of `jlora.serving` on the shipped base L with random
adapters of ranks 4 to 64 at query and value, kept in main memory. A trace is a queue of requests
(16 tokens, 16 new ones) whose adapters follow Zipf's law; all of them wait at the start, so its
time is work and no waiting.

=========  ====================================================================================
``paged``  8 rows of up to 8 adapters, each of its own rank
``swap``   one adapter in batch and pool, swapped out when a request wants another one
``padded`` as ``paged``, but every adapter fills the largest rank
=========  ====================================================================================

- ``throughput_vs_swap``, ``throughput_vs_padded``: time of the trace there / time of ``paged``,
  the median over traces, each with its own draw of adapters;
- ``same_tokens``: the least share of tokens that two of the three have in common (rounding may
  decide between two tokens that are equally likely);
- ``overhead_vs_base``: one token for 32 rows with 32 different adapters / the same step of the
  decoder without adapters, medians of pairs whose order is drawn anew each time;
  the form of the components is the one that `jlora.serving.mix` chooses;
- ``overhead_of_small``: the same where all 32 adapters have the smallest rank;
- ``overhead_of_half``: that of the 32 adapters with their components in float16;
- ``overhead_of_reading``: 1 + the time in which the numbers of the 32 adapters are summed, the
  least that any form can take / the step without adapters;
- ``overhead_at_best``: the same with ONE adapter of the mean rank in all rows;
- ``logits_difference``: the largest between a row of that step and its own merged weights;
  ``half_logits_difference``: between the step in float16 and the one in float32;
- ``smollm2/...``: the overheads and differences on SmolLM2-135M, whose step has 40 times as many
  multiply-adds, for adapters 15 times as large.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from benchmarks import timing
from experiments.data import assets, pinned
from experiments.pretraining import base_l
from jlora.models import decoder
from jlora.serving import components, engine, forward, mix, pages, schedule
from jlora.serving.paged_pool import gather, in_pages, in_use, pages_of_component, ranks_of
from jlora.serving.state import Engine, Work, start

RANKS = (4, 8, 16, 32, 64)  # equally many adapters of each
PROMPT, NEW = 16, 16  # tokens of a request
TARGETS = "layers/attention/(query|value)/kernel"
SPREAD = 0.02  # of v: answers change, and stay finite
TINY = decoder.DecoderConfig(
    "llama", vocab=40, layers=2, width=16, heads=4, kv_heads=2, head_width=4, ffn=24,
    max_positions=64, tied=True, init_std=0.3,
)  # fmt: skip


class World(NamedTuple):
    """A base and the adapters that a server knows."""

    config: decoder.DecoderConfig
    params: Any
    sites: tuple[Any, ...]
    flat: dict[str, np.ndarray]  # components by name, [r, N]
    ranks: tuple[int, ...]


class Step(NamedTuple):
    """One token for every row."""

    run: Callable[[], Any]
    adapters: tuple[str, ...]  # of the rows; (): none
    bank: Any  # their components


def world(quick: bool, name: str = "base_l") -> World:
    """Base L with 200 adapters or SmolLM2 with 40; quick: a tiny decoder with 8 of few ranks."""
    if quick:
        config, params = TINY, decoder.init(jax.random.key(0), TINY)
        count, some = 8, RANKS[:2]
    elif name == "smollm2":
        path = next(assets.fetch(pinned.ASSETS[name]).rglob("*.gguf"))
        config, params = decoder.load_gguf(path)
        params = jax.tree.map(lambda t: jnp.asarray(t, jnp.float32), params)
        count, some = 40, RANKS
    else:
        base = base_l.load()
        config, params, count, some = base.config, base.params, 200, RANKS
    sites = forward.adaptable(config, params, TARGETS)
    size, draw = components.size(sites), np.random.default_rng(0)
    ranks = [some[k % len(some)] for k in range(count)]
    flat = {
        f"a{k}": (SPREAD * draw.normal(size=(r, size))).astype("f4") for k, r in enumerate(ranks)
    }
    return World(config, params, sites, flat, some)


def trace(known: World, number: int, requests: int) -> list[Work]:
    """Requests in their order of arrival; which adapters are popular is drawn too."""
    draw = np.random.default_rng([1, number])
    names = draw.permutation(sorted(known.flat))
    weight = 1.0 / np.arange(1, len(names) + 1)
    chosen = draw.choice(names, requests, p=weight / weight.sum())
    ids = draw.integers(1, known.config.vocab, (requests, PROMPT))
    return [Work(tuple(i.tolist()), NEW, str(n)) for n, i in zip(chosen, ids, strict=True)]


def play(known: World, works: Sequence[Work], most: int = 8, pad: int = 0) -> list[list[int]]:
    """The answers to a trace.

    `most` adapters in a batch; with 1, one that no row uses leaves the pool. `pad` is the rank that
    every adapter is filled up to with zeros.
    """
    limits = schedule.Limits(rows=8, adapters=most, queue=len(works), patience=1e9)
    per = pages_of_component(known.sites, forward.width(known.config))
    room = 1 + 8 * (PROMPT + NEW) + 8 * max(known.ranks) * per

    def fetch(name: str) -> np.ndarray:
        flat = known.flat[name]
        return np.pad(flat, ((0, max(0, pad - len(flat))), (0, 0)))

    at = Engine(known.config, known.params, known.sites, fetch, room, limits)
    state = start(at, 0.0)
    for work in works:
        state, _ = engine.submit(at, state, work, 0.0)
    tokens: dict[int, list[Any]] = {k: [] for k in range(len(works))}
    while state.queue.waiting or state.rows:
        state, events = engine.step(at, state, lambda: 0.0)
        for event in events:
            tokens[event.id].append(event.token)  # a request that is refused would have none
        if most == 1:
            for name in [n for n, r in state.table.held.items() if not r.pins]:
                state = state._replace(table=pages.drop(state.table, name), active=None, bank=None)
    return [tokens[k] for k in range(len(works))]


_gather = jax.jit(gather, static_argnums=(3, 4, 5))


def token_step(known: World, rows: int, names: Sequence[str], dtype: str | None = None) -> Step:
    """A step after 31 tokens of every row; `names` are the adapters of the rows, () for none."""
    width, size = forward.width(known.config), 2 * PROMPT
    per, draw = pages_of_component(known.sites, width), np.random.default_rng(2)
    table = pages.empty_table(
        1 + rows * size + sum(len(known.flat[n]) for n in sorted({*names})) * per
    )
    data = np.zeros((len(table.free), width), np.float32)
    for name in sorted({*names}):
        content = in_pages(known.flat[name], width)
        table, own = pages.put(table, name, len(content))
        data[own] = content
    seen, write = [], []
    for _ in range(rows):
        table, own = pages.allocate(table, size)
        data[own[:-1]] = draw.normal(size=(size - 1, width))
        seen.append([*own[:-1], 0])
        write.append([own[-1]])
    plan = mix.plan(names or [None] * rows, ranks_of(table, per))
    where, owner = map(jnp.asarray, in_use(table, plan.names, per, plan.own))
    bank = _gather(data, where, owner, known.sites, plan.own, dtype) if names else None
    ids = draw.integers(1, known.config.vocab, (rows, 1))
    arrays = (plan.numbers, ids, [size - 1] * rows, [0] * rows, seen, write)
    batch = forward.Batch(*(jnp.asarray(np.asarray(t, np.int32)) for t in arrays))
    pool = [jnp.asarray(data)]

    def run() -> np.ndarray:
        out = forward.step(known.config, pool[0], known.params, bank, batch)
        pool[0] = out.data  # the memory of the old one is gone
        return np.asarray(out.logits)

    return Step(run, tuple(names), bank)


def merged(known: World, step: Step, row: int) -> World:
    """The base with the adapter of a row added to its weights."""
    flat = known.flat[step.adapters[row]]
    one = components.bank(jnp.asarray(flat), known.sites, jnp.zeros(len(flat), jnp.int32))
    adapter = components.for_row(one, jnp.asarray(0, jnp.int32))
    return known._replace(params=jl.merge(known.params, adapter))


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.sum(t, axis=tuple(range(t.ndim - 1))) for t in arrays]  # vectors: whole lines


def overheads(
    known: World, rows: int, settings: timing.Settings, repetitions: int, label: str
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """What adapters add to a step of one token, and the spread of all times."""
    figures = {"logits_difference": 0.0}
    names = list(known.flat)  # neighbours have different ranks
    small = [n for n in names if len(known.flat[n]) == min(known.ranks)]
    middle = [n for n in names if len(known.flat[n]) == known.ranks[len(known.ranks) // 2]]
    given = {"base": (), "mixed": names[:rows], "one": middle[:1] * rows}
    if len(small) >= rows:
        given["small"] = small[:rows]
    steps = {name: token_step(known, rows, names) for name, names in given.items()}
    steps["half"] = token_step(known, rows, given["mixed"], "float16")
    logits = steps["mixed"].run()
    figures["half_logits_difference"] = float(np.abs(logits - steps["half"].run()).max())
    for row in range(min(rows, 3 if "small" in given else 1)):  # merging a large base takes a while
        want = token_step(merged(known, steps["mixed"], row), rows, ()).run()[row]
        gap = float(np.abs(logits[row] - want).max())
        figures["logits_difference"] = max(figures["logits_difference"], gap)
    if not figures["logits_difference"] < 1e-2:
        raise RuntimeError(
            f"logits: got {figures['logits_difference']:.2e} off the merged weights'"
        )
    arrays = [t for t in jax.tree.leaves(steps["mixed"].bank) if t.ndim > 1]
    runs: dict[str, Callable[[], Any]] = {name: step.run for name, step in steps.items()}
    runs["read"] = lambda: jax.block_until_ready(_sums(arrays))
    seconds = timing.interleave(runs, repetitions, settings, label, limit=60)
    kinds = {"vs_base": "mixed", "of_half": "half", "of_small": "small", "at_best": "one"}
    figures |= {
        f"overhead_{kind}": over(seconds, name, "base")
        for kind, name in kinds.items()
        if name in runs
    }
    figures["overhead_of_reading"] = 1.0 + over(seconds, "read", "base")
    return figures, timing.spread(seconds)


def measure(settings: timing.Settings) -> dict[str, Any]:
    known = world(settings.quick)
    rows, traces, requests = (4, 1, 4) if settings.quick else (32, 3, 48)
    spread: dict[str, Any] = {}
    figures: dict[str, Any]
    figures, spread["step"] = overheads(known, rows, settings, settings.count(60), "serving step")
    larger = known if settings.quick else world(False, "smollm2")
    figures["smollm2"], spread["smollm2_step"] = overheads(
        larger, rows, settings, settings.count(12), "SmolLM2 step"
    )
    del larger  # half a gigabyte

    shared, ratios = [], {"swap": [], "padded": []}
    for number in range(traces):
        works, answers = trace(known, number, requests), {}
        kinds = {"paged": {}, "swap": {"most": 1}, "padded": {"pad": max(known.ranks)}}

        def keep(name: str, options: dict[str, int], works=works, answers=answers) -> None:
            answers[name] = play(known, works, **options)

        runs = {name: functools.partial(keep, name, options) for name, options in kinds.items()}
        label = f"serving trace {number}"
        seconds = timing.interleave(runs, settings.count(4), settings, label, limit=60, warm=1)
        for peer, found_ratios in ratios.items():
            found_ratios.append(over(seconds, peer, "paged"))
            equal = np.asarray(answers[peer]) == np.asarray(answers["paged"])
            shared.append(float(equal.mean()))
        spread[f"trace_{number}"] = timing.spread(seconds)
    if min(shared) < 0.9:
        raise RuntimeError(f"tokens: got {min(shared):.3f} in common, expected about 1")
    return figures | {
        "throughput_vs_swap": statistics.median(ratios["swap"]),
        "throughput_vs_padded": statistics.median(ratios["padded"]),
        "same_tokens": min(shared),
        "adapters": len(known.flat),
        "requests": requests,
        "rows": rows,
        "ms": spread,
    }


def over(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """The median of the ratios of two runs, pair by pair."""
    pairs = zip(seconds[one], seconds[other], strict=True)
    return statistics.median(a / b for a, b in pairs)


if __name__ == "__main__":
    timing.main("serving", measure, keep=True)
