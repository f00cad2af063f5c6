"""Being stopped: SIGTERM or SIGINT ends the command at once, with nothing half-written.

An exception raised out of a signal handler would travel through XLA, whose threads still run while
the interpreter ends: a segmentation fault, or seconds of waiting for a compilation. So the work
runs in a thread of its own, the main thread only waits, and its handler cleans up and leaves the
process without unwinding anything.

Deviates: nothing.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def stoppable(work: Callable[[], T], undo: Callable[[], object]) -> T:
    """The result of `work`, or the end of the process.

    Args:
      work: what to do.
      undo: called when a signal comes, while `work` still runs; what it leaves is left.

    Returns:
      What `work` returns. The process ends with 128 and the number of the signal, if one comes.

    Raises:
      What `work` raises.
    """
    result: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:  # raised again where it is waited for
            failed.append(error)

    def stop(number: int, _: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        undo()
        sys.stderr.write(
            f"\nstopped by {signal.Signals(number).name}; nothing half-written is left\n"
        )
        sys.stderr.flush()
        os._exit(128 + number)

    before = [(each, signal.signal(each, stop)) for each in SIGNALS]
    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
        thread.join()
    finally:
        for each, handler in before:
            signal.signal(each, handler)
    if failed:
        raise failed[0]
    return result[0]
