"""Ask a model that a server holds: any with the API of OpenAI, such as this workshop's or a NIM."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workshop_utils.core.chat_data import prompt_turns
from workshop_utils.core.errors import GenerationFailed
from workshop_utils.core.progress import progress_bar
from workshop_utils.core.terminal import one_line

if TYPE_CHECKING:
    from openai import OpenAI

URL, KEY = "WORKSHOP_SERVER_URL", "WORKSHOP_API_KEY"
"""Variables of the environment: where the server is, and the key that it wants (not needed by a NIM
of your own)."""


@dataclass(frozen=True)
class Timing:
    """A streamed answer: seconds from the request to its first and last token, new ``tokens``."""

    text: str
    first: float
    total: float
    tokens: int

    @property
    def rate(self) -> float:
        """Tokens a second after the first one."""
        return (self.tokens - 1) / (self.total - self.first) if self.tokens > 1 else 0.0


def connect(url: str | None = None, api_key: str | None = None) -> OpenAI:
    """A client of the server at ``url``, by default the environment's; it asks a busy one again."""
    from openai import DefaultHttpxClient, OpenAI

    url = (url or os.environ.get(URL) or "http://127.0.0.1:8000").rstrip("/").removesuffix("/v1")
    key = api_key or os.environ.get(KEY) or "none"
    http = DefaultHttpxClient(trust_env="127.0.0.1" not in url)
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=3, timeout=600, http_client=http)


def answers(
    client: OpenAI,
    model: str,
    conversations: Sequence[list[dict]],
    max_new_tokens: int = 64,
    concurrency: int = 16,
    progress: bool = True,
) -> list[str]:
    """The most probable answer to each conversation, as ``generate`` gives it, in the order given,
    ``concurrency`` requests at a time. GenerationFailed says what a server refuses."""

    def ask(turns: list[dict]) -> str:
        answer = client.chat.completions.create(
            model=model, messages=prompt_turns(turns), max_tokens=max_new_tokens, temperature=0
        )
        return answer.choices[0].message.content or ""

    with explained(client, model), ThreadPoolExecutor(concurrency) as pool:
        asked = pool.map(ask, conversations)
        return list(progress_bar(asked, progress, total=len(conversations), unit="row", desc=model))


def stream(client: OpenAI, model: str, turns: list[dict], max_new_tokens: int = 64) -> Timing:
    """Stream the most probable answer and measure it. Errors as :func:`answers`."""
    began, first, text, tokens = time.perf_counter(), 0.0, "", 0
    how = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    with explained(client, model):
        for event in client.chat.completions.create(
            model=model, messages=turns, max_tokens=max_new_tokens, **how
        ):
            piece = event.choices[0].delta.content if event.choices else None
            if piece:
                first = first or time.perf_counter() - began
                text += piece
            tokens = event.usage.completion_tokens if event.usage else tokens
    return Timing(text, first, time.perf_counter() - began, tokens)


@contextlib.contextmanager
def explained(client: OpenAI, model: str) -> Iterator[None]:
    """Errors of the client as :class:`GenerationFailed`, with what to do."""
    import openai

    where = str(client.base_url).rstrip("/")
    try:
        yield
    except openai.APIConnectionError as error:
        raise GenerationFailed(
            f"no answer from {where}: {error.__cause__ or error}. Is the server started? Its "
            "readiness: /v1/health/ready"
        ) from error
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise GenerationFailed(
            f"{where} refuses the key: {_said(error)} Give the server's key in {KEY}."
        ) from error
    except openai.NotFoundError as error:
        served = _served(client)
        raise GenerationFailed(
            f"{where} has no model {model!r}: {_said(error)} {served}"
        ) from error
    except openai.APIStatusError as error:
        raise GenerationFailed(f"{where} answered {error.status_code}: {_said(error)}") from error


def _served(client: OpenAI) -> str:
    import openai

    try:
        return f"It serves {', '.join(model.id for model in client.models.list())}."
    except openai.OpenAIError:
        return "Its address has to end in /v1."


def _said(error) -> str:
    """The server's own words; vLLM and NIM have sent them at two places."""
    body = error.body if isinstance(error.body, dict) else {}
    return one_line(str(body.get("message") or body.get("detail") or error.message))
