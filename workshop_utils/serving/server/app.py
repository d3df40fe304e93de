"""The routes: health as NIM has it, the rest as the OpenAI API has it. A request's words reach the
model, never a path."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
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
    503: "not_ready",
}
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_AGAIN = {"Retry-After": "1"}
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: _AGAIN, 503: _AGAIN}


class ApiError(Exception):
    """An answer with a status other than 200; ``body`` is what the OpenAI API sends."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        kind, code = _TYPES.get(status, "invalid_request_error"), code or _CODES.get(status)
        fields = {"message": message, "type": kind, "param": param, "code": code}
        self.status, self.body = status, {"error": fields}

    def response(self) -> Response:
        # Escaped: a name may hold what UTF-8 cannot.
        body, headers = json.dumps(self.body), _HEADERS.get(self.status)
        return Response(body, self.status, headers, "application/json")


def create_app(service: Service, api_key: str | None = None, max_body: int = 1 << 20) -> FastAPI:
    """The application around ``service``; ``max_body``: most bytes of a request."""
    app = FastAPI(
        docs_url=None, redoc_url=None, openapi_url=None, telemetry={"auto_configure": False}
    )
    app.add_middleware(_Guard, api_key=api_key, max_body=max_body)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, fault: ApiError) -> Response:
        return fault.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, fault: HTTPException) -> Response:
        said = f"{request.method} {request.url.path}: {fault.detail}"
        return ApiError(fault.status_code, said).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, fault: RequestValidationError) -> Response:
        return _invalid(fault).response()

    @app.get("/v1/health/live")
    async def live() -> dict:
        return {"object": "health.response", "message": "Service is live."}

    @app.get("/v1/health/ready")
    async def ready() -> dict:
        _require_ready(service)
        return {"object": "health.response", "message": "Service is ready."}

    @app.get("/v1/models")
    async def models() -> dict:
        _require_ready(service)
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        _require_ready(service)
        for served in service.models():
            if served["id"] == name:
                return served
        raise _unknown(name)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        _require_ready(service)
        turns = [message.as_turn() for message in body.messages]
        try:
            prompt = await run_in_threadpool(service.chat_prompt, turns)
        except ValueError as fault:
            raise ApiError(400, str(fault), "messages", "invalid_messages") from None
        return await _answer(_Run(service, body, "messages", [prompt], [""], Chat), request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        _require_ready(service)
        try:
            prompts = await run_in_threadpool(lambda: [*map(service.prompt, body.prompts())])
        except ValueError as fault:
            raise ApiError(400, str(fault), "prompt", "invalid_prompt") from None
        echoes = [service.text(ids) if body.echo else "" for ids in prompts]
        return await _answer(_Run(service, body, "prompt", prompts, echoes, Completion), request)

    return app


class _Guard:
    """Key and size of a request, first of all. (FastAPI's own limit answers with plain text.)"""

    def __init__(self, app, api_key: str | None, max_body: int):
        self._app, self._key, self._max = app, api_key, max_body

    async def __call__(self, scope, receive, send) -> None:
        left = self._max

        async def counted():
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"the request is larger than {self._max} bytes")
            return message

        app = self._app
        if scope["type"] == "http" and scope["path"] not in _HEALTH and self._key:
            header = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, given = header.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given, self._key.encode()):
                said = "The API key is missing or wrong: send 'Authorization: Bearer KEY'."
                app = ApiError(401, said).response()
        await app(scope, counted, send)


def _require_ready(service: Service) -> None:
    if not service.ready:
        raise ApiError(
            503, "The model is being loaded, or the server is stopping. Ask /v1/health/ready."
        )


def _unknown(name: str) -> ApiError:
    said = f"The model '{name}' does not exist here; /v1/models lists those that do."
    return ApiError(404, said, "model", "model_not_found")


def _invalid(fault: RequestValidationError) -> ApiError:
    """The first of pydantic's findings, with the field in ``param``."""
    first = fault.errors()[0]
    kind, where = first["type"], [str(part) for part in first["loc"][1:]]
    message = first["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        said = f"The body is not JSON: {first.get('ctx', {}).get('error', message)}."
        return ApiError(400, said, code="invalid_json")
    if not where and kind != "value_error":
        said = "The body has to be a JSON object, sent with 'Content-Type: application/json'."
        return ApiError(400, said, code="invalid_json")
    if not where:  # of our own checks: "field: what is wrong"
        return ApiError(400, message, message.partition(":")[0], "invalid_value")
    if kind == "extra_forbidden":
        param = where[-1]
        said = f"'{param}' is not supported by this server, or not with this value."
        return ApiError(400, said, param, "unsupported_parameter")
    param = ".".join(where[:3] if where[0] == "messages" else where[:1])
    code = "missing_required_parameter" if kind == "missing" else "invalid_value"
    return ApiError(400, f"'{param}': {message}.", param, code)


class _Run:
    """The rows of one request, and what the engine says about them as an asynchronous stream."""

    def __init__(
        self,
        service: Service,
        body: ChatRequest | CompletionRequest,
        param: str,
        prompts: list[list[int]],
        echoes: list[str],
        form: type[Chat | Completion],
    ):
        loop, self._news = asyncio.get_running_loop(), asyncio.Queue()
        self.body, self.form = body, form
        self.common = {"id": f"{form.prefix}{uuid.uuid4().hex}", "created": int(time.time())}
        self.common["model"] = body.model
        self.echoes = [echo for echo in echoes for _ in range(body.n)]
        self.rows: list[Row] = []
        for index in range(len(prompts) * body.n):
            ids = prompts[index // body.n]
            room = service.max_length - len(ids)
            if room < (body.limit or 1):
                more = f" and {body.limit} for the answer" if body.limit else ""
                said = f"This server takes {service.max_length} tokens in all; the prompt has "
                raise ApiError(400, f"{said}{len(ids)}{more}.", param, "context_length_exceeded")

            def emit(piece: Piece, index: int = index) -> None:  # in the engine's thread
                loop.call_soon_threadsafe(self._news.put_nowait, (index, piece))

            self.rows.append(Row(ids, body.sampling(room, index % body.n), emit))
        most = min(service.max_batch, service.limits.max_queue)
        if len(self.rows) > most:
            said = f"{len(self.rows)} texts in one request; the most is {most}."
            raise ApiError(400, said, "n", "invalid_value")
        try:
            service.submit(self.rows, body.model)
        except UnknownModel:
            raise _unknown(body.model) from None
        except QueueFull as fault:
            raise ApiError(429, str(fault)) from None
        self.prompt_tokens = sum(map(len, prompts))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Index and news of each row, until all have finished; left early, they are cancelled."""
        left = len(self.rows)
        try:
            while left:
                index, piece = await self._news.get()
                left -= piece.finish is not None
                if piece.finish == "error":
                    raise ApiError(503, "The server is stopping.")
                if self.body.alternatives is None:
                    piece.tokens = None
                yield index, piece
        finally:
            for row in self.rows:
                row.cancelled = True

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts and, so far, of the answers; a stop token counts, as in vLLM."""
        prompt, answer = self.prompt_tokens, sum(len(row.tokens) for row in self.rows)
        counts = {"prompt_tokens": prompt, "completion_tokens": answer}
        return counts | {"total_tokens": prompt + answer}

    async def whole(self) -> dict:
        """The answer to a request without a stream."""
        texts, finish = list(self.echoes), [None] * len(self.rows)
        tokens = [None if self.body.alternatives is None else [] for _ in self.rows]
        async for index, piece in self.pieces():
            texts[index] += piece.text
            if piece.tokens:
                tokens[index] += piece.tokens
            finish[index] = piece.finish
        rows = zip(range(len(texts)), texts, tokens, finish, strict=True)
        choices = [self.form.choice(*row) for row in rows]
        more = {"object": self.form.kind, "choices": choices, "usage": self.usage()}
        return self.common | more

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events, the last of which is ``[DONE]``."""
        counted = self.body.stream_options and self.body.stream_options.include_usage
        common = self.common | {"object": self.form.chunk_kind}

        def event(data: dict) -> str:
            return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

        def chunk(*words) -> str:
            usage = {"usage": None} if counted else {}
            return event(common | {"choices": [self.form.chunk(*words)]} | usage)

        for index, echo in enumerate(self.echoes):
            if self.form is Chat or echo:
                yield chunk(index, echo or None, None, None)
        try:
            async for index, piece in self.pieces():
                yield chunk(index, piece.text, piece.tokens, piece.finish)
        except ApiError as fault:
            yield event(fault.body)
            return
        if counted:
            yield event(common | {"choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"


async def _answer(run: _Run, request: Request) -> Response:
    """All of it when no stream is asked for, else as it comes."""
    if run.body.stream:
        form, headers = "text/event-stream", {"Cache-Control": "no-cache"}
        return StreamingResponse(run.events(), media_type=form, headers=headers)

    async def client_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    whole, gone = asyncio.ensure_future(run.whole()), asyncio.ensure_future(client_gone())
    try:
        await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
        # Nobody reads the answer to a client that has gone.
        return JSONResponse(await whole) if whole.done() else Response(status_code=499)
    finally:
        whole.cancel()
        gone.cancel()
