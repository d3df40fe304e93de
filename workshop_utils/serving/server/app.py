"""The routes: health as NIM has it, the rest as the OpenAI API has it. A request's words reach the
model, never a path."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from workshop_utils.serving.server.engine import QueueFull, Row, UnknownModel
from workshop_utils.serving.server.protocol import (
    Chat,
    ChatRequest,
    Completion,
    CompletionRequest,
    Envelope,
    error,
    usage,
)

if TYPE_CHECKING:
    from workshop_utils.serving.server.sampling import Piece
    from workshop_utils.serving.server.service import Service

_HEALTH = ("/v1/health/live", "/v1/health/ready")
_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    429: "rate_limit_exceeded",
}
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """An answer with a status other than 200."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or _CODES.get(status)

    def response(self) -> Response:
        """As the OpenAI API words it."""
        headers = (
            {"Retry-After": "1"}
            if self.status in (429, 503)
            else {"WWW-Authenticate": "Bearer"}
            if self.status == 401
            else None
        )
        body = error(
            str(self), _TYPES.get(self.status, "invalid_request_error"), self.param, self.code
        )
        return Response(
            json.dumps(body), self.status, headers, "application/json"
        )  # a name may hold what UTF-8 cannot


def create_app(service: Service, api_key: str | None = None, max_body: int = 1 << 20) -> FastAPI:
    """The application around ``service``, whose owner loads and closes it. ``max_body``: most bytes
    of a request."""
    app = FastAPI(
        docs_url=None, redoc_url=None, openapi_url=None, telemetry={"auto_configure": False}
    )
    app.add_middleware(_Guard, api_key=api_key, max_body=max_body)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, fault: ApiError) -> Response:
        """What a route refused, with its status."""
        return fault.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, fault: HTTPException) -> Response:
        """What the framework refused (404, 405, 413), in the words of the OpenAI API."""
        return ApiError(
            fault.status_code, f"{request.method} {request.url.path}: {fault.detail}"
        ).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, fault: RequestValidationError) -> Response:
        """A body that is no request: 400, with the field in ``param``."""
        return _invalid(fault).response()

    @app.get("/v1/health/live")
    async def live() -> dict:
        """The process answers; the model may still be loading."""
        return {"object": "health.response", "message": "Service is live."}

    @app.get("/v1/health/ready")
    async def ready() -> dict:
        """The model is loaded; 503 before that, and while the server stops."""
        _require_ready(service)
        return {"object": "health.response", "message": "Service is ready."}

    @app.get("/v1/models")
    async def models() -> dict:
        """The base, and every adapter of the store that is served."""
        _require_ready(service)
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        """One of :func:`models`; 404 where ``name`` is none of them."""
        _require_ready(service)
        for found in service.models():
            if found["id"] == name:
                return found
        raise _unknown(name)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """An answer to a conversation, through the base's chat template."""
        _require_ready(service)
        try:
            prompt = await run_in_threadpool(
                service.chat_prompt, [message.as_turn() for message in body.messages]
            )
        except ValueError as fault:
            raise ApiError(400, str(fault), "messages", "invalid_messages") from None
        return await _answer(service, request, body, Chat, "messages", [prompt], [""])

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """What follows each prompt, without a template."""
        _require_ready(service)
        try:
            prompts = await run_in_threadpool(
                lambda: [service.prompt(each) for each in body.prompts()]
            )
        except ValueError as fault:
            raise ApiError(400, str(fault), "prompt", "invalid_prompt") from None
        echoes = [service.text(ids) if body.echo else "" for ids in prompts]
        return await _answer(service, request, body, Completion, "prompt", prompts, echoes)

    return app


class _Guard:
    """Key and size of a request, before anything else looks at it. (FastAPI's own limit answers
    with plain text.)"""

    def __init__(self, app, api_key: str | None, max_body: int):
        self._app, self._key, self._max = app, api_key, max_body

    async def __call__(self, scope, receive, send) -> None:
        headers = dict(scope.get("headers", ()))
        left = self._max

        async def counted():
            """The next message of the request. Raises 413 once there are more bytes than
            allowed."""
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"the request is larger than {self._max} bytes")
            return message

        app = self._app
        if scope["type"] == "http" and scope["path"] not in _HEALTH and self._key:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given, self._key.encode()):
                app = ApiError(
                    401, "The API key is missing or wrong: send 'Authorization: Bearer KEY'."
                ).response()
        await app(scope, counted, send)


def _require_ready(service: Service) -> None:
    if not service.ready:
        raise ApiError(
            503,
            "The model is being loaded, or the server is stopping. Ask /v1/health/ready.",
            code="not_ready",
        )


def _unknown(name: str) -> ApiError:
    return ApiError(
        404,
        f"The model '{name}' does not exist here; /v1/models lists those that do.",
        "model",
        "model_not_found",
    )


def _invalid(fault: RequestValidationError) -> ApiError:
    first = fault.errors()[0]
    kind, where, message = first["type"], [str(part) for part in first["loc"][1:]], first["msg"]
    if kind == "json_invalid":
        return ApiError(
            400,
            f"The body is not JSON: {first.get('ctx', {}).get('error', message)}.",
            code="invalid_json",
        )
    if not where and kind != "value_error":
        return ApiError(
            400,
            "The body has to be a JSON object, sent with 'Content-Type: application/json'.",
            code="invalid_json",
        )
    message = message.removeprefix("Value error, ")
    if not where:  # of our own checks: "field: what is wrong"
        return ApiError(400, message, message.partition(":")[0], "invalid_value")
    param = ".".join(where[:3] if where[0] == "messages" else where[:1])
    if kind == "extra_forbidden":
        param = where[-1]
        return ApiError(
            400,
            f"'{param}' is not supported by this server, or not with this value.",
            param,
            "unsupported_parameter",
        )
    code = "missing_required_parameter" if kind == "missing" else "invalid_value"
    return ApiError(400, f"'{param}': {message}.", param, code)


class _Run:
    """The rows of one request, and what the engine says about them as an asynchronous stream."""

    def __init__(self, service: Service, body, param: str, prompts: list[list[int]]):
        loop, self._news = asyncio.get_running_loop(), asyncio.Queue()
        self.rows: list[Row] = []
        for index in range(len(prompts) * body.n):
            ids = prompts[index // body.n]
            room = service.max_length - len(ids)
            if room < (body.limit or 1):
                wanted = f" and {body.limit} for the answer" if body.limit else ""
                raise ApiError(
                    400,
                    f"This server takes {service.max_length} tokens in all; the prompt has "
                    f"{len(ids)}{wanted}.",
                    param,
                    "context_length_exceeded",
                )

            def emit(piece: Piece, index: int = index) -> None:
                """Hand ``piece``, from the engine's thread, to the event loop."""
                loop.call_soon_threadsafe(self._news.put_nowait, (index, piece))

            self.rows.append(Row(ids, body.sampling(room, index % body.n), emit))
        most = min(service.max_batch, service.limits.max_queue)
        if len(self.rows) > most:
            raise ApiError(
                400,
                f"{len(self.rows)} texts in one request; the most is {most}.",
                "n",
                "invalid_value",
            )
        try:
            service.submit(self.rows, body.model)
        except UnknownModel:
            raise _unknown(body.model) from None
        except QueueFull as fault:
            raise ApiError(429, str(fault)) from None
        self.prompt_tokens = sum(map(len, prompts))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Index and news of each row, until all have finished; left early, the rows are
        cancelled."""
        left = len(self.rows)
        try:
            while left:
                index, piece = await self._news.get()
                left -= piece.finish is not None
                yield index, piece
        finally:
            for row in self.rows:
                row.cancelled = True

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts and, so far, of the answers."""
        return usage(self.prompt_tokens, sum(len(row.tokens) for row in self.rows))


async def _answer(
    service,
    request: Request,
    body,
    form: type,
    param: str,
    prompts: list[list[int]],
    echoes: list[str],
) -> Response:
    """All of it when ``body`` asks for no stream, else as it comes."""
    run, envelope = _Run(service, body, param, prompts), Envelope(form, body.model)
    if body.stream:
        return StreamingResponse(
            _events(run, body, envelope, echoes),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
        )
    whole, gone = (
        asyncio.ensure_future(_whole(run, body, envelope, echoes)),
        asyncio.ensure_future(_gone(request)),
    )
    try:
        await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
        return (
            JSONResponse(await whole) if whole.done() else Response(status_code=499)
        )  # nobody reads it
    finally:
        whole.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(run: _Run, body, envelope: Envelope, echoes: list[str]) -> dict:
    texts = [echoes[index // body.n] for index in range(len(run.rows))]
    tokens: list[list] = [[] for _ in texts]
    finish: list[str | None] = [None] * len(texts)
    async for index, piece in run.pieces():
        texts[index] += piece.text
        tokens[index] += piece.tokens
        finish[index] = piece.finish
    if "error" in finish:
        raise ApiError(503, "The server is stopping.", code="not_ready")
    with_logprobs = body.alternatives is not None
    choices = [
        envelope.form.choice(at, texts[at], tokens[at] if with_logprobs else None, finish[at])
        for at in range(len(texts))
    ]
    return envelope.whole(choices, run.usage())


async def _events(run: _Run, body, envelope: Envelope, echoes: list[str]) -> AsyncIterator[str]:
    """Server-sent events, the last of which is ``[DONE]``."""
    counted = bool(body.stream_options and body.stream_options.include_usage)
    more = {"usage": None} if counted else {}

    def event(data: dict) -> str:
        """``data`` as one server-sent event."""
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

    for index in range(len(run.rows)):
        echo = echoes[index // body.n]
        if envelope.form is Chat or echo:
            yield event(
                envelope.event([envelope.form.chunk(index, echo or None, None, None)], **more)
            )
    async for index, piece in run.pieces():
        if piece.finish == "error":
            yield event(error("The server is stopping.", "server_error", code="not_ready"))
            return
        tokens = piece.tokens if body.alternatives is not None else None
        yield event(
            envelope.event([envelope.form.chunk(index, piece.text, tokens, piece.finish)], **more)
        )
    if counted:
        yield event(envelope.event([], usage=run.usage()))
    yield "data: [DONE]\n\n"
