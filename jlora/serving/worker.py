"""The thread that runs the engine, and how others talk to it.

The engine's state has one owner, this thread. What others want of it (`Worker.ask`) waits in an
inbox and is done between two steps; what happened to a request is handed to its `sink`, in this
thread. Figures are read from the last state, whose parts on the host are values.

Deviates: nothing.
"""

import concurrent.futures
import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from jlora.serving import engine, metrics, pages, shelf
from jlora.serving.state import Engine, Event, State, Work, start
from jlora.types import Dynamic

IDLE = 0.05  # seconds that an engine without requests waits for its inbox

Sink = Callable[[Event], None]


class Asks(Protocol):
    """What is done between two steps."""

    def __call__(self, state: State) -> tuple[State, Dynamic]: ...


class Draining(RuntimeError):
    """The server ends, or its engine has failed; nothing new is taken."""


class Worker:
    """An engine in a thread of its own. `start` it once; `drain` ends it."""

    def __init__(self, model: Engine, files: shelf.Shelf):
        self.shelf = files
        self.engine = dataclasses.replace(model, fetch=self.fetch)
        self.memory = shelf.Memory()
        self.folders: dict[str, str | None] = {}  # name -> folder; None: unloaded by name
        self.state = start(self.engine, time.monotonic())
        self.failed = ""  # why the engine stopped
        self.ending = False
        self._inbox: queue.Queue[tuple[Asks, concurrent.futures.Future]] = queue.Queue()
        self._sinks: dict[int, Sink] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def fetch(self, name: str) -> Dynamic:
        """Components of an adapter by the name that requests use; in the engine's thread.

        Args:
          name: untrusted.

        Returns:
          As `shelf.fetch`.

        Raises:
          Unknown: there is none, or it was unloaded.
        """
        where = self.folders.get(name, name)
        if where is None:
            raise shelf.Unknown(f"adapter {name!r}: not loaded, and no PEFT directory of that name")
        self.memory, adapter = shelf.fetch(self.shelf, self.memory, where)
        return adapter

    def ask(self, what: Asks) -> concurrent.futures.Future:
        """Has something done between two steps.

        Args:
          what: state -> (state, result).

        Returns:
          A future of the result, or of what was raised.

        Raises:
          Draining: the server ends, or the engine has failed.
        """
        if self.ending or self.failed:
            raise Draining(self.failed or "the server is ending")
        done: concurrent.futures.Future = concurrent.futures.Future()
        self._inbox.put((what, done))
        return done

    def submit(self, work: Work, sink: Sink) -> concurrent.futures.Future:
        """Takes a request in.

        Args:
          work: the request.
          sink: gets its events, in the engine's thread.

        Returns:
          A future of its number, or of what `engine.submit` raises.
        """

        def put(state: State) -> tuple[State, int]:
            state, number = engine.submit(self.engine, state, work, time.monotonic())
            self._sinks[number] = sink
            return state, number

        return self.ask(put)

    def cancel(self, number: int) -> None:
        """Ends a request that nobody waits for.

        Args:
          number: of the request.
        """

        def end(state: State) -> tuple[State, None]:
            self._sinks.pop(number, None)
            return engine.cancel(state, number), None

        if not self.failed:  # also while the server ends: it waits for what runs
            self._inbox.put((end, concurrent.futures.Future()))

    def load(self, name: str, folder: str) -> concurrent.futures.Future:
        """Reads an adapter and gives it a name, so that its first request need not wait.

        Args:
          name: that requests will use.
          folder: of the shelf.

        Returns:
          A future of None. It raises `Unknown`, or ValueError for a name that means another
          adapter, a damaged adapter, or a name with other characters.
        """

        def put(state: State) -> tuple[State, None]:
            if not shelf.NAME.fullmatch(name):
                raise ValueError(f"lora_name: got {name[:80]!r}, expected letters, digits, '.', "
                                 "'_' and '-'")  # fmt: skip
            if (self.folders.get(name, name) or folder) != folder and self._known(name):
                raise ValueError(f"adapter {name!r}: already loaded; unload it first")
            self.memory, _ = shelf.fetch(self.shelf, self.memory, folder)
            self.folders[name] = folder
            return state, None

        return self.ask(put)

    def unload(self, name: str) -> concurrent.futures.Future:
        """Takes an adapter out of the pool and of the names that requests may use.

        Args:
          name: of the adapter.

        Returns:
          A future of None. It raises `Unknown`, or ValueError while requests run that use it.
        """

        def drop(state: State) -> tuple[State, None]:
            if not self._known(name):
                raise shelf.Unknown(f"adapter {name!r}: not loaded")
            if name in state.table.held:
                table = pages.drop(state.table, name)
                state = state._replace(table=table, active=None, bank=None)
            self.memory = shelf.forget(self.memory, self.folders.get(name) or name)
            self.folders[name] = None
            return state, None

        return self.ask(drop)

    def names(self) -> tuple[str, ...]:
        """The adapters that requests may name.

        Returns:
          Those of the shelf and those with a name of their own, without those that were unloaded.
        """
        names = dict.fromkeys(shelf.listed(self.shelf), True)
        names |= {name: where is not None for name, where in dict(self.folders).items()}
        return tuple(sorted(name for name, there in names.items() if there))

    def prometheus(self) -> str:
        """The figures as text.

        Returns:
          As `metrics.prometheus`.
        """
        state = self.state
        return metrics.prometheus(state.measures, state.queue, state.table, time.monotonic())

    def drain(self, seconds: float) -> bool:
        """Takes nothing new, ends what runs, and the thread.

        Args:
          seconds: that it may take.

        Returns:
          Whether everything was answered.
        """
        self.ending = True
        self._thread.join(seconds)
        return not self._thread.is_alive() and not self.failed

    def _known(self, name: str) -> bool:
        where = self.folders.get(name, name)
        try:
            return where is not None and bool(shelf.folder(self.shelf, where))
        except shelf.Unknown:
            return False

    def _run(self) -> None:
        try:
            while True:
                busy = bool(self.state.queue.waiting or self.state.rows)
                if self.ending and not busy and self._inbox.empty():
                    return
                self._answer_inbox(wait=not busy)
                if self.state.queue.waiting or self.state.rows:
                    self.state, events = engine.step(self.engine, self.state, time.monotonic)
                    for event in events:
                        self._deliver(event)
        except Exception as error:  # the pool may be gone: nothing can be answered any more
            self.failed = f"engine: {type(error).__name__}: {error}"
            for number in list(self._sinks):
                self._deliver(Event(number, None, "error", "the engine has failed"))
        finally:
            while not self._inbox.empty():
                why = self.failed or "the server is ending"
                self._inbox.get()[1].set_exception(Draining(why))

    def _deliver(self, event: Event) -> None:
        sink = self._sinks.get(event.id)
        if event.done:
            self._sinks.pop(event.id, None)
        if sink is not None:
            sink(event)

    def _answer_inbox(self, wait: bool) -> None:
        while True:
            try:
                what, done = self._inbox.get(timeout=IDLE) if wait else self._inbox.get_nowait()
            except queue.Empty:
                return
            wait = False
            try:
                self.state, result = what(self.state)
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(result)
