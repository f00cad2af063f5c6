r"""Continuous batching: requests join and leave a running batch between two tokens.

A step of the engine (S-LoRA's loop):

1. requests that would come too late are dropped (`schedule.abort`);
2. requests are admitted by rows, adapters and pages (`schedule.admit`); their adapters are pinned
   or put into the pool, their pages are taken, and their prompts give the first token;
3. every running row gets one token, whatever its adapter and length (`forward.step`);
4. rows that ended give their pages back; their adapters stay until the pages are wanted.

.. math:: \ell_{row} = f(\mathrm{merge}(W, p_{n(row)}), i_{row})

With `Engine.component_dtype` the components of the running batch are kept in half precision, half
the bytes that a step reads of its adapters; products are still made in the precision of the base.
An adapter's factors then differ by a share of 2^-11 (float16) or 2^-8 (bfloat16) at most, where
they are not below the smallest normal number of float16, 6.1e-5: there by 3e-8.

Shapes are buckets: `Limits.rows` rows, powers of 2 for tokens, `mix.size` for components of the
adapters in the batch, so that mixes of ranks and lengths share a few programs.

`step` is a function of a state, but the memory of the state's pool is used for the next one: a
state that was given to `step` is not to be used again.

Reference: Sheng et al. 2023, arXiv:2311.03285 (S-LoRA); Yu et al. 2022, Orca (OSDI) for batching by
    iteration.
Deviates: prompts run one at a time, each before the step of the batch.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.adapter import Adapter
from jlora.core.site import Site
from jlora.serving import components, forward, metrics, mix, pages, schedule
from jlora.serving.forward import Batch
from jlora.serving.paged_pool import gather, in_pages, in_use, pages_of_component, ranks_of
from jlora.serving.parallel import Layout, split
from jlora.serving.state import Engine, Event, Row, State, Work

TOKENS = 16  # smallest bucket of tokens


def submit(engine: Engine, state: State, work: Work, now: float) -> tuple[State, int]:
    """Takes a request in.

    Args:
      engine: model and limits.
      state: as it is.
      work: the request.
      now: its arrival.

    Returns:
      Another state, and the request's number.

    Raises:
      KeyError: there is no such adapter.
      ValueError: the adapter is damaged or foreign, the request is longer than the model's context
        or the pool, or a token is not in the vocabulary.
      Busy: too many requests wait.
    """
    most = engine.config.max_positions
    if len(work.ids) + work.most > most:
        raise ValueError(f"request: got {len(work.ids)} tokens and {work.most} new ones, expected "
                         f"at most {most} together, the model's context")  # fmt: skip
    if not all(0 <= i < engine.config.vocab for i in work.ids):
        raise ValueError(f"request: got a token outside of 0..{engine.config.vocab - 1}")
    need = 0
    if work.adapter is not None:
        if len(state.queue.waiting) >= engine.limits.queue:  # before files are read
            raise schedule.Busy(f"queue: got {len(state.queue.waiting)} waiting requests")
        held = state.table.held.get(work.adapter)
        need = len(held.pages) if held else len(engine.fetch(work.adapter)) * _per(engine)
    request = schedule.Request(state.number, work.adapter, len(work.ids), work.most, now, need)
    queue = schedule.submit(state.queue, request, engine.limits, engine.pages)
    works = {**state.works, request.id: work}
    return state._replace(queue=queue, works=works, number=state.number + 1), request.id


def cancel(state: State, number: int) -> State:
    """Ends a request that nobody waits for any more; one that has ended is no error.

    Args:
      state: as it is.
      number: of the request.

    Returns:
      Another state.
    """
    running = [r for r in state.rows if r.request.id == number]
    if not running and number not in state.works:
        return state
    state = state._replace(measures=metrics.ended(state.measures, "cancelled"))
    return _end(state, running) if running else _forget(state, [number])


def step(
    engine: Engine, state: State, clock: Callable[[], float]
) -> tuple[State, tuple[Event, ...]]:
    """Drops, admits, and gives every running request a token.

    Args:
      engine: model and limits.
      state: as it is; not to be used again.
      clock: the clock of the requests.

    Returns:
      Another state, and what happened, by request.
    """
    queue, late = schedule.abort(state.queue, clock(), engine.limits)
    state = _forget(state._replace(queue=queue), [r.id for r in late])
    events = [Event(r.id, None, "late", "no first token in time") for r in late]
    running = len(state.rows)
    state, refused = _admit(engine, state)
    events += refused
    for row in state.rows[running:]:
        began = clock()
        state, token = _prompt(engine, state, row)
        now = clock()
        measures = state.measures
        first = (*measures.first, now - row.request.arrived)[-metrics.WINDOW :]
        measures = measures._replace(
            first=first, prompt_tokens=measures.prompt_tokens + len(row.work.ids)
        )
        queue = schedule.charge(state.queue, {row.work.adapter: len(row.work.ids)})
        queue = schedule.started(queue, now - began)
        state = state._replace(measures=measures, queue=queue)
        state, event = _append(state, row, token, now)
        events.append(event)
    if running and (rows := state.rows[:running]):
        state, tokens = _grow(engine, state, rows)
        for row, token in zip(rows, tokens, strict=True):
            state, event = _append(state, row, token, clock())
            events.append(event)
    for event in events:
        if event.done in ("late", "error"):
            state = state._replace(measures=metrics.ended(state.measures, event.done))
    return state, tuple(events)


def _per(engine: Engine) -> int:
    return pages_of_component(engine.sites, forward.width(engine.config))


def _forget(state: State, numbers: list[int]) -> State:
    works = {k: w for k, w in state.works.items() if k not in numbers}
    return state._replace(works=works, queue=schedule.remove(state.queue, numbers))


def _admit(engine: Engine, state: State) -> tuple[State, list[Event]]:
    """Rows with pages and pinned adapters; those that are in the pool are pinned first."""
    queue, chosen = schedule.admit(state.queue, state.table, engine.limits)
    state, events = state._replace(queue=queue), []
    ready, absent = [], []
    for request in chosen:
        there = request.adapter is None or request.adapter in state.table.held
        (ready if there else absent).append(request)
        if there and request.adapter is not None:
            table = pages.pin(state.table, request.adapter)
            state = state._replace(table=table._replace(hits=table.hits + 1))
    for request in absent:
        try:
            state = _load(engine, state, request)
            ready.append(request)
        except (KeyError, ValueError) as error:
            state = _forget(state, [request.id])
            events.append(Event(request.id, None, "error", str(error)))
    for request in ready:
        table, own = pages.allocate(state.table, request.tokens)
        row = Row(request, state.works[request.id], own)
        works = {k: w for k, w in state.works.items() if k != request.id}
        state = state._replace(table=table, works=works, rows=(*state.rows, row))
    return state, events


def _load(engine: Engine, state: State, request: schedule.Request) -> State:
    """The adapter of a request in the pool, pinned."""
    name = str(request.adapter)
    if name in state.table.held:  # another request of this step has loaded it
        return state._replace(table=pages.pin(state.table, name))
    flat = engine.fetch(name)
    if engine.component_dtype is not None:
        components.check_range(flat, engine.component_dtype, name)
    rows = in_pages(flat, forward.width(engine.config))
    if len(rows) > request.adapter_pages:
        raise ValueError(f"{name}: got {len(rows)} pages, expected {request.adapter_pages}, as "
                         "when the request came: the files have changed")  # fmt: skip
    table, own = pages.put(state.table, name, len(rows))
    size = pages.bucket(len(rows), TOKENS)
    where = jnp.asarray(pages.padded(own, size, engine.pages))
    rows = jnp.asarray(np.pad(rows, ((0, size - len(rows)), (0, 0))))
    data = _write(state.data, where, rows, engine.layout)
    return state._replace(table=pages.pin(table, name), data=data, active=None, bank=None)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _write(data: jax.Array, where: jax.Array, rows: jax.Array, layout: Layout | None) -> jax.Array:
    data = pages.write(data, where, rows)
    return data if layout is None else layout.pages(data)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _gather(
    data: jax.Array,
    where: jax.Array,
    owner: jax.Array,
    sites: tuple[Site, ...],
    layout: Layout | None = None,
    own: bool = False,
    dtype: str | None = None,
) -> Adapter:
    bank = gather(data, where, owner, sites, own, dtype)
    return bank if layout is None else split(layout, bank)


def _bank(engine: Engine, state: State, names: tuple[str, ...], own: bool = False) -> Adapter:
    where, owner = map(jnp.asarray, in_use(state.table, names, _per(engine), own))
    shape = engine.sites, engine.layout, own, engine.component_dtype
    return _gather(state.data, where, owner, *shape)


def _prompt(engine: Engine, state: State, row: Row) -> tuple[State, int]:
    """The first token of a row; keys and values of its prompt go to its pages."""
    ids, name = np.asarray(row.work.ids, np.int32), row.work.adapter
    size = pages.bucket(len(ids), TOKENS)
    bank = _bank(engine, state, () if name is None else (name,))
    batch = Batch(
        adapter=_ints([components.BASE if name is None else 0]),
        ids=_ints([pages.padded(ids, size)]),
        start=_ints([0]),
        last=_ints([len(ids) - 1]),
        table=_ints(np.zeros((1, size))),
        write=_ints([pages.padded(row.pages[: len(ids)], size, engine.pages)]),
    )
    state, out = _run(engine, state, bank, batch)
    return state, _token(row, out, 0)


def _grow(engine: Engine, state: State, rows: tuple[Row, ...]) -> tuple[State, list[int]]:
    """One more token for every row."""
    count = engine.limits.rows
    wanted = [r.work.adapter for r in rows] + [None] * (count - len(rows))
    plan = mix.plan(wanted, ranks_of(state.table, _per(engine)))
    active = plan.names, plan.own
    if state.bank is None or state.active != active:
        state = state._replace(active=active, bank=_bank(engine, state, *active))
    known = [len(r.work.ids) + len(r.new) - 1 for r in rows]  # tokens in the pages
    size = pages.bucket(max(known) + 1, TOKENS)
    table, write = np.zeros((count, size)), np.full((count, 1), engine.pages)
    ids, begin = np.zeros((count, 1)), np.zeros(count)
    for k, (row, n) in enumerate(zip(rows, known, strict=True)):
        table[k, :n], write[k, 0] = row.pages[:n], row.pages[n]
        ids[k, 0], begin[k] = row.new[-1], n
    arrays = (plan.numbers, ids, begin, np.zeros(count), table, write)
    assert state.bank is not None
    state, out = _run(engine, state, state.bank, Batch(*map(_ints, arrays)))
    return state, [_token(row, out, k) for k, row in enumerate(rows)]


def _ints(values: object) -> jax.Array:
    return jnp.asarray(np.asarray(values, np.int32))


def _run(engine: Engine, state: State, bank: Adapter, batch: Batch) -> tuple[State, forward.Step]:
    out = forward.step(engine.config, state.data, engine.params, bank, batch, engine.layout)
    measures = state.measures._replace(steps=state.measures.steps + 1)
    best = np.asarray(out.best)  # waits for the step
    return state._replace(data=out.data, measures=measures), out._replace(best=best)


def _token(row: Row, out: forward.Step, k: int) -> int:
    how = row.work.sampling
    if not how.temperature:
        return int(out.best[k])
    key = jax.random.fold_in(jax.random.key(how.seed), len(row.new))
    at = jnp.float32(how.temperature), jnp.float32(how.top_p)
    return int(forward.draw(key, out.logits[k], *at))


def _append(state: State, row: Row, token: int, now: float) -> tuple[State, Event]:
    """A row with its new token, or without the row where that is its last."""
    row = row._replace(new=(*row.new, token))
    rows = tuple(row if r.request.id == row.request.id else r for r in state.rows)
    measures = state.measures._replace(tokens=state.measures.tokens + 1)
    queue = schedule.charge(state.queue, {row.work.adapter: 1})
    state = state._replace(rows=rows, measures=measures, queue=queue)
    done = "stop" if token in row.work.ends else "length" if len(row.new) == row.work.most else ""
    if done:
        seconds = now - row.request.arrived
        state = state._replace(measures=metrics.ended(state.measures, done, seconds))
        state = _end(state, [row])
    return state, Event(row.request.id, token, done)


def _end(state: State, rows: list[Row]) -> State:
    """Without some rows: their pages are free, their adapters unpinned."""
    for row in rows:
        table = pages.release(state.table, row.pages)
        if row.work.adapter is not None:
            table = pages.unpin(table, row.work.adapter)
        queue = schedule.remove(state.queue, [row.request.id])
        left = tuple(r for r in state.rows if r.request.id != row.request.id)
        state = state._replace(table=table, queue=queue, rows=left)
    return state
