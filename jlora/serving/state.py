"""What an engine is made of: what stays, what a step changes, what comes in and what goes out.

Deviates: nothing; `jlora.serving.engine` says what happens to it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from jlora.core.adapter import Adapter
from jlora.core.site import Site
from jlora.models.decoder import DecoderConfig
from jlora.serving import forward, metrics, pages, schedule
from jlora.serving.forward import Sampling
from jlora.serving.parallel import Layout
from jlora.types import Tree

LIMITS = schedule.Limits()
HALVES = ("float16", "bfloat16")

Fetch = Callable[[str], Float[np.ndarray, "r N"]]


@dataclasses.dataclass(frozen=True)
class Engine:
    """What does not change while a server runs."""

    config: DecoderConfig
    params: Tree  # weights of the base
    sites: tuple[Site, ...]  # that adapters may have, of `forward.adaptable`
    fetch: Fetch  # components of an adapter; raises KeyError or ValueError for one it cannot give
    pages: int  # P, page 0 included
    limits: schedule.Limits = LIMITS
    layout: Layout | None = None  # of `params` on several devices (`parallel.place`); None: one
    component_dtype: str | None = None  # of `State.bank`, one of `HALVES`; None: that of the pages

    def __post_init__(self):
        if self.component_dtype not in (None, *HALVES):
            raise ValueError(
                f"component_dtype: got {self.component_dtype!r}, expected None or one of {HALVES}"
            )


class Work(NamedTuple):
    """A request as it comes in."""

    ids: tuple[int, ...]  # tokens of the prompt
    most: int  # new tokens at most
    adapter: str | None = None  # None: the base
    sampling: Sampling = Sampling()
    ends: tuple[int, ...] = ()  # tokens that end the answer


class Row(NamedTuple):
    """A request that runs."""

    request: schedule.Request
    work: Work
    pages: Int[np.ndarray, "n"]  # of its tokens, by position
    new: tuple[int, ...] = ()  # generated so far; the last one is not in the pages yet


class Event(NamedTuple):
    """What a step did for a request: a token, the end, or both."""

    id: int
    token: int | None = None
    done: str = ""  # stop, length, late, error; "" while it runs
    error: str = ""


class State(NamedTuple):
    """What a step changes."""

    data: Float[Array, "P W"]  # the pool
    table: pages.Table
    measures: metrics.Measures
    queue: schedule.Queue = schedule.Queue()
    works: Mapping[int, Work] = {}  # of requests that wait
    rows: tuple[Row, ...] = ()  # that run
    active: tuple[tuple[str, ...], bool] | None = None  # of `bank`: `Mix.names`, `Mix.own`; None: -
    bank: Adapter | None = None  # their components, gathered once per change of the batch
    number: int = 0  # of the next request


def start(engine: Engine, now: float) -> State:
    """An engine without requests.

    Args:
      engine: model and limits.
      now: by the clock of the requests, seconds.

    Returns:
      Its state; nothing is compiled yet.
    """
    data = pages.empty_pool(engine.pages, forward.width(engine.config), engine.config.dtype)
    data = data if engine.layout is None else engine.layout.pages(data)
    return State(data, pages.empty_table(engine.pages), metrics.Measures(now))
