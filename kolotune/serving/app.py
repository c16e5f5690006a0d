"""The server: OpenAI's API in front of llama.cpp's own servers, one for each model.

What is ours is in front: who may ask, the Modelfile's defaults, the names of models, errors in OpenAI's form. The rest
passes as it is, streams included.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kolotune.foundation import typed_storage
from kolotune.foundation.addresses import is_loopback
from kolotune.foundation.errors import ConfigError, KolotuneError
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.llamacpp.model_server import ModelServer

from .requests import PATHS, BadRequest
from .responses import as_openais, error_body, renamed, renamed_in
from .served_model import ServedModel
from .upstream import Upstream

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

_GRACE_SECONDS = 1
_UNUSED_FIELDS = "x-unused-fields"
_EVENTS = "text/event-stream"


def serve(models: Sequence[ServedModel], host: str, port: int, reporter: Reporter) -> None:
    """Serve models until Ctrl-C or a termination signal.

    Args:
        models: the models.
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
        for model in models:
            if unused := model.defaults.unused:
                reporter.note(f"these parameters of the Modelfile apply only in Ollama: {', '.join(unused)}")
            reporter.success(f"serving {model.name} ({model.gguf.name}); press Ctrl-C to stop")
        reporter.result(url, url=url, model=models[0].name, models=[model.name for model in models])
        config = uvicorn.Config(
            make_app(models, only_here=is_loopback(host), reporter=reporter),
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


def make_app(models: Sequence[ServedModel], only_here: bool, reporter: Reporter) -> Starlette:
    """Return the ASGI application.

    Args:
        models: the models that answer.
        only_here: refuse requests whose Host is not a loopback name: another name may belong to a web page that attacks
            this server through the user's browser (DNS rebinding).
        reporter: shows which fields of requests have no effect, once each, and crashes.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    endpoints = _Endpoints(models, only_here, reporter)
    reads: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/health": endpoints.health,
        "/v1/models": endpoints.models,
        "/v1/models/{name:path}": endpoints.model,
    }
    return Starlette(
        routes=[
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in reads.items()),
            *(Route(path, endpoints.ask, methods=["POST"]) for path in PATHS),
        ],
        exception_handlers={HTTPException: _refused_by_route, BadRequest: _bad_request},
    )


async def _refused_by_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    if status == 405:
        return _json(error_body(f"{request.method} is not allowed for {request.url.path}"), status)
    return _json(error_body(f"{request.url.path} is not served; these are: /v1/models, {', '.join(PATHS)}"), status)


async def _bad_request(_: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    return _json(error_body(str(error), code=error.code), error.status)


class _Endpoints:
    """One method for each kind of request."""

    def __init__(self, models: Sequence[ServedModel], only_here: bool, reporter: Reporter) -> None:
        self._models, self._only_here, self._reporter = {model.name: model for model in models}, only_here, reporter
        self._noted: set[str] = set()

    async def health(self, request: Request) -> Response:
        self._check_host(request)
        return _json({"status": "ok"})

    async def models(self, request: Request) -> Response:
        self._check_host(request)
        return _json({"object": "list", "data": [_entry(model) for model in self._models.values()]})

    async def model(self, request: Request) -> Response:
        self._check_host(request)
        return _json(_entry(self._named(request.path_params["name"])))

    async def ask(self, request: Request) -> Response:
        """Pass a request on to llama.cpp's server, with the Modelfile's defaults."""
        from starlette.concurrency import run_in_threadpool

        self._check_host(request)
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            # A web page can send other types to any address without the user's consent.
            raise BadRequest("the body must be application/json", status=415)
        try:
            fields = typed_storage.parse_object(await request.body())
        except typed_storage.StorageError as error:
            raise BadRequest(f"the body is {error}") from None
        model, path = self._named(fields.get("model")), request.url.path
        whole, unused = model.defaults.apply(path, fields)
        self._note(unused)
        try:
            server = await run_in_threadpool(lambda: model.server)  # it may have to start again
        except KolotuneError as error:
            return _json(error_body(error.cause, "server_error", "model_crashed"), 503)
        response = await _unless_disconnected(request, lambda: self._answer(model, server, path, whole))
        if unused:
            response.headers[_UNUSED_FIELDS] = ", ".join(unused).encode("ascii", "replace").decode()
        return response

    def _check_host(self, request: Request) -> None:
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        if self._only_here and not is_loopback(host):
            raise BadRequest("this server answers to localhost only", status=403)

    def _named(self, name: object) -> ServedModel:
        """The model that a request names; a single one answers to every name."""
        if len(self._models) > 1 and name not in self._models:
            raise BadRequest(f"model: must be one of {', '.join(self._models)}", "model_not_found", 404)
        return self._models[str(name)] if name in self._models else next(iter(self._models.values()))

    def _note(self, unused: list[str]) -> None:
        if new := [name for name in unused if name not in self._noted]:
            self._noted.update(new)
            self._reporter.note(f"a request has fields that have no effect: {', '.join(new)}")

    async def _answer(self, model: ServedModel, server: ModelServer, path: str, fields: JsonObject) -> Response:
        """Ask a server; a crash is an answer, too."""
        from starlette.responses import Response

        headers = {**server.headers, "Content-Type": "application/json"}
        with contextlib.ExitStack() as opened:
            body = json.dumps(fields).encode()
            upstream = opened.enter_context(Upstream(server.address, path, headers, body))
            try:
                await upstream.begin()
                if upstream.media_type.startswith(_EVENTS) and upstream.status == 200:
                    events = renamed(self._events(upstream, server), model.alias, model.name)
                    return _streaming_response(events, opened.pop_all())
                whole = renamed_in(await upstream.whole(), model.alias, model.name)
            except OSError:
                return _json(await self._crash(server), 503)
        if upstream.status != 200:
            return _json(as_openais(whole), upstream.status)
        return Response(whole, upstream.status, media_type=upstream.media_type)

    async def _events(self, upstream: Upstream, server: ModelServer) -> AsyncGenerator[bytes, None]:
        """The bytes of a stream; its reader may leave it at any time, which ends the computation."""
        try:
            async for piece in upstream.pieces():
                yield piece
        except OSError:
            yield f"data: {json.dumps(await self._crash(server))}\n\n".encode()

    async def _crash(self, server: ModelServer) -> JsonObject:
        from starlette.concurrency import run_in_threadpool

        error = await run_in_threadpool(server.crash)
        self._reporter.warning(error.cause)
        return error_body(error.cause, "server_error", "model_crashed")


def _entry(model: ServedModel) -> JsonObject:
    created = int(model.gguf.stat().st_mtime)
    return {"id": model.name, "object": "model", "created": created, "owned_by": "kolotune"}


def _json(value: JsonObject, status: int = 200) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(value, status)


async def _unless_disconnected(request: Request, ask: Callable[[], Awaitable[Response]]) -> Response:
    """Return a response, or an empty one as soon as the client is gone."""
    from anyio import create_task_group
    from starlette.responses import Response

    response = Response(status_code=499)
    async with create_task_group() as group:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        response = await ask()
        group.cancel_scope.cancel()
    return response


def _streaming_response(events: AsyncGenerator[bytes, None], opened: contextlib.ExitStack) -> Response:
    """A response of server-sent events; when it ends, or its reader disconnects, what is open for it is closed."""
    from starlette.responses import StreamingResponse

    class Streaming(StreamingResponse):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            with opened:
                async with contextlib.aclosing(events):
                    await super().__call__(scope, receive, send)

    return Streaming(events, media_type=_EVENTS, headers={"Cache-Control": "no-cache"})
