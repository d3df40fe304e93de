"""Requests and answers of the OpenAI API (https://platform.openai.com/docs/api-reference). What is
not served is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from workshop_utils.serving.server.sampling import RequestSampling, Token

_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    # the OpenAI API's
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # without tools, which are refused
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "metadata": ({},),
    "store": (False,),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
    "reasoning_effort": ("none",),
    "include_obfuscation": (False,),
    # of messages, as clients send answers back
    "name": ("",),
    "refusal": ("",),
    "tool_calls": ([],),
    "annotations": ([],),
    "reasoning_content": ("",),
    # vLLM's, NIM's and Text Generation Inference's
    "top_k": (-1, 0),
    "min_p": (0,),
    "typical_p": (1,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "continuous_usage_stats": (False,),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "priority": (0,),
    "nvext": ({},),
}
"""Options that are not served, with the values that ask for nothing: these are let through, others
are refused."""


def _asks_for_nothing(name: str, value: Any) -> bool:
    return value is None or any(
        value == nothing and isinstance(value, bool) == isinstance(nothing, bool)
        for nothing in _WITHOUT_EFFECT.get(name, ())
    )


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if not _asks_for_nothing(name, value)}


def _encodable(text: str) -> str:
    if not text.isascii() and text != text.encode(errors="replace").decode():
        raise ValueError("the text has half a surrogate pair in it, which is no character")
    return text


_Text = Annotated[str, AfterValidator(_encodable)]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
_Stops = Annotated[
    list[_Stop],
    Field(max_length=4),
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
]
_Count = Annotated[int, Field(ge=1)]
_Id = Annotated[int, Field(ge=0)]


class TextPart(_Strict):
    """A part of a message; pictures and sound are not served."""

    type: Literal["text"]
    text: _Text


class Message(_Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | list[TextPart]

    def as_turn(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        # OpenAI's newer name; chat templates know the older one.
        return {"role": self.role.replace("developer", "system"), "content": text}


class StreamOptions(_Strict):
    """Whether the last event of a stream counts the tokens."""

    include_usage: bool = False


class _Request(_Strict):
    model: str
    max_tokens: _Count | None = None
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: _Stops = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Labels for whoever serves: no answer depends on them.
    user: str = ""
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    prompt_cache_retention: str = ""

    @model_validator(mode="after")
    def _consistent(self):
        if self.stream_options and self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options: only together with stream: true")
        return self

    def sampling(self, room: int, index: int) -> RequestSampling:
        """For choice ``index``, which has a seed of its own, with at most ``room`` tokens."""
        seed = None if self.seed is None else self.seed + index
        most, stop = self.limit or room, tuple(self.stop)
        return RequestSampling(
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=most,
            seed=seed,
            stop=stop,
            logprobs=self.alternatives,
        )


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: _Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _logprobs_asked(self):
        if self.top_logprobs and not self.logprobs:
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


class CompletionRequest(_Request):
    """``POST /v1/completions``; ``prompt``: a text, its token ids, or a list of either."""

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
    def limit(self) -> int:
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


def _choice(index: int, finish: str | None, logprobs: dict | None, **content: Any) -> dict:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}


class Chat:
    """The shape of a chat's answers. ``tokens`` None: without log probabilities."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    @staticmethod
    def choice(index: int, text: str, tokens: list[Token] | None, finish: str | None) -> dict:
        """The whole answer ``index``."""
        message = {"role": "assistant", "content": text}
        return _choice(index, finish, Chat.logprobs(tokens), message=message)

    @staticmethod
    def chunk(index: int, text: str | None, tokens: list[Token] | None, finish: str | None) -> dict:
        """``text`` None: the first one, which names the role."""
        first = {"role": "assistant", "content": ""}
        delta = first if text is None else {"content": text} if text else {}
        return _choice(index, finish, Chat.logprobs(tokens), delta=delta)

    @staticmethod
    def logprobs(tokens: list[Token] | None) -> dict | None:
        """The log probability of each token, its alternatives and its bytes."""

        def entry(text: str, logprob: float) -> dict:
            # Half of a character has no bytes of its own.
            code = None if "\ufffd" in text else list(text.encode())
            return {"token": text, "logprob": logprob, "bytes": code}

        if tokens is None:
            return None
        return {
            "content": [
                entry(token.text, token.logprob)
                | {"top_logprobs": [entry(*each) for each in token.top]}
                for token in tokens
            ],
            "refusal": None,
        }


class Completion:
    """The shape of a completion's answers, as :class:`Chat`."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl-"

    @staticmethod
    def choice(index: int, text: str, tokens: list[Token] | None, finish: str | None) -> dict:
        """The answer ``index``, whole or a part of it; log probabilities as four lists."""
        logprobs = (
            tokens
            if tokens is None
            else {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [dict(token.top) for token in tokens],
                "text_offset": [token.offset for token in tokens],
            }
        )
        return _choice(index, finish, logprobs, text=text)

    chunk = choice
