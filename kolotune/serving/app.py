"""The server: OpenAI's chat completions for one model, one answer at a time."""

from __future__ import annotations

import contextlib
import json
import socket
import uuid
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from kolotune.foundation.addresses import is_loopback
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.reporter import Reporter

from .requests import BadRequest, ChatRequest, CompletionBodies, error_of, read, usage_of
from .served_model import ServedModel

_GRACE_SECONDS = 1


def serve(model: ServedModel, host: str, port: int, reporter: Reporter) -> None:
    """Serves until Ctrl-C or a termination signal.

    Args:
        model: what answers.
        host: address to listen on.
        port: 0 for any that is free.
        reporter: told where it listens, and the risk of a host that others can reach.

    Raises:
        ConfigError: nothing can listen there.
    """
    import uvicorn

    with _listening(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}/v1"
        if not is_loopback(host):
            reporter.warning(
                f"whoever reaches {shown} can use this model and read what is asked and answered on the way: there is "
                "no password and no encryption"
            )
        if model.unused:
            reporter.note(f"of the Modelfile's parameters these are for Ollama alone: {', '.join(model.unused)}")
        reporter.success(f"{model.name} ({model.gguf.name}) is served; Ctrl-C ends it")
        reporter.result(url, url=url, model=model.name)
        config = uvicorn.Config(
            application(model, only_here=is_loopback(host)),
            log_level="error",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        with contextlib.suppress(KeyboardInterrupt):  # how it is meant to end
            uvicorn.Server(config).run(sockets=[listener])
    reporter.note("no longer served")


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"nothing can listen on {host}, port {port}: {why}",
            "Choose another --port (0: any free one), or leave --host out.",
        ) from None


def application(model: ServedModel, only_here: bool) -> Any:
    """The ASGI application.

    Args:
        model: what answers.
        only_here: refuse requests that call this machine by a name that is not its loopback's: behind such a name a
            web page of somebody else's may stand.
    """
    from anyio import Lock
    from starlette.applications import Starlette
    from starlette.routing import Route

    pages = _Pages(model, only_here, Lock)
    return Starlette(
        routes=[
            Route("/v1/models", pages.models, methods=["GET"]),
            Route("/v1/models/{name:path}", pages.model, methods=["GET"]),
            Route("/v1/chat/completions", pages.chat, methods=["POST"]),
        ]
    )


class _Pages:
    """What is found under each address."""

    def __init__(self, model: ServedModel, only_here: bool, lock: Any) -> None:
        self._model, self._only_here, self._lock = model, only_here, lock()

    async def models(self, request: Any) -> Any:
        return self._refused(request) or _json({"object": "list", "data": [self._entry()]})

    async def model(self, request: Any) -> Any:
        return self._refused(request) or _json(self._entry())

    def _entry(self) -> dict[str, Any]:
        made = int(self._model.gguf.stat().st_mtime)
        return {"id": self._model.name, "object": "model", "created": made, "owned_by": "kolotune"}

    async def chat(self, request: Any) -> Any:
        from starlette.concurrency import run_in_threadpool

        if refused := self._refused(request):
            return refused
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            # What a web page may send anywhere without being asked is of other types.
            return _json(error_of("the body must be application/json"), 415)
        try:
            wanted = read(await request.body())
            prompt = await run_in_threadpool(self._model.prompt, wanted)
        except BadRequest as error:
            return _json(error_of(str(error), code=error.code), 400)
        shapes = CompletionBodies(f"chatcmpl-{uuid.uuid4().hex}", self._model.name)
        if wanted.stream:
            return _streaming(self._stream(wanted, prompt, shapes))
        return await self._whole(request, wanted, prompt, shapes)

    def _refused(self, request: Any) -> Any:
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        if self._only_here and not is_loopback(host):
            return _json(error_of("this server answers to localhost only"), 403)
        return None

    async def _whole(self, request: Any, wanted: ChatRequest, prompt: list[int], shapes: CompletionBodies) -> Any:
        from starlette.concurrency import iterate_in_threadpool

        pieces = []
        async with self._lock:
            answer = self._model.answer(wanted, prompt)
            async for piece in iterate_in_threadpool(answer):
                pieces.append(piece)
                if await request.is_disconnected():
                    break
        return _json(shapes.whole("".join(pieces), answer.reason, usage_of(len(prompt), answer.tokens)))

    async def _stream(self, wanted: ChatRequest, prompt: list[int], shapes: CompletionBodies) -> AsyncIterator[str]:
        from starlette.concurrency import iterate_in_threadpool

        async with self._lock:
            answer = self._model.answer(wanted, prompt)
            yield _event(shapes.piece({"role": "assistant", "content": ""}))
            async for piece in iterate_in_threadpool(answer):
                yield _event(shapes.piece({"content": piece}))
        yield _event(shapes.piece({}, answer.reason))
        if wanted.stream_options and wanted.stream_options.include_usage:
            yield _event(shapes.count(usage_of(len(prompt), answer.tokens)))
        yield "data: [DONE]\n\n"


def _json(value: dict[str, Any], status: int = 200) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(value, status)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _streaming(events: AsyncIterator[str]) -> Any:
    """A response of server-sent events that gives the model free when its reader goes away."""
    from starlette.responses import StreamingResponse

    class Streaming(StreamingResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async with contextlib.aclosing(events):  # type: ignore[type-var]
                await super().__call__(scope, receive, send)

    return Streaming(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
