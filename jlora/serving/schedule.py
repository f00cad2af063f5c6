r"""Which requests run next: by pages, fair between adapters, and none that comes too late.

=====  ====================================================================================
c_a    `Queue.served[a]`: tokens that adapter a was served, prompts and answers
L      `Limits.lead`: by how many tokens an adapter may pass one that waits
=====  ====================================================================================

A waiting request is a candidate in the order of :math:`(c_a, \text{arrival})`. It is admitted
when there is a row, when its adapter runs already or fewer than `Limits.adapters` run, and when the
pages of its tokens and, unless it is in the pool, of its adapter are free or may be freed. Once as
many adapters run as may, requests of those are admitted past one, b, that waits for another
adapter, as long as

.. math:: c_a \le c_b + L

so that nobody starves. A request that waits for pages is never passed. An adapter without requests
gathers no credit: when it comes back, its :math:`c_a` is at least the least of those in the queue.
A request is dropped when its first token could not come within `Limits.patience` any more.

Reference: Sheng et al. 2023, arXiv:2311.03285 (S-LoRA): clustered adapters, early abort; counters
    as in Sheng et al. 2023, arXiv:2401.00588 (fairness in serving).
Deviates: S-LoRA admits first come, first served and has no counters; where it is overloaded it
    prefers the newest requests, this one the least served adapters.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jlora.serving.pages import Table, count_evictable, count_free

KEPT = 0.9  # of the moving mean of `Queue.delay`


class Busy(ValueError):
    """The queue is full; later there may be room."""


class Limits(NamedTuple):
    """What may run and wait at once."""

    rows: int = 8  # of a batch
    adapters: int = 8  # different ones in a batch
    queue: int = 256  # requests that wait
    patience: float = 60.0  # seconds until the first token
    lead: int = 512  # L, tokens


class Request(NamedTuple):
    """What the scheduler knows of a request."""

    id: int
    adapter: str | None  # None: the base
    prompt: int  # tokens
    most: int  # new tokens at most
    arrived: float  # seconds, by any clock
    adapter_pages: int = 0  # of its adapter; 0 for the base

    @property
    def tokens(self) -> int:
        """Pages that its tokens take at most."""
        return self.prompt + self.most


class Queue(NamedTuple):
    """Who waits, who runs, and who was served how much."""

    waiting: tuple[Request, ...] = ()  # by arrival
    running: tuple[Request, ...] = ()
    served: Mapping[str | None, float] = {}  # tokens by adapter
    delay: float = 0.0  # seconds from admission to first token, moving mean


def submit(queue: Queue, request: Request, limits: Limits, pages: int) -> Queue:
    """A queue with one more request.

    Args:
      queue: as it is.
      request: the new one.
      limits: of the server.
      pages: of the pool, page 0 included.

    Returns:
      Another queue.

    Raises:
      Busy: too many wait.
      ValueError: a prompt or answer without tokens, or one that would never fit.
    """
    if request.prompt < 1 or request.most < 1:
        raise ValueError(f"request: got {request.prompt} tokens and {request.most} new ones, "
                         "expected at least 1 of each")  # fmt: skip
    need = request.tokens + request.adapter_pages
    if need >= pages:
        raise ValueError(f"request: got {need} pages for tokens and adapter, expected at most "
                         f"{pages - 1}, the pool")  # fmt: skip
    if len(queue.waiting) >= limits.queue:
        raise Busy(f"queue: got {len(queue.waiting)} waiting requests, expected fewer; try later")
    served, present = dict(queue.served), {r.adapter for r in (*queue.waiting, *queue.running)}
    if request.adapter not in present:
        least = min((served[a] for a in present), default=0.0)
        served[request.adapter] = max(served.get(request.adapter, 0.0), least)
    return queue._replace(waiting=(*queue.waiting, request), served=served)


def abort(queue: Queue, now: float, limits: Limits) -> tuple[Queue, tuple[Request, ...]]:
    """Drops the requests whose first token could not come in time.

    Args:
      queue: as it is.
      now: by the clock of the requests.
      limits: `patience`.

    Returns:
      Another queue, whose `delay` shrinks with every drop, and those that were dropped.
    """
    late = tuple(r for r in queue.waiting if now + queue.delay - r.arrived > limits.patience)
    if late:  # else one slow start (a program is compiled) would turn everyone away for good
        queue = queue._replace(delay=KEPT * queue.delay)
    return remove(queue, {r.id for r in late}), late


def admit(queue: Queue, table: Table, limits: Limits) -> tuple[Queue, tuple[Request, ...]]:
    """The requests that start now, in order.

    Args:
      queue: as it is.
      table: of the pages.
      limits: rows and adapters.

    Returns:
      Another queue, in which they run, and the requests.
    """
    chosen: list[Request] = []
    active = {r.adapter for r in queue.running} - {None}
    spent = 0  # pages that requests chosen so far will take
    passed: float | None = None  # counter of one that waits for an adapter to end
    for request in sorted(queue.waiting, key=lambda r: (queue.served[r.adapter], r.arrived, r.id)):
        if len(queue.running) + len(chosen) >= limits.rows:
            break
        new = request.adapter is not None and request.adapter not in active
        if new and len(active) >= limits.adapters:
            passed = queue.served[request.adapter] if passed is None else passed
            continue
        if passed is not None and queue.served[request.adapter] > passed + limits.lead:
            continue
        loads = new and request.adapter not in table.held
        need = request.tokens + loads * request.adapter_pages
        keep = frozenset(n for n in (*active, request.adapter) if n is not None)
        if need > count_free(table) + count_evictable(table, keep) - spent:
            break
        chosen.append(request)
        spent += need
        active |= {request.adapter} - {None}
    ids = {r.id for r in chosen}
    waiting = tuple(r for r in queue.waiting if r.id not in ids)
    running = (*queue.running, *chosen)
    return queue._replace(waiting=waiting, running=running), tuple(chosen)


def charge(queue: Queue, tokens: Mapping[str | None, int]) -> Queue:
    """Counts what adapters were served.

    Args:
      queue: as it is.
      tokens: by adapter.

    Returns:
      Another queue.
    """
    served = dict(queue.served)
    for adapter, count in tokens.items():
        served[adapter] = served.get(adapter, 0.0) + count
    return queue._replace(served=served)


def started(queue: Queue, seconds: float) -> Queue:
    """Learns how long a first token takes.

    Args:
      queue: as it is.
      seconds: from the admission of a request to its first token.

    Returns:
      Another queue.
    """
    mean = KEPT * queue.delay + (1 - KEPT) * seconds if queue.delay else seconds
    return queue._replace(delay=mean)


def remove(queue: Queue, ids: Iterable[int]) -> Queue:
    """A queue without some requests, wherever they are.

    Args:
      queue: as it is.
      ids: of the requests.

    Returns:
      Another queue.
    """
    gone = set(ids)
    waiting = tuple(r for r in queue.waiting if r.id not in gone)
    return queue._replace(
        waiting=waiting, running=tuple(r for r in queue.running if r.id not in gone)
    )
