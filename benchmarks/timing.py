r"""How every benchmark measures: interleaved repetitions, pinned cores, one JSON line.

A benchmark is a function ``measure(settings) -> dict``. ``main(name, measure)`` runs it in child
processes, one for each number of threads, whose cores and thread pools are fixed before anything
heavy is imported:

- 1 thread: pinned to one core, the minimum of CPU time, which a busy machine bends least;
- 2 threads: the minimum of wall time, worth reading on a quiet machine only.

Repetitions are interleaved, each time in another order drawn by chance (the same in every run): so
drift meets all peers alike, and so does what the one before leaves behind (cold caches, a thread
pool that still spins). With :math:`t` the minimum over repetitions,

.. math:: \mathrm{ratio} = t_{\mathrm{peer}} / t_{\mathrm{jlora}}

is above 1 where jlora is faster. Where steps use large temporary memory, glibc is made to keep it
from step to step (``KEEP``), for all peers of the process: giving 140 MiB back to the kernel and
taking it again, page by page, is a tenth of a step. ``--plain-malloc`` measures without.

Progress goes to stderr; the last line of stdout is one JSON
object. ``--quick`` takes tiny shapes, one thread and two repetitions: it shows that a benchmark
runs, no more.
"""

import argparse
import ctypes
import functools
import gc
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEEP = {  # glibc then keeps what a step frees for the next one, instead of giving it back
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
}


@dataclass(frozen=True)
class Settings:
    """What a measurement may depend on."""

    quick: bool = False  # tiny shapes, two repetitions
    threads: int = 1  # 1: CPU time on one core; 2: wall time on two
    repetitions: int | None = None  # instead of the benchmark's own number

    def count(self, usual: int) -> int:
        """How often to repeat: `usual` by default."""
        if self.repetitions is not None:
            return self.repetitions
        return 2 if self.quick else usual

    @property
    def clock(self) -> Callable[[], float]:
        return time.process_time if self.threads == 1 else time.perf_counter


@dataclass(frozen=True)
class Fresh:
    """A run that uses its input up: `make` it off the clock, then `run` on it."""

    make: Callable[[], Any]
    run: Callable[[Any], Any]


def interleave(
    runs: Mapping[str, Callable[[], Any] | Fresh],
    repetitions: int,
    settings: Settings,
    label: str = "",
    limit: float = 80.0,
    warm: int = 2,
) -> dict[str, list[float]]:
    """Seconds of every call, {name: [repetitions]}; `warm` calls of each come first, uncounted.

    Every repetition calls all of them, in an order of its own.

    A run returns when its work is done (it blocks until its arrays are ready). After `limit`
    seconds of wall time no further repetition starts, once there are three.
    """
    names, clock, began = list(runs), settings.clock, time.perf_counter()
    draw = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm, repetitions):
        for name in draw.sample(names, len(names)):
            run = runs[name]
            if isinstance(run, Fresh):
                run = functools.partial(run.run, run.make())
            start = clock()
            run()
            took = clock() - start
            if turn >= 0:
                seconds[name].append(took)
        note(f"{label} {max(turn + 1, 0)}/{repetitions}", end="\r")
        if turn >= 2 and time.perf_counter() - began > limit:
            break
    note(f"{label} x{len(seconds[names[0]])}  " + show(seconds))
    return seconds


def best(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """{name: minimum in milliseconds}."""
    return {name: 1e3 * min(values) for name, values in seconds.items()}


def spread(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """{name: [minimum, lower quartile, median] in milliseconds}."""

    def at(values, q):
        return round(1e3 * sorted(values)[int(q * (len(values) - 1))], 4)

    return {name: [at(v, 0.0), at(v, 0.25), at(v, 0.5)] for name, v in seconds.items()}


def ratio_of_extras(theirs: float, ours: float, whole: float) -> float:
    """`theirs` / `ours`, two differences of times; ours counts as at least 0.1 % of `whole`.

    Below that a difference is noise, and its reciprocal would be any number.
    """
    return theirs / max(ours, 1e-3 * whole)


def show(seconds: Mapping[str, Sequence[float]]) -> str:
    return "  ".join(f"{name} {ms:.2f} ms" for name, ms in best(seconds).items())


def note(text: str, end: str = "\n") -> None:
    """Progress, on stderr; lines that the next one overwrites only on a terminal."""
    if end == "\r" and not sys.stderr.isatty():
        return
    print(f"{text:<110}", end=end, file=sys.stderr, flush=True)


def transient_mib(run: Callable[[], Any] | Fresh) -> float | None:
    """Peak resident memory of one call above what the process holds before it, in MiB.

    What a `Fresh` run uses up is held before. None where the kernel cannot reset the peak (anything
    but Linux).
    """
    if isinstance(run, Fresh):
        run.run(run.make())
        run = functools.partial(run.run, run.make())
    else:
        run()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))


def main(
    name: str,
    measure: Callable[[Settings], dict[str, Any]],
    threads: Sequence[int] = (1, 2),
    keep: bool = False,
) -> None:
    """The command line of a benchmark: measures in child processes, prints one JSON line.

    `keep`: with memory kept between steps (`KEEP`), for all peers, unless --plain-malloc says no.
    """
    args = _parser(name, threads, keep).parse_args()
    keep = keep and not args.plain_malloc
    if args.threads is not None:
        settings = Settings(args.quick, args.threads, args.repetitions)
        print(json.dumps(measure(settings), default=float))
        return
    result: dict[str, Any] = {"benchmark": name}
    for n in threads[:1] if args.quick else threads:
        note(f"{name}: {n} thread{'s' if n > 1 else ''}")
        figures = _child(name, n, args, keep)
        result |= figures if n == threads[0] else {f"threads_{n}": figures}
    result["environment"] = environment(keep)
    print(json.dumps(result))


def _parser(name: str, threads: Sequence[int], keep: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    parser.add_argument("--repetitions", type=int, help="instead of the benchmark's own number")
    settings = " ".join(f"{k}={v}" for k, v in KEEP.items())
    parser.set_defaults(plain_malloc=False)
    if keep:
        parser.add_argument("--plain-malloc", action="store_true", help=f"without {settings}")
    parser.add_argument("--threads", type=int, choices=threads, help="measure in this process")
    return parser


def _child(name: str, threads: int, args: argparse.Namespace, keep: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{name}", f"--threads={threads}"]
    command += ["--quick"] * args.quick
    command += [f"--repetitions={args.repetitions}"] * (args.repetitions is not None)
    env = dict(os.environ)
    flags = [env.get("XLA_FLAGS", "")]
    if threads == 1:
        flags.append("--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    env["XLA_FLAGS"] = " ".join(flags).strip()
    for pool in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        env[pool] = str(threads)
    env |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= KEEP if keep else {}
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: _pin(threads)
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _pin(threads: int) -> None:
    """To the last `threads` cores this process may use (a kernel's own work prefers the first)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


def environment(keep: bool = False) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    from importlib.metadata import PackageNotFoundError, version

    machine: dict[str, Any] = {"cpu": _cpu(), "python": platform.python_version()}
    for package in ("jax", "flax", "torch", "peft", "transformers"):
        try:
            machine[package] = version(package)
        except PackageNotFoundError:
            machine[package] = None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return machine | {"load": load, "memory_kept": keep, "max_rss_mib": _children_mib()}


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _children_mib() -> float:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
