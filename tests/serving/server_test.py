"""The server by the real `openai` client on loopback: answers, streams, adapters, and refusals."""

import asyncio
import http.client
import json
import random
import re
import shutil
import socket
import threading
import time

import openai
import pytest
import uvicorn

from jlora.serving import schedule, server, text
from jlora.serving.shelf import Shelf
from jlora.serving.state import Engine
from jlora.serving.worker import Worker
from tests.experiments.finetuning.conftest import letters
from tests.serving.served import CONFIG

BOUNDS = server.Bounds(body=4096, read=1.0, most=40, default=5, seconds=60.0, drain=20.0)
PROMPT = [5, 9, 12]


class Running:
    """A server in a thread."""

    def __init__(self, service):
        config = uvicorn.Config(server.app(service), port=0, log_config=None, lifespan="on")
        self.service, self.server = service, uvicorn.Server(config)
        self.socket = config.bind_socket()
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        for _ in range(400):
            if self.server.started:
                break
            time.sleep(0.05)

    def request(self, method, path, body=None):
        """(status, text) by a plain client."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def stop(self):
        self.server.should_exit = True
        self.thread.join(60)
        self.socket.close()


@pytest.fixture(scope="module")
def running(llama, tmp_path_factory):
    params, _, shelf = llama
    root = tmp_path_factory.mktemp("served") / "root"
    shutil.copytree(shelf.root, root)
    shutil.copytree(root / "small", root / "damaged")
    (root / "damaged" / "adapter_model.safetensors").write_bytes(b"nothing")
    (root / "link").symlink_to(shelf.root / "small")
    limits = schedule.Limits(rows=3, adapters=2, queue=30, patience=60.0)
    engine = Engine(CONFIG, params, shelf.sites, lambda _: None, 200, limits)
    worker = Worker(engine, Shelf(root, shelf.sites, shelf.names, 16))
    server = Running(server_service(worker))
    yield server
    server.stop()
    assert not server.thread.is_alive() and not worker.failed


def server_service(worker):
    return server.Service(worker, letters(), "base", (0,), BOUNDS)


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


def said(tokens):
    """What the tokenizer makes of an oracle's tokens."""
    tokens = tokens[: tokens.index(0)] if 0 in tokens else tokens
    return letters().decode(tokens, skip_special_tokens=True)


def test_completions_of_several_adapters_at_once_are_those_of_merged_weights(client, oracle):
    names = ["small", "base", "large", "middle"]
    found = {}

    def ask(name):
        found[name] = client.completions.create(
            model=name, prompt=PROMPT, max_tokens=6, temperature=0
        )

    threads = [threading.Thread(target=ask, args=(n,)) for n in names]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for name in names:
        want = oracle(None if name == "base" else name, PROMPT, 6)[0]
        answer = found[name]
        assert answer.choices[0].text == said(want), name
        assert answer.choices[0].finish_reason == ("stop" if 0 in want else "length")
        assert answer.usage.prompt_tokens == 3 and answer.model == name


def test_a_chat_uses_the_models_template(client, oracle):
    answer = client.chat.completions.create(
        model="large", messages=[{"role": "user", "content": "hi a"}], max_tokens=5, temperature=0
    )
    ids = letters().encode("<|user|>hi a<|end|><|assistant|>", add_special_tokens=False)
    assert answer.choices[0].message.content == said(oracle("large", ids, 5)[0])
    assert answer.choices[0].message.role == "assistant"


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_gives_the_same_text_in_pieces(client, chat):
    common = {"model": "small", "max_tokens": 6, "temperature": 0.7, "seed": 4}
    more = {"stream": True, "stream_options": {"include_usage": True}}
    if chat:
        common["messages"] = [{"role": "user", "content": "abc"}]
        whole = client.chat.completions.create(**common).choices[0].message.content
        chunks = list(client.chat.completions.create(**common, **more))
        pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    else:
        common["prompt"] = "abc"
        whole = client.completions.create(**common).choices[0].text
        chunks = list(client.completions.create(**common, **more))
        pieces = [c.choices[0].text for c in chunks if c.choices]
    assert "".join(pieces) == whole and len(pieces) > 2
    assert chunks[-1].usage.completion_tokens == 6 or chunks[-2].choices[0].finish_reason == "stop"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(client, oracle):
    want = said(oracle("other", PROMPT, 12)[0])
    stop = want[3:5]
    answer = client.completions.create(
        model="other", prompt=PROMPT, max_tokens=12, temperature=0, stop=stop
    )
    assert answer.choices[0].text == want[: want.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_models_are_listed_loaded_and_unloaded(client, running):
    names = lambda: {m.id for m in client.models.list()}  # noqa: E731
    assert {"base", "small", "large"} <= names() and "link" not in names()
    load = lambda **body: running.request("POST", "/v1/load_lora_adapter", json.dumps(body))  # noqa: E731
    unload = lambda **body: running.request("POST", "/v1/unload_lora_adapter", json.dumps(body))  # noqa: E731
    assert load(lora_name="again", lora_path="small")[0] == 200
    assert "again" in names()
    same = [client.completions.create(model=n, prompt=PROMPT, max_tokens=4, temperature=0)
            for n in ("again", "small")]  # fmt: skip
    assert same[0].choices[0].text == same[1].choices[0].text
    assert load(lora_name="again", lora_path="large")[0] == 400
    assert unload(lora_name="again")[0] == 200 and "again" not in names()
    with pytest.raises(openai.NotFoundError, match="again"):
        client.completions.create(model="again", prompt=PROMPT)
    assert unload(lora_name="again")[0] == 404
    assert unload(lora_name="small")[0] == 200
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="small", prompt=PROMPT)
    assert load(lora_name="small")[0] == 200 and "small" in names()
    for path in ("../root/small", "/etc", "link", "nobody", ""):
        assert load(lora_name="x", lora_path=path)[0] == 404, path
    assert load(lora_name="x", lora_path="damaged")[0] == 400
    assert load(lora_name="base", lora_path="small")[0] == 400


@pytest.mark.parametrize(
    ("body", "kind", "why"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "nobody"),
        ({"model": "../small"}, openai.NotFoundError, "expected letters"),
        ({"model": "damaged"}, openai.BadRequestError, "damaged"),
        ({"max_tokens": 41}, openai.BadRequestError, "max_tokens: got '41'"),
        ({"prompt": [5] * 62}, openai.BadRequestError, "the model's context"),
        ({"prompt": [77]}, openai.BadRequestError, "outside of"),
        ({"n": 2}, openai.BadRequestError, "n: got '2'"),
        ({"extra_body": {"best": 1}}, openai.BadRequestError, "best: unknown field"),
        ({"extra_body": {"top_p": 0}}, openai.BadRequestError, "top_p: got 0"),
        ({"prompt": "a" * 5000}, openai.APIStatusError, "more than 4096 bytes"),
    ],
)
def test_refusals_have_openais_form(client, body, kind, why):
    with pytest.raises(kind, match=re.escape(why)) as error:
        client.completions.create(**{"model": "base", "prompt": PROMPT, "max_tokens": 4, **body})
    assert error.value.body["message"] and error.value.body["type"] == "invalid_request_error"


GOOD = {
    "model": "base", "prompt": "ab", "max_tokens": 1, "temperature": 0, "top_p": 1, "seed": 1,
    "stop": ["x"], "stream": False, "n": 1,
}  # fmt: skip
ODD = [None, -1, 0, 1.5, 1e400, "", "x", [], {}, [[]], True, 2**70, [None], {"a": 1}, "\ud800"]


def malformed(count):
    """Bodies that were changed at random, with whether they are JSON objects."""
    draw = random.Random(0)
    for _ in range(count):
        match draw.randrange(4):
            case 0:
                data = json.dumps(GOOD).encode()
                at = draw.randrange(len(data))
                yield data[:at] + bytes([draw.randrange(256)]) * draw.randrange(3) + data[at + 1 :]
            case 1:
                yield json.dumps({**GOOD, draw.choice([*GOOD]): draw.choice(ODD)}).encode()
            case 2:
                yield json.dumps({k: v for k, v in GOOD.items() if draw.random() < 0.7}).encode()
            case 3:
                yield draw.choice([b"", b"[]", b"[" * 2000, b"\xff\xfe", b'{"model": NaN}', b"1"])


def test_hundreds_of_malformed_requests_are_refused_one_by_one(running):
    draw, seen = random.Random(1), {}
    for body in malformed(300):
        path = draw.choice(["/v1/completions", "/v1/completions", "/v1/chat/completions",
                            "/v1/load_lora_adapter", "/v1/unload_lora_adapter"])  # fmt: skip
        status, answer = running.request("POST", path, body)
        seen[status] = seen.get(status, 0) + 1
        if status != 200:
            assert json.loads(answer)["error"]["message"], body
    assert set(seen) <= {200, 400, 404} and seen[400] > 150, seen
    assert running.request("GET", "/health")[0] == 200
    assert [running.request(*w)[0] for w in (("GET", "/nothing"), ("GET", "/v1/completions"))] == [
        404, 405,
    ]  # fmt: skip


def test_a_body_that_does_not_come_is_not_waited_for(running):
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")


def test_metrics_are_prometheus_text(running):
    status, found = running.request("GET", "/metrics")
    rows = dict(line.rsplit(" ", 1) for line in found.splitlines() if line[0] != "#")
    assert status == 200 and all(float(v) >= 0 for v in rows.values())
    assert float(rows["jlora_generated_tokens_total"]) > 20
    assert float(rows["jlora_adapter_hits_total"]) > 0
    for name in ("first_token", "request"):
        for q in ("0.5", "0.95", "0.99"):
            assert f'jlora_{name}_seconds{{quantile="{q}"}}' in rows


def test_a_client_that_goes_away_frees_its_row(client, running):
    stream = client.completions.create(
        model="base", prompt=PROMPT, max_tokens=40, temperature=2, seed=1, stream=True
    )
    next(iter(stream))
    stream.close()
    worker = running.service.worker
    for _ in range(200):
        if not worker.state.rows:
            break
        time.sleep(0.02)
    assert not worker.state.rows


def test_a_full_queue_is_said_so(client, running, monkeypatch):
    worker = running.service.worker
    full = worker.engine.limits._replace(queue=0)
    monkeypatch.setattr(worker, "engine", _with(worker.engine, full))
    with pytest.raises(openai.RateLimitError, match="queue"):
        client.completions.create(model="base", prompt=PROMPT)


def test_late_requests_are_said_so(client, running, monkeypatch):
    worker = running.service.worker
    monkeypatch.setattr(
        worker, "engine", _with(worker.engine, worker.engine.limits._replace(patience=-1.0))
    )
    with pytest.raises(openai.InternalServerError, match="no first token in time"):
        client.completions.create(model="base", prompt=PROMPT)


def _with(engine, limits):
    import dataclasses

    return dataclasses.replace(engine, limits=limits)


def test_text_grows_by_whole_characters_and_holds_back_a_stop_text():
    class Bytes:
        chat_template = None

        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode("utf-8", "replace")

    answer, pieces = text.Answer(), []
    for token in "aé<|x|>b".encode():
        answer, new = text.grow(Bytes(), answer, token, ("<|x|>",), False)
        pieces.append(new)
        if answer.stopped:
            break
    assert [p for p in pieces if p] == ["a", "é"] and answer.stopped
    answer, _ = text.grow(Bytes(), text.Answer(), ord("<"), ("<|",), False)
    assert text.grow(Bytes(), answer, None, ("<|",), True)[1] == "<"
    with pytest.raises(ValueError, match="no chat template"):
        text.prompt_tokens(Bytes(), ({"role": "user", "content": "x"},))


def test_an_engine_that_fails_says_so_to_everyone(llama):
    """A broken engine answers its requests with an error and takes no more."""
    params, _, shelf = llama
    engine = Engine(CONFIG, {**params, "norm": {}}, shelf.sites, lambda _: None, 200)
    worker = Worker(engine, shelf)
    events = []
    worker.start()
    worker.submit(server.Work((1, 2), 3), events.append).result(30)
    worker._thread.join(60)
    assert [e.done for e in events] == ["error"] and "engine: " in worker.failed
    with pytest.raises(server.Draining, match="engine: "):
        worker.submit(server.Work((1, 2), 3), events.append)
    service = server_service(worker)
    answer = asyncio.run(server._guarded(service, server._health)(None))
    assert answer.status_code == 503
