"""The server: OpenAI's chat completions for one model, one answer at a time."""

from __future__ import annotations

import contextlib
import json
import socket
import uuid
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kolotune.foundation.addresses import is_loopback
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject

from .requests import BadRequest, ChatRequest, read_request
from .responses import CompletionBodies, error_body, usage_of
from .served_model import ServedModel

if TYPE_CHECKING:
    from anyio import Lock
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

_GRACE_SECONDS = 1


def serve(model: ServedModel, host: str, port: int, reporter: Reporter) -> None:
    """Serve a model until Ctrl-C or a termination signal.

    Args:
        model: the model.
        host: address to listen on.
        port: 0 for any free port.
        reporter: shows the address, and a warning for a host that other machines can reach.

    Raises:
        ConfigError: the address can't be listened on.
    """
    import uvicorn

    with _listen(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}/v1"
        if not is_loopback(host):
            reporter.warning(
                f"anyone who can reach {shown} can use this model and read requests and answers on the network: "
                "there is no password and no encryption"
            )
        if model.unused:
            reporter.note(f"these parameters of the Modelfile apply only in Ollama: {', '.join(model.unused)}")
        reporter.success(f"serving {model.name} ({model.gguf.name}); press Ctrl-C to stop")
        reporter.result(url, url=url, model=model.name)
        config = uvicorn.Config(
            make_app(model, only_here=is_loopback(host)),
            log_level="error",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        with contextlib.suppress(KeyboardInterrupt):  # the usual way to stop
            uvicorn.Server(config).run(sockets=[listener])
    reporter.note("no longer served")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"can't listen on {host}, port {port}: {reason}",
            "Choose another --port (0: any free port), or leave --host out.",
        ) from None


def make_app(model: ServedModel, only_here: bool) -> Starlette:
    """Return the ASGI application.

    Args:
        model: the model that answers.
        only_here: refuse requests whose Host is not a loopback name: another name may belong to a web page that attacks
            this server through the user's browser (DNS rebinding).
    """
    from anyio import Lock
    from starlette.applications import Starlette
    from starlette.routing import Route

    endpoints = _Endpoints(model, only_here, Lock())
    return Starlette(
        routes=[
            Route("/v1/models", endpoints.models, methods=["GET"]),
            Route("/v1/models/{name:path}", endpoints.model, methods=["GET"]),
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        ]
    )


class _Endpoints:
    """One method for each route."""

    def __init__(self, model: ServedModel, only_here: bool, lock: Lock) -> None:
        self._model, self._only_here, self._lock = model, only_here, lock

    async def models(self, request: Request) -> Response:
        return self._refuse(request) or _json({"object": "list", "data": [self._entry()]})

    async def model(self, request: Request) -> Response:
        return self._refuse(request) or _json(self._entry())

    def _entry(self) -> JsonObject:
        created = int(self._model.gguf.stat().st_mtime)
        return {"id": self._model.name, "object": "model", "created": created, "owned_by": "kolotune"}

    async def chat(self, request: Request) -> Response:
        from starlette.concurrency import run_in_threadpool

        if refusal := self._refuse(request):
            return refusal
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            # A web page can send other types to any address without the user's consent.
            return _json(error_body("the body must be application/json"), 415)
        try:
            chat_request = read_request(await request.body())
            prompt = await run_in_threadpool(self._model.prompt, chat_request)
        except BadRequest as error:
            return _json(error_body(str(error), code=error.code), 400)
        bodies = CompletionBodies(f"chatcmpl-{uuid.uuid4().hex}", self._model.name)
        if chat_request.stream:
            return _streaming_response(self._stream(chat_request, prompt, bodies))
        return await self._whole(request, chat_request, prompt, bodies)

    def _refuse(self, request: Request) -> Response | None:
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        if self._only_here and not is_loopback(host):
            return _json(error_body("this server answers to localhost only"), 403)
        return None

    async def _whole(
        self, request: Request, chat_request: ChatRequest, prompt: list[int], bodies: CompletionBodies
    ) -> Response:
        from starlette.concurrency import iterate_in_threadpool

        pieces = []
        async with self._lock:
            answer = self._model.answer(chat_request, prompt)
            async for piece in iterate_in_threadpool(answer):
                pieces.append(piece)
                if await request.is_disconnected():
                    break
        return _json(bodies.whole("".join(pieces), answer.reason, usage_of(len(prompt), answer.tokens)))

    async def _stream(
        self, chat_request: ChatRequest, prompt: list[int], bodies: CompletionBodies
    ) -> AsyncGenerator[str, None]:
        from starlette.concurrency import iterate_in_threadpool

        async with self._lock:
            answer = self._model.answer(chat_request, prompt)
            yield _event(bodies.chunk({"role": "assistant", "content": ""}))
            async for piece in iterate_in_threadpool(answer):
                yield _event(bodies.chunk({"content": piece}))
        yield _event(bodies.chunk({}, answer.reason))
        if chat_request.stream_options and chat_request.stream_options.include_usage:
            yield _event(bodies.usage_chunk(usage_of(len(prompt), answer.tokens)))
        yield "data: [DONE]\n\n"


def _json(value: JsonObject, status: int = 200) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(value, status)


def _event(value: JsonObject) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _streaming_response(events: AsyncGenerator[str, None]) -> Response:
    """A response of server-sent events that releases the model when its reader disconnects."""
    from starlette.responses import StreamingResponse

    class Streaming(StreamingResponse):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async with contextlib.aclosing(events):
                await super().__call__(scope, receive, send)

    return Streaming(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
