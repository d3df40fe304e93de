"""Requests and answers of the OpenAI API (https://platform.openai.com/docs/api-reference). What is
not served is refused by name."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from workshop_utils.serving.server.sampling import Sampling, Token

_WITHOUT_EFFECT: dict[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "best_of": 1,
    "suffix": "",
    "response_format": {"type": "text"},
    "tools": [],
    "store": False,
    "modalities": ["text"],
    "service_tier": "auto",
    "name": "",
    "refusal": "",
}
"""Options that are not served, with the value that asks for nothing: it is let through, others are
refused."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None
            and not (name in _WITHOUT_EFFECT and value == _WITHOUT_EFFECT[name])
        }


def _encodable(text: str) -> str:
    if not text.isascii() and text != text.encode(errors="replace").decode():
        raise ValueError("the text has half a surrogate pair in it, which is no character")
    return text


_Text = Annotated[str, AfterValidator(_encodable)]


class TextPart(_Strict):
    """A part of a message; pictures and sound are not served."""

    type: Literal["text"]
    text: _Text


class Message(_Strict):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: _Text | list[TextPart]

    def as_turn(self) -> dict[str, str]:
        """As chat templates take it."""
        content = (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content)
        )
        return {"role": self.role, "content": content}


class StreamOptions(_Strict):
    """Whether the last event of a stream counts the tokens."""

    include_usage: bool = False


class _Request(_Strict):
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] = Field([], max_length=1000)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = ""

    @model_validator(mode="after")
    def _consistent(self):
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: only together with stream: true")
        if len(self.stops) > 4 or "" in self.stops or max(map(len, self.stops), default=0) > 1000:
            raise ValueError("stop: at most 4 strings of 1 to 1000 characters")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer, one or several alike."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, room: int, index: int) -> Sampling:
        """For choice ``index``, with at most ``room`` tokens. Each choice of a seeded request has a
        seed of its own."""
        seed = None if self.seed is None else self.seed + index
        return Sampling(
            self.limit or room, self.temperature, self.top_p, seed, self.stops, self.alternatives
        )


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _logprobs_asked(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only together with logprobs: true")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer; None: as many as there is room for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many other tokens are told with each token's log probability; None: no log
        probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


_Id = Annotated[int, Field(ge=0)]


class CompletionRequest(_Request):
    """``POST /v1/completions``. ``prompt`` is text, a list of texts, a list of token ids, or a list
    of such lists."""

    prompt: _Text | list[_Text] | list[_Id] | list[list[_Id]]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)

    @model_validator(mode="after")
    def _servable(self):
        if self.echo and self.logprobs is not None:
            raise ValueError(
                "echo: not together with logprobs; the prompt's log probabilities are not served"
            )
        if not self.prompt:
            raise ValueError("prompt: it is empty")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer: 16 where none are named, as in the OpenAI API."""
        return self.max_tokens or 16

    @property
    def alternatives(self) -> int | None:
        """As :attr:`ChatRequest.alternatives`."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """One a text to generate."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]


class Chat:
    """The shape of a chat's answers."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    @staticmethod
    def choice(index: int, text: str, tokens: list[Token] | None, finish: str | None) -> dict:
        """The whole answer ``index``. ``tokens`` None: without log probabilities."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": text},
            "logprobs": Chat.logprobs(tokens),
            "finish_reason": finish,
        }

    @staticmethod
    def chunk(index: int, text: str | None, tokens: list[Token] | None, finish: str | None) -> dict:
        """``text`` None: the first one, which names the role."""
        delta = (
            {"role": "assistant", "content": ""}
            if text is None
            else {"content": text}
            if text
            else {}
        )
        return {
            "index": index,
            "delta": delta,
            "logprobs": Chat.logprobs(tokens),
            "finish_reason": finish,
        }

    @staticmethod
    def logprobs(tokens: list[Token] | None) -> dict | None:
        """The log probability of each token, its alternatives and its bytes; None where none are
        asked for."""

        def one(text: str, logprob: float) -> dict:
            """A token. Half of a character has no bytes of its own."""
            return {
                "token": text,
                "logprob": logprob,
                "bytes": None if "\ufffd" in text else list(text.encode()),
            }

        if tokens is None:
            return None
        return {
            "content": [
                one(token.text, token.logprob)
                | {"top_logprobs": [one(*each) for each in token.top]}
                for token in tokens
            ],
            "refusal": None,
        }


class Completion:
    """The shape of a completion's answers."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl-"

    @staticmethod
    def choice(index: int, text: str, tokens: list[Token] | None, finish: str | None) -> dict:
        """The answer ``index``, whole or a part of it. ``tokens`` None: without log
        probabilities."""
        return {
            "index": index,
            "text": text,
            "logprobs": Completion.logprobs(tokens),
            "finish_reason": finish,
        }

    chunk = choice

    @staticmethod
    def logprobs(tokens: list[Token] | None) -> dict | None:
        """The tokens, their log probabilities, alternatives and places in the text, as four lists;
        None where none are asked for."""
        if tokens is None:
            return None
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [dict(token.top) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


class Envelope:
    """What all events of one answer share."""

    def __init__(self, form: type[Chat | Completion], model: str):
        self.form, self._common = (
            form,
            {"id": f"{form.prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": model},
        )

    def whole(self, choices: list[dict], usage: dict) -> dict:
        """The answer to a request without a stream."""
        return {**self._common, "object": self.form.kind, "choices": choices, "usage": usage}

    def event(self, choices: list[dict], **more: Any) -> dict:
        """One event of a stream; ``more`` holds the usage of the last one."""
        return {**self._common, "object": self.form.chunk_kind, "choices": choices, **more}


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Counts of tokens; a stop token counts, as in vLLM."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def error(
    message: str,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> dict:
    """The body of an answer that is none."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
