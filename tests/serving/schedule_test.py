"""The scheduler: pages and rows are never overdrawn, adapters share fairly, late requests go."""

import numpy as np
import pytest

from jlora.serving import schedule as module
from jlora.serving.pages import allocate, empty_table, pin, put, unpin
from jlora.serving.schedule import (
    Busy,
    Limits,
    Queue,
    Request,
    abort,
    admit,
    charge,
    remove,
    started,
    submit,
)

PAGES = 1000
LIMITS = Limits(rows=4, adapters=2, queue=50, patience=10.0, lead=20)


def queue_of(*requests, limits=LIMITS, pages=PAGES):
    queue = Queue()
    for r in requests:
        queue = submit(queue, r, limits, pages)
    return queue


def request(k, adapter, tokens=5, arrived=0.0, adapter_pages=4):
    return Request(k, adapter, tokens, 5, arrived, adapter_pages if adapter else 0)


def test_first_come_first_served_up_to_rows_and_adapters():
    queue = queue_of(*(request(k, a) for k, a in enumerate("abcab")), request(5, None))
    queue, now = admit(queue, empty_table(PAGES), LIMITS)
    assert [r.id for r in now] == [0, 1, 3, 4], "c waits: two adapters run"
    assert [r.id for r in queue.waiting] == [2, 5] and len(queue.running) == 4


def test_pages_are_never_overdrawn_and_a_request_that_waits_for_them_is_not_passed():
    table, _ = put(empty_table(1 + 30), "a", 4)
    big = [request(0, "a"), request(1, "b", tokens=20), request(2, None, tokens=1)]
    _, now = admit(queue_of(*big, pages=40), table, LIMITS)
    assert [r.id for r in now] == [0]


def test_an_adapter_that_is_about_to_run_is_not_counted_as_evictable():
    table, _ = put(empty_table(1 + 14), "a", 4)  # 10 free, 4 of a
    _, now = admit(queue_of(request(0, "a"), pages=20), table, LIMITS)
    assert [r.id for r in now] == [0]
    _, now = admit(queue_of(request(0, "a", tokens=6), pages=20), table, LIMITS)
    assert not now, "its 11 tokens would evict the adapter itself"


def simulate(steps=400):
    """Adapter a floods; b, c and d ask now and then. Tokens served of each while it waits."""
    draw = np.random.default_rng(0)
    table, queue, left, number, worst = empty_table(PAGES), Queue(), {}, 0, 0.0
    for step in range(steps):
        for name in ["a"] * 3 + [str(draw.choice([*"bcd"]))] * (step % 4 == 0):
            if len(queue.waiting) < LIMITS.queue - 5 or name != "a":
                try:
                    queue = module.submit(queue, request(number, name, arrived=step), LIMITS, PAGES)
                    number += 1
                except Busy:
                    pass
        queue, now = module.admit(queue, table, LIMITS)
        left |= {r.id: 3 for r in now}
        assert len(queue.running) <= LIMITS.rows
        assert len({r.adapter for r in queue.running}) <= LIMITS.adapters
        for r in now:
            queue = charge(queue, {r.adapter: r.prompt})
        queue = charge(queue, {})
        for r in queue.running:
            queue, left[r.id] = charge(queue, {r.adapter: 1}), left[r.id] - 1
        queue = remove(queue, {r.id for r in queue.running if not left[r.id]})
        waits = [step - r.arrived for r in queue.waiting if r.adapter != "a"]
        worst = max([worst, *waits])
    return queue, worst


def test_a_flood_of_one_adapter_starves_nobody():
    queue, worst = simulate()
    assert worst <= 12, worst
    assert queue.served["a"] > 0


def test_mutation_first_come_first_served_lets_a_flood_through(monkeypatch):
    monkeypatch.setattr(module, "charge", lambda queue, tokens: queue)
    right = module.admit

    def unfair(queue, table, limits):
        return right(queue._replace(served=dict.fromkeys(queue.served, 0.0)), table, limits)

    monkeypatch.setattr(module, "admit", unfair)
    assert simulate()[1] > 12


def test_an_idle_adapter_gathers_no_credit():
    queue = charge(queue_of(request(0, "a")), {"a": 500})
    queue = submit(queue, request(1, "b"), LIMITS, PAGES)
    assert queue.served["b"] == 500


def test_requests_that_would_be_late_are_dropped():
    queue = queue_of(request(0, "a"), request(1, "b", arrived=8.0))
    queue, late = abort(queue, 9.0, LIMITS)
    assert not late
    queue = started(queue, 4.0)
    queue, late = abort(queue, 9.0, LIMITS)
    assert [r.id for r in late] == [0] and [r.id for r in queue.waiting] == [1]
    assert started(queue._replace(delay=4.0), 14.0).delay == pytest.approx(5.0)


def test_one_slow_start_does_not_turn_everyone_away_for_good():
    queue, dropped = started(Queue(), 25.0), 0
    for k in range(30):
        queue = submit(queue, request(k, "a", arrived=float(k)), LIMITS, PAGES)
        queue, late = abort(queue, float(k), LIMITS)
        dropped += len(late)
        queue = remove(queue, {k})  # one that was kept is served
    assert 0 < dropped < 12


def test_what_is_chosen_fits_into_the_table():
    draw = np.random.default_rng(1)
    for _ in range(30):
        table = empty_table(1 + 60)
        for name in "abc":
            table, _ = put(table, name, int(draw.integers(4, 9)))
        held = {n: len(r.pages) for n, r in table.held.items()}
        table = pin(table, "b")
        picks = [str(draw.choice([*"abcde"])) for _ in range(8)]
        queue = queue_of(*(request(k, a, int(draw.integers(1, 20)), 0.0, held.get(a, 6))
                           for k, a in enumerate(picks)), pages=61)  # fmt: skip
        _, now = admit(queue, table, Limits(rows=8, adapters=4))
        for r in now:  # as the engine does it
            if r.adapter in table.held:
                table = pin(table, r.adapter)
        for r in now:
            if r.adapter not in table.held:
                table = pin(put(table, r.adapter, r.adapter_pages)[0], r.adapter)
            table, _ = allocate(table, r.tokens)
        assert now
    assert unpin(table, "b").held["b"].pins >= 0


def test_refusals():
    with pytest.raises(ValueError, match="got 0 tokens and 5 new ones"):
        queue_of(request(0, None, tokens=0))
    with pytest.raises(ValueError, match="got 1009 pages for tokens and adapter, expected at most"):
        queue_of(request(0, "a", tokens=1000))
    small = LIMITS._replace(queue=1)
    with pytest.raises(Busy, match="queue: got 1 waiting requests"):
        queue_of(request(0, None), request(1, None), limits=small)
