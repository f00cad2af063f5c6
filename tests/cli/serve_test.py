"""`jlora serve`: its refusals in one line, and a process that drains at SIGTERM."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jlora import registry
from jlora.cli import serve
from jlora.cli.main import main
from jlora.models import decoder
from tests.experiments.finetuning.conftest import letters
from tests.serving.served import CONFIG, TARGETS
from tests.serving.served import llama as llama


@pytest.fixture(scope="module")
def base(llama, tmp_path_factory):
    """A checkpoint directory with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    decoder.save(folder, CONFIG, llama[0])
    letters().save_pretrained(folder)
    return folder


def words(checkpoint, llama, **flags):
    given = {"base": checkpoint, "adapters": llama[2].root, "targets": TARGETS, "memory": 1,
             "max_rank": 16, "port": 0} | flags  # fmt: skip
    return ["serve", *(f"--{k}={v}" for k, v in given.items())]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"base": "nowhere"}, "base: got nowhere, expected a folder with config.json"),
        ({"adapters": "nowhere"}, "adapters: got nowhere, expected a folder"),
        ({"rows": 0}, "rows: got 0, expected above 0"),
        ({"max_rank": 10_000}, "memory: got 1 MiB"),
        ({"targets": "nothing"}, "nothing"),
        ({"devices": 9}, "devices: got 9, expected at most 8"),
        ({"devices": 8}, "kv_heads: got 2, expected a multiple of 8"),
        ({"name": "small"}, "name: got 'small', which is an adapter"),
    ],
)
def test_refusals_are_one_line(base, llama, capsys, flags, why):
    assert main(words(base, llama, **flags)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and why in lines[0], lines


def test_a_tokenizer_of_another_model(base, llama, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "odd")
    path = tmp_path / "odd" / "tokenizer.json"
    path.write_text(path.read_text().replace('"a":4', '"a":444').replace('"a": 4', '"a": 444'))
    assert main(words(tmp_path / "odd", llama)) == 2
    assert "it is of another model" in capsys.readouterr().err


def test_the_flags_become_an_engine(base, llama):
    args = serve.parser().parse_args(words(base, llama, rows=5, devices=2)[1:])
    found = serve.read_base(base, "float32")
    engine, files = serve.engine_of(args, found)
    assert found.ends == (0,) and engine.limits.rows == 5 and files.most == 16
    assert engine.pages == 2**20 // (32 * 4), "pages of 32 numbers"
    query = engine.params["layers"]["attention"]["query"]["kernel"]
    assert engine.layout is not None and len(query.sharding.device_set) == 2


def test_an_installation_without_the_extra_lists_its_systems():
    root = Path(serve.__file__).parents[1]
    web = re.compile(r"^\s*(?:import|from) (?:starlette|uvicorn)", re.M)
    files = {
        p.relative_to(root).as_posix() for p in root.rglob("*.py") if web.search(p.read_text())
    }
    assert files == {"cli/serve.py", "serving/server.py"}
    modules = {"jlora." + f.removesuffix(".py").replace("/", ".") for f in files}
    assert all(m.startswith(registry.SKIPPED) for m in modules), "the walk would import them"


def test_a_port_that_is_taken(base, llama, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(words(base, llama, port=taken.getsockname()[1])) == 2
    assert "Address already in use" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_answers_drains_at_sigterm_and_ends(base, llama):
    flags = words(base, llama, max_tokens=50)
    process = subprocess.Popen(
        [sys.executable, "-m", "jlora.cli.main", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("serving tiny and 4 adapters on http://127.0.0.1:"), line
        port, answers = int(line.rsplit(":", 1)[1].split("/")[0]), []

        def ask():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            body = {"model": "small", "prompt": "ab", "max_tokens": 50, "temperature": 2, "seed": 3,
                    "stream": True}  # fmt: skip
            connection.request("POST", "/v1/completions", json.dumps(body))
            answer = connection.getresponse()
            answers.append(answer.readline())  # the first token: the answer is under way
            begun.set()
            answers.append(answer.read())
            connection.close()

        begun = threading.Event()
        thread = threading.Thread(target=ask)
        thread.start()
        assert begun.wait(60), answers
        process.send_signal(signal.SIGTERM)
        thread.join(120)
        process.wait(60)
        out, err = process.stdout.read(), process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close(), process.stderr.close()
    assert process.returncode == 0, err
    assert answers[0].startswith(b"data: ") and b"data: [DONE]" in answers[1]
    assert out.startswith("ended: ") and len(out.splitlines()) == 1 and not err.strip(), (out, err)
