"""The engine: rows of mixed adapters and lengths against merged weights, one request at a time."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.serving import components, engine, forward, mix, pages, schedule
from jlora.serving.engine import cancel, step, submit
from jlora.serving.forward import Batch, Sampling
from jlora.serving.paged_pool import in_pages, in_use, pages_of_component
from jlora.serving.shelf import Memory, fetch
from jlora.serving.state import Engine, Work, start
from tests.serving.served import CONFIG

LIMITS = schedule.Limits(rows=3, adapters=2, queue=20, patience=1e6)
WIDTH = forward.width(CONFIG)
COUNT = 200  # pages: 6 per component, so not all four adapters and three rows fit


def served(llama, limits=LIMITS, shelf=None, half=None):
    params, _, known = llama
    shelf = shelf or known
    memory = [Memory()]

    def read(name):
        memory[0], found = fetch(shelf, memory[0], name)
        return found

    return Engine(CONFIG, params, shelf.sites, read, COUNT, limits, component_dtype=half)


def run(at, works, steps=200):
    """(state, tokens by request, why each ended), all submitted at the start."""
    ticks = itertools.count()
    clock = lambda: float(next(ticks))  # noqa: E731
    state, tokens, done = start(at, 0.0), {}, {}
    for work in works:
        state, number = submit(at, state, work, clock())
        tokens[number] = []
    for _ in range(steps):
        state, events = step(at, state, clock)
        for e in events:
            tokens[e.id] += [] if e.token is None else [e.token]
            done |= {e.id: e.done} if e.done else {}
        if not state.queue.waiting and not state.queue.running:
            break
    return state, [tokens[k] for k in sorted(tokens)], [done.get(k) for k in sorted(tokens)]


def works(llama, count=8, seed=0):
    draw = np.random.default_rng(seed)
    names = [None, *sorted(llama[1])]
    return [
        Work(tuple(draw.integers(0, 40, draw.integers(1, 8)).tolist()),
             int(draw.integers(1, 7)), names[k % len(names)])
        for k in range(count)
    ]  # fmt: skip


def check_answers(llama, oracle, given):
    state, tokens, done = run(served(llama), given)
    for work, got in zip(given, tokens, strict=True):
        assert got == oracle(work.adapter, work.ids, work.most)[0], work
    assert done == ["length"] * len(given)
    return state


def test_answers_are_those_of_merged_weights_and_every_page_comes_back(llama, oracle):
    given = [*works(llama), Work(tuple(range(14)), 5, "middle")]  # one grows into the next bucket
    state = check_answers(llama, oracle, given)
    assert state.table.evictions > 0 and state.table.hits > 0
    held = sum(len(r.pages) for r in state.table.held.values())
    assert pages.count_free(state.table) == COUNT - 1 - held and not state.rows and not state.works
    assert all(r.pins == 0 for r in state.table.held.values())
    assert state.measures.finished == {"length": 9}
    assert state.measures.tokens == sum(w.most for w in given)


def test_logits_of_a_mixed_batch_equal_those_of_merged_weights(llama, oracle):
    params, adapters, shelf = llama
    per = pages_of_component(shelf.sites, WIDTH)
    table, data = pages.empty_table(COUNT), pages.empty_pool(COUNT, WIDTH) * jnp.nan
    data = data.at[0].set(0.0)  # pages hold anything but zeros at first
    for name in ("large", "small"):
        rows = in_pages(components.components(adapters[name], shelf.sites), WIDTH)
        table, own = pages.put(table, name, len(rows))
        data = pages.write(data, jnp.asarray(own), jnp.asarray(rows))
    names = ("large", None, "small")
    prompts = [np.arange(3) + 1, np.arange(11) % 7, np.arange(6) + 20]
    where, owner = in_use(table, ("large", "small"), per)
    bank = engine._gather(data, jnp.asarray(where), jnp.asarray(owner), shelf.sites)
    ids, write = np.zeros((3, 16), np.int32), np.full((3, 16), COUNT, np.int32)
    rows = []
    for k, prompt in enumerate(prompts):
        table, own = pages.allocate(table, len(prompt) + 1)
        ids[k, : len(prompt)], write[k, : len(prompt)] = prompt, own[:-1]
        rows.append(own)
    last = np.asarray([len(p) - 1 for p in prompts])
    arrays = ([0, components.BASE, 1], ids, [0] * 3, last, np.zeros((3, 16)), write)
    out = forward.step(CONFIG, data, params, bank, Batch(*map(engine._ints, arrays)))
    want = [oracle(n, p.tolist(), 2) for n, p in zip(names, prompts, strict=True)]
    np.testing.assert_allclose(out.logits, [w[1][0] for w in want], atol=1e-4)
    seen = np.zeros((3, 16))
    for k, own in enumerate(rows):
        seen[k, : len(own) - 1] = own[:-1]
    new = [[own[-1]] for own in rows]
    arrays = ([0, components.BASE, 1], out.best[:, None], last + 1, [0] * 3, seen, new)
    out = forward.step(CONFIG, out.data, params, bank, Batch(*map(engine._ints, arrays)))
    np.testing.assert_allclose(out.logits, [w[1][1] for w in want], atol=1e-4)


def test_rows_with_components_of_their_own_answer_the_same(llama, oracle, monkeypatch):
    monkeypatch.setattr(mix, "GAIN", 0.0)
    names = ("small", None, "middle", "small", "middle")
    check_answers(llama, oracle, [Work((3 + k, 5), 2, name) for k, name in enumerate(names)])


def test_other_mixes_of_ranks_and_lengths_compile_nothing(llama):
    run(served(llama), works(llama, 8, seed=2))
    first = forward.step._cache_size()
    _, tokens, _ = run(served(llama), works(llama, 8, seed=3)[::-1])
    assert forward.step._cache_size() == first and all(tokens)


def test_components_in_half_precision_answer_and_compile_nothing_anew(llama, oracle):
    at = served(llama, half="float16")
    given = [Work((1 + k, 5), 2, name) for k, name in enumerate(("small", "other"))]
    state, tokens, _ = run(at, given)
    assert tokens == [oracle(w.adapter, w.ids, 2)[0] for w in given]
    assert {t.dtype.name for p, a in state.bank.frozen.items() for n, t in a.items()
            if n in "uv"} == {"float16"}  # fmt: skip
    first = forward.step._cache_size()
    assert run(at, [w._replace(adapter="small") for w in given])[1][0] == tokens[0]
    assert forward.step._cache_size() == first


def test_a_component_that_half_precision_cannot_hold_is_the_error_of_its_request(llama):
    at = served(llama, half="float16")
    large = 1e5 * np.ones((4, components.size(at.sites)), np.float32)
    at = dataclasses.replace(at, fetch=lambda _: large)
    state, _ = submit(at, start(at, 0.0), Work((1, 2), 2, "small"), 0.0)
    state, events = step(at, state, lambda: 1.0)
    assert [e.done for e in events] == ["error"] and not state.rows
    assert events[0].error == ("small: got a component of 1e+05, expected at most 6.55e+04, the "
                               "largest float16")  # fmt: skip
    with pytest.raises(ValueError, match="component_dtype: got 'int8', expected None or one of"):
        served(llama, half="int8")


def test_a_damaged_adapter_is_the_error_of_its_request(llama, oracle, foreign):
    at = served(llama, shelf=foreign)
    with pytest.raises(ValueError, match="adapter 'damaged'"):
        submit(at, start(at, 0.0), Work((1,), 2, "damaged"), 0.0)
    with pytest.raises(KeyError, match="adapter 'nobody'"):
        submit(at, start(at, 0.0), Work((1,), 2, "nobody"), 0.0)
    state, _ = submit(at, start(at, 0.0), Work((1, 2), 2, "small"), 0.0)
    state, _ = submit(at, state, Work((1, 2), 2, "other"), 0.0)
    at.fetch("large"), (foreign.root / "small" / "adapter_config.json").unlink()
    at = served(llama, shelf=foreign)  # its memory is empty
    state, events = step(at, state, lambda: 1.0)
    ends = {e.id: e for e in events if e.done}
    assert ends[0].done == "error" and "small" in ends[0].error and 1 not in ends
    assert [r.work.adapter for r in state.rows] == ["other"]
    assert state.rows[0].new[0] == oracle("other", (1, 2), 1)[0][0]


def test_late_and_cancelled_requests_end(llama):
    at = served(llama, LIMITS._replace(patience=5.0))
    state = start(at, 0.0)
    for _ in range(5):
        state, _ = submit(at, state, Work((1, 2), 9, "small"), 0.0)
    state, _ = step(at, state, lambda: 1.0)
    assert len(state.rows) == 3
    state = cancel(cancel(state, 3), 77)
    state, events = step(at, state, lambda: 20.0)
    assert [(e.id, e.done) for e in events if e.done] == [(4, "late")]
    for number in range(3):
        state = cancel(state, number)
    assert not state.rows and state.measures.finished == {"cancelled": 4, "late": 1}
    assert state.table.held["small"].pins == 0


def test_an_answer_ends_at_an_end_token_and_draws_repeat(llama, oracle):
    want = oracle(None, (1, 2, 3), 6)[0]
    ends = Work((1, 2, 3), 6, None, ends=(want[2],))
    hot = Work((1, 2, 3), 6, None, Sampling(temperature=1.5, top_p=0.9, seed=3))
    _, tokens, done = run(served(llama), [ends, hot, hot, hot._replace(sampling=Sampling(2.0))])
    assert tokens[0] == want[: want.index(want[2]) + 1] and done[0] == "stop"
    assert tokens[1] == tokens[2] and tokens[1] != tokens[3]


def test_draws_follow_top_p():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 400)
    at = jnp.float32(1.0), jnp.float32(0.75)
    got = np.asarray(jax.vmap(lambda k: forward.draw(k, logits, *at))(keys))
    assert set(got.tolist()) == {0, 1} and abs((got == 0).mean() - 5 / 8) < 0.08


def test_refusals(llama):
    at = served(llama)
    with pytest.raises(ValueError, match="got 60 tokens and 9 new ones, expected at most 64"):
        submit(at, start(at, 0.0), Work((1,) * 60, 9), 0.0)
    with pytest.raises(ValueError, match=r"got a token outside of 0\.\.39"):
        submit(at, start(at, 0.0), Work((40,), 1), 0.0)
    full = served(llama, LIMITS._replace(queue=0))
    with pytest.raises(schedule.Busy, match="queue: got 0 waiting"):
        submit(full, start(full, 0.0), Work((1,), 1, "small"), 0.0)


def test_mutation_rows_with_the_adapter_of_another(llama, oracle, monkeypatch):
    monkeypatch.setattr(components, "for_row", lambda bank, row: bank)
    forward.step.clear_cache()
    with pytest.raises(AssertionError):
        check_answers(llama, oracle, [Work((1, 2, 3), 2, "large")])
    forward.step.clear_cache()
