"""A day of requests on a clock of its own: what the engine holds does not grow.

The long one is run by hand: 20,000 requests over 24 hours, in about two minutes.
"""

import gc
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jlora.models import decoder
from jlora.serving import components, engine, forward, metrics, pages, schedule
from jlora.serving.state import Engine, Work, start

CONFIG = decoder.DecoderConfig(
    "llama", vocab=20, layers=1, width=8, heads=2, kv_heads=1, head_width=4, ffn=8,
    max_positions=32, tied=True,
)  # fmt: skip
ADAPTERS, RANKS, PAGES = 200, (1, 2, 4, 8), 200
DAY, STEP = 86_400.0, 0.02  # seconds; of a step of the engine, by the trace's clock
LIMITS = schedule.Limits(rows=4, adapters=3, queue=16, patience=30.0)


class Held(NamedTuple):
    """What there is after a part of the day, once nothing runs."""

    pages: int  # that neither lie free nor belong to an adapter
    adapters: int  # in the pool
    entries: int  # of works, rows, queue, counters and measures
    arrays: int  # of JAX, alive
    programs: int  # compiled for steps
    objects: int  # of Python, known to the collector
    mib: float  # resident memory
    answered: int  # requests, so far
    busy: int  # requests turned away, so far


@pytest.fixture(scope="module")
def server():
    params = decoder.init(jax.random.key(0), CONFIG)
    sites = forward.adaptable(CONFIG, params, "layers/attention/(query|value)/kernel")
    draw, size = np.random.default_rng(0), components.size(sites)
    flat = {
        f"a{k}": draw.normal(size=(RANKS[k % len(RANKS)], size)).astype("f4")
        for k in range(ADAPTERS)
    }
    return Engine(CONFIG, params, sites, flat.__getitem__, PAGES, LIMITS)


def day(at, requests, parts=4):
    """`Held` after each part of a day whose requests arrive by chance, Zipf over the adapters."""
    draw, now, state, found, busy = np.random.default_rng(1), 0.0, start(at, 0.0), [], 0
    weight = 1.0 / np.arange(1, ADAPTERS + 1)
    arrivals = np.sort(draw.uniform(0.0, DAY, requests // 8)).repeat(8)  # eight at a time
    for k, arrival in enumerate(arrivals):
        while now < arrival and (state.queue.waiting or state.rows):
            state, now = advance(at, state, now)
        now = max(now, arrival)
        name = f"a{draw.choice(ADAPTERS, p=weight / weight.sum())}"
        ids = tuple(draw.integers(1, 20, draw.integers(1, 5)).tolist())
        work = Work(ids, int(draw.integers(1, 5)), None if k % 10 == 0 else name)
        try:
            state, number = engine.submit(at, state, work, now)
        except schedule.Busy:
            busy += 1
            continue
        if k % 50 == 7:  # somebody goes away
            state = engine.cancel(engine.step(at, state, lambda now=now: now)[0], number)
        if (k + 1) % (len(arrivals) // parts) == 0:
            while state.queue.waiting or state.rows:
                state, now = advance(at, state, now)
            found.append(held(state, busy))
    return found


def advance(at, state, now):
    """The state after a step, and the time."""
    return engine.step(at, state, lambda: now)[0], now + STEP


def held(state, busy):
    gc.collect()
    table, queue, own = state.table, state.queue, state.measures
    kept = sum(len(r.pages) for r in table.held.values())
    entries = [state.works, state.rows, queue.waiting, queue.running, queue.served, own.finished]
    entries += [t for t in own if isinstance(t, tuple)]
    return Held(
        pages=PAGES - 1 - pages.count_free(table) - kept, adapters=len(table.held),
        entries=sum(map(len, entries)), arrays=len(jax.live_arrays()),
        programs=forward.step._cache_size() + engine._gather._cache_size(),
        objects=len(gc.get_objects()), mib=resident(), answered=sum(own.finished.values()),
        busy=busy,
    )  # fmt: skip


def resident():
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines()
                if line.startswith("VmRSS:"))  # fmt: skip


MOST = 2 * metrics.WINDOW + ADAPTERS + 10  # entries: two windows, a counter per adapter, reasons


def check(found, requests):
    assert found[-1].answered + found[-1].busy == requests
    for one in found:
        assert one.pages == 0 and one.adapters <= PAGES and one.entries <= MOST, one
    assert found[-1].arrays <= found[1].arrays and found[-1].programs == found[1].programs, found


def test_requests_leave_nothing_behind(server):
    found = day(server, 96)
    check(found, 96)
    assert found[-1].adapters > 1


def test_mutation_rows_that_keep_their_pages(server, monkeypatch):
    monkeypatch.setattr(pages, "release", lambda table, own: table)
    found = day(server, 16, parts=1)
    assert found[0].pages > 16


@pytest.mark.long
def test_memory_does_not_grow_in_a_day(server):
    requests = 20_000
    found = day(server, requests)
    for one in found:
        print(one, file=sys.stderr)
    check(found, requests)
    assert found[-1].programs == found[0].programs
    assert found[-1].objects - found[1].objects < 2_000
    assert found[-1].mib - found[1].mib < 8
