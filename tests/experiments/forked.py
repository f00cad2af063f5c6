"""Programs in processes forked from one that has imported what they need: 4 core-seconds each.

    python forked.py MODULE...

reads lines of JSON {"program", "words", "folder"}, one program at a time, and answers each with
the process id and then, when the program has ended, with its exit code (-9: killed). Its output is
in the files `stdout` and `stderr` of the folder. Nothing is shared but the imports: JAX starts its
backend in the child, by the environment of the server.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    """A program that has ended."""

    returncode: int
    stdout: str
    stderr: str


class Server:
    """The process that forks; `call` runs a program to its end, `start` returns at once.

    It ends with the `with` in which it was made.
    """

    def __init__(self, environment: dict[str, str], *modules: str):
        paths = [str(ROOT), environment.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *modules], cwd=ROOT, bufsize=0,
            env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, reversed(paths)))},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.folder = tempfile.TemporaryDirectory()
        self.running = False

    def start(self, program: str, *words: str) -> int:
        """The process id of the program."""
        assert not self.running, "one program at a time"
        request = {"program": program, "words": words, "folder": self.folder.name}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.running = True
        return int(self.process.stdout.readline())

    def kill(self, pid: int) -> Ended:
        """SIGKILL: nothing is tidied up. The program must not have ended."""
        os.kill(pid, signal.SIGKILL)
        return self.wait()

    def ended(self) -> bool:
        """Whether the program that was started has ended."""
        return (Path(self.folder.name) / "code").exists()

    def wait(self) -> Ended:
        """Until it has ended."""
        code = int(self.process.stdout.readline())
        self.running = False
        texts = [(Path(self.folder.name) / name).read_text("utf-8") for name in OUTPUT]
        return Ended(code, *texts)

    def call(self, program: str, *words: str) -> Ended:
        """Start it and wait."""
        self.start(program, *words)
        return self.wait()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        """End the server."""
        self.process.stdin.close()
        assert self.process.wait() == 0
        self.process.stdout.close()
        self.folder.cleanup()


OUTPUT = ("stdout", "stderr")


def requests() -> Iterator[dict[str, Any]]:
    """In each child its own request; in the server none, until there are no more."""
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        for name in (*OUTPUT, "code"):
            (folder / name).unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            for number, name in enumerate(OUTPUT, 1):
                file = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
                os.dup2(file, number)
                os.close(file)
            yield request
            return
        os.write(1, b"%d\n" % pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        (folder / "code").touch()
        os.write(1, b"%d\n" % code)


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    from experiments import program

    for request in requests():
        module = importlib.import_module(f"experiments.{request['program']}")
        sys.argv = [module.__file__, *request["words"]]
        program.run(module.define_flags, module.main)  # ends the child


if __name__ == "__main__":
    main()
