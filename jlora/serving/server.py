"""The HTTP server: OpenAI's completions and chat over the engine, an adapter per `model`.

=====================================  =====================================================
POST /v1/completions                   text or tokens in, text out; `stream` by events
POST /v1/chat/completions              messages in, by the model's own template
GET /v1/models                         the base and every adapter
POST /v1/load_lora_adapter             {"lora_name", "lora_path": a folder of the shelf}
POST /v1/unload_lora_adapter           {"lora_name"}
GET /metrics, GET /health              Prometheus; 200, or 503 once the engine failed or ends
=====================================  =====================================================

Reference: https://platform.openai.com/docs/api-reference; the two routes of adapters are vLLM's.
Deviates: a path of vLLM's route may lead anywhere, here it is a name inside one folder.
"""

import asyncio
import contextlib
import functools
import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from jlora.serving import protocol, text
from jlora.serving.forward import Sampling
from jlora.serving.protocol import Ask, Refused
from jlora.serving.schedule import Busy
from jlora.serving.shelf import Unknown
from jlora.serving.state import Event, Work
from jlora.serving.worker import Draining, Worker
from jlora.types import Json

POLL = 0.5  # seconds between looks whether the client of an answer without stream is still there
Endpoint = Callable[[Request], Awaitable[Response]]


class Bounds(NamedTuple):
    """What a request may take."""

    body: int = 2**20  # bytes
    read: float = 30.0  # seconds until all of them are there
    most: int = 1024  # new tokens
    default: int = 128  # new tokens where none are said
    seconds: float = 300.0  # of an answer
    drain: float = 60.0  # seconds that running answers have when the server ends


class Service(NamedTuple):
    """What the routes use."""

    worker: Worker
    tokenizer: text.Tokenizer
    base: str  # the name of the model without adapter
    ends: tuple[int, ...]  # tokens that end an answer
    bounds: Bounds


def app(service: Service) -> Starlette:
    """The application; its engine starts and drains with it.

    Args:
      service: engine, tokenizer and bounds.

    Returns:
      An ASGI application.
    """

    @contextlib.asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.drain, service.bounds.drain)

    route = lambda path, run, *methods: Route(path, _guarded(service, run), methods=methods)  # noqa: E731
    routes = [
        route("/v1/completions", functools.partial(_complete, chat=False), "POST"),
        route("/v1/chat/completions", functools.partial(_complete, chat=True), "POST"),
        route("/v1/load_lora_adapter", _load, "POST"),
        route("/v1/unload_lora_adapter", _unload, "POST"),
        route("/v1/models", _models, "GET"),
        route("/metrics", _metrics, "GET"),
        route("/health", _health, "GET"),
    ]
    return Starlette(routes=routes, lifespan=life, exception_handlers={HTTPException: _no_route})


def _guarded(service: Service, run: Callable[..., Awaitable[Response]]) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        try:
            return await run(service, request)
        except Refused as error:
            return JSONResponse(error.body(), error.status)
        except Unknown as error:
            return JSONResponse(Refused(str(error), "model", 404).body(), 404)
        except Busy as error:
            return JSONResponse(Refused(str(error), None, 429).body(), 429)
        except Draining as error:
            return JSONResponse(Refused(str(error), None, 503).body(), 503)
        except ClientDisconnect:
            return Response(status_code=499)

    return endpoint


async def _no_route(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return JSONResponse(Refused(str(error), None, status).body(), status)


async def _body(service: Service, request: Request) -> bytes:
    data, bounds = bytearray(), service.bounds
    try:
        async with asyncio.timeout(bounds.read):
            async for part in request.stream():
                data += part
                if len(data) > bounds.body:
                    raise Refused(f"body: got more than {bounds.body} bytes", None, 413)
    except TimeoutError:
        why = f"body: got {len(data)} bytes in {bounds.read:g} seconds, expected all"
        raise Refused(why, None, 408) from None
    return bytes(data)


async def _complete(service: Service, request: Request, chat: bool) -> Response:
    bounds = service.bounds
    ask = protocol.parse(await _body(service, request), chat, bounds.most, bounds.default)
    try:
        ids = await asyncio.to_thread(text.prompt_tokens, service.tokenizer, ask.prompt)
    except ValueError as error:
        raise Refused(str(error), "messages") from error
    answer = _Answer(service, ask, ids, chat)
    await answer.begin()
    if ask.stream:
        return StreamingResponse(answer.events(), media_type="text/event-stream")
    return JSONResponse(await answer.whole(request))


class _Answer:
    """One answer, from its request to its last token."""

    def __init__(self, service: Service, ask: Ask, ids: tuple[int, ...], chat: bool):
        self.service, self.ask, self.ids, self.chat = service, ask, ids, chat
        self.number, self.count, self.why = -1, 0, ""  # of the engine; new tokens; finish_reason
        self.loop, self.news = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self.head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + os.urandom(12).hex(),
            "created": int(time.time()),
            "model": ask.model,
        }

    async def begin(self) -> None:
        """Hands the request to the engine; what it refuses is raised."""
        ask = self.ask
        seed = int.from_bytes(os.urandom(7)) if ask.seed is None else ask.seed % 2**63
        name = None if ask.model == self.service.base else ask.model
        sampling = Sampling(ask.temperature, ask.top_p, seed)
        work = Work(self.ids, ask.most, name, sampling, self.service.ends)
        try:
            self.number = await asyncio.wrap_future(self.service.worker.submit(work, self._sink))
        except (Busy, Unknown):
            raise
        except ValueError as error:
            raise Refused(str(error)) from error

    def _sink(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.news.put_nowait, event)

    async def pieces(self, alive: Callable[[], Awaitable[bool]]) -> AsyncGenerator[str, None]:
        """Text as it comes; ends the request in the engine however this ends."""
        answer, deadline = text.Answer(), time.monotonic() + self.service.bounds.seconds
        try:
            while not self.why:
                try:
                    event = await asyncio.wait_for(self.news.get(), POLL)
                except TimeoutError:
                    if time.monotonic() > deadline:
                        raise Refused("timeout: the answer took too long", None, 504) from None
                    if not await alive():
                        raise ClientDisconnect() from None
                    continue
                if event.token is None:
                    status = 503 if event.done == "late" else 500
                    raise Refused(event.error, None, status)
                if time.monotonic() > deadline:
                    raise Refused("timeout: the answer took too long", None, 504)
                self.count += 1
                token = None if event.done == "stop" else event.token
                last = bool(event.done)
                answer, new = text.grow(self.service.tokenizer, answer, token, self.ask.stop, last)
                self.why = "stop" if answer.stopped else event.done
                if new:
                    yield new
        finally:
            self.service.worker.cancel(self.number)

    async def whole(self, request: Request) -> dict[str, Json]:
        """The answer in one piece."""

        async def alive() -> bool:
            return not await request.is_disconnected()

        content = "".join([piece async for piece in self.pieces(alive)])
        kind = "chat.completion" if self.chat else "text_completion"
        part = {"message": {"role": "assistant", "content": content}} if self.chat else {
            "text": content
        }  # fmt: skip
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": self.why}
        return {**self.head, "object": kind, "choices": [choice], "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""

        async def alive() -> bool:
            return True  # a stream without its client is cancelled by the server

        if self.chat:
            yield self._chunk({"role": "assistant", "content": ""}, None)
        try:
            async with contextlib.aclosing(self.pieces(alive)) as pieces:
                async for piece in pieces:
                    yield self._chunk({"content": piece} if self.chat else piece, None)
        except Refused as error:
            yield f"data: {json.dumps(error.body())}\n\n"
            return
        yield self._chunk({} if self.chat else "", self.why)
        if self.ask.usage:
            yield self._event([], self._usage())
        yield "data: [DONE]\n\n"

    def _chunk(self, part: Json, why: str | None) -> str:
        part = {"delta": part} if self.chat else {"text": part}
        return self._event([{"index": 0, **part, "logprobs": None, "finish_reason": why}], None)

    def _event(self, choices: list[Json], usage: Json) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        chunk = {**self.head, "object": kind, "choices": choices}
        chunk |= {"usage": usage} if self.ask.usage else {}
        return f"data: {json.dumps(chunk)}\n\n"

    def _usage(self) -> dict[str, int]:
        prompt, new = len(self.ids), self.count
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


async def _named(service: Service, request: Request, *fields: str) -> list[str]:
    body = protocol.json_object(await _body(service, request))
    if not body.keys() <= {*fields}:
        raise Refused(f"{min(body.keys() - {*fields})[:80]}: unknown field")
    values = []
    for name in fields:
        value = body.get(name, body.get(fields[0]))
        if not isinstance(value, str):
            raise Refused(f"{name}: got {str(value)[:80]!r}, expected a name", name)
        values.append(value)
    if values[0] == service.base:
        raise Refused(f"{fields[0]}: got {values[0]!r}, the name of the base", fields[0])
    return values


async def _load(service: Service, request: Request) -> Response:
    name, folder = await _named(service, request, "lora_name", "lora_path")
    try:
        await asyncio.wrap_future(service.worker.load(name, folder))
    except ValueError as error:
        raise Refused(str(error)) from error
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def _unload(service: Service, request: Request) -> Response:
    (name,) = await _named(service, request, "lora_name")
    try:
        await asyncio.wrap_future(service.worker.unload(name))
    except ValueError as error:
        raise Refused(str(error), None, 409) from error
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def _models(service: Service, request: Request) -> Response:
    names = await asyncio.to_thread(service.worker.names)
    rows = [{"id": service.base, "object": "model", "created": 0, "owned_by": "jlora"}]
    rows += [{**rows[0], "id": n, "parent": service.base} for n in names if n != service.base]
    return JSONResponse({"object": "list", "data": rows})


async def _metrics(service: Service, request: Request) -> Response:
    return PlainTextResponse(service.worker.prometheus(), media_type="text/plain; version=0.0.4")


async def _health(service: Service, request: Request) -> Response:
    worker = service.worker
    if worker.failed or worker.ending:
        raise Refused(worker.failed or "the server is ending", None, 503)
    return JSONResponse({"status": "ok"})
