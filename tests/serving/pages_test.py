"""The table of pages: no page twice, none lost, the longest unused adapter goes first."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.serving import pages as module
from jlora.serving.pages import (
    Full,
    allocate,
    bucket,
    count_evictable,
    count_free,
    drop,
    empty_pool,
    empty_table,
    padded,
    pin,
    put,
    release,
    unpin,
    write,
)


def check_books(table, requests):
    """Every page but 0 is free or has one owner."""
    owned = [p for r in table.held.values() for p in r.pages.tolist()]
    owned += [p for own in requests for p in own.tolist()]
    assert len({*owned}) == len(owned), "a page with two owners"
    free = np.flatnonzero(table.free).tolist()
    assert sorted(owned + free) == list(range(1, len(table.free)))


def check_random_walk(seed, steps=120):
    """Requests come and go, adapters are put, pinned and evicted, in any order."""
    draw = np.random.default_rng(seed)
    table, requests, pins = empty_table(40), [], []
    for k in range(steps):
        match draw.integers(5):
            case 0:
                name = f"a{k}"
                try:
                    table, _ = put(table, name, int(draw.integers(1, 12)))
                    table = pin(table, name)
                    pins.append(name)
                except Full:
                    pass
            case 1 if pins:
                table = unpin(table, pins.pop(draw.integers(len(pins))))
            case 2 | 3:
                try:
                    table, own = allocate(table, int(draw.integers(0, 9)))
                    requests.append(own)
                except Full:
                    pass
            case 4 if requests:
                table = release(table, requests.pop(draw.integers(len(requests))))
        check_books(table, requests)
        assert all(name in table.held for name in pins), "a pinned adapter went"
    return table


@pytest.mark.parametrize("seed", range(3))
def test_no_page_has_two_owners_and_none_is_lost(seed):
    table = check_random_walk(seed)
    assert table.evictions > 0 and table.misses > 0, "the walk tried nothing"


def test_mutation_an_allocation_that_takes_nothing(monkeypatch):
    def wrong(table, count):
        return table, np.flatnonzero(table.free)[:count].astype(np.int32)

    monkeypatch.setattr(module, "allocate", wrong)
    with pytest.raises((AssertionError, ValueError)):
        check_random_walk(0)


def test_the_adapter_whose_last_use_is_longest_ago_goes_first():
    table = empty_table(1 + 6)
    for name in "abc":
        table, _ = put(table, name, 2)
    for name in "abca":
        table = unpin(pin(table, name), name)
    table, _ = allocate(table, 1)
    assert sorted(table.held) == ["a", "c"] and count_free(table) == 1
    table = pin(table, "c")  # the older one, now pinned
    table, _ = allocate(table, 3)
    assert sorted(table.held) == ["c"] and table.evictions == 2


def test_free_pages_that_do_not_follow_each_other_are_enough():
    table, own = allocate(empty_table(1 + 8), 8)
    table = release(table, own[::2])
    table, again = allocate(table, 4)
    assert again.tolist() == own[::2].tolist()


def test_what_does_not_fit_evicts_nothing():
    table, _ = put(empty_table(1 + 4), "a", 3)
    assert count_evictable(table) == 3 and count_evictable(table, frozenset("a")) == 0
    with pytest.raises(Full, match="pages: got 4 that are free or may be freed, expected 5"):
        allocate(table, 5)
    table = pin(table, "a")
    with pytest.raises(Full, match="got 1 that"):
        put(table, "b", 2)


def test_refusals():
    table, _ = put(empty_table(4), "a", 1)
    with pytest.raises(ValueError, match="a: already loaded"):
        put(table, "a", 1)
    with pytest.raises(ValueError, match="a: got 1 running requests, expected none"):
        drop(pin(table, "a"), "a")
    with pytest.raises(ValueError, match="a: got no pin"):
        unpin(table, "a")
    for action in (drop, pin, unpin):
        with pytest.raises(KeyError, match=r"b: not loaded; there are \['a'\]"):
            action(table, "b")
    for bad in ([0], [2], [1, 1], [9]):
        with pytest.raises(ValueError, match="expected different ones that are in use"):
            release(table, np.asarray(bad))
    with pytest.raises(ValueError, match="expected at least 0"):
        allocate(table, -1)
    with pytest.raises(ValueError, match="expected at least 2"):
        empty_table(1)


def test_buckets_and_writes_beyond_the_pool():
    assert [bucket(n, 4) for n in (0, 4, 5, 9)] == [4, 4, 8, 16]
    where = padded(np.asarray([2, 1]), 4, value=3)
    assert where.tolist() == [2, 1, 3, 3]
    rows = jnp.arange(8.0).reshape(4, 2)
    data = write(empty_pool(3, 2), jnp.asarray(where), rows)
    assert data.tolist() == [[0, 0], [2, 3], [0, 1]]
