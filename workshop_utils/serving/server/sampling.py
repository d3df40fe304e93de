"""How one request chooses its tokens and where its text ends. Nothing here depends on the other
rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workshop_utils.inference.sampling import Sampling

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class RequestSampling(Sampling):
    """What a request asks for. ``logprobs`` is how many alternatives to report with each token;
    None: no log probabilities."""

    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """A generated token: its text, log probability (of the model's own distribution), alternatives,
    and where its text begins."""

    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...]
    offset: int


@dataclass
class Piece:
    """News of a sequence: more ``text``, the tokens it came from, and at the end ``finish``: stop,
    length or error."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None


def generator(seed: int | None) -> Generator:
    """The random numbers of one request. They are drawn on the CPU, so that a seed means the same
    beside a GPU."""
    import torch

    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % 2**63)
    return generator


def choose(logits: Tensor, sampling: Sampling, random: Generator) -> int:
    """The next token for ``logits`` ``[vocabulary]``, fp32 on the CPU: the likeliest where that is
    asked for, else one of the ``top_k`` likeliest and from the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probabilities reach ``top_p`` together
    (Holtzman et al. 2019).
    """
    import torch

    if sampling.greedy or sampling.temperature < 1e-5:  # as vLLM: dividing by less overflows
        return int(logits.argmax())
    probabilities = torch.softmax((logits - logits.max()) / sampling.temperature, dim=-1)
    if sampling.top_k:
        kept = probabilities.topk(min(sampling.top_k, len(probabilities)))
        probabilities = torch.zeros_like(probabilities).scatter(0, kept.indices, kept.values)
        probabilities /= probabilities.sum()
    if 0 < sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        outside = ordered.cumsum(0) - ordered >= sampling.top_p
        outside[0] = False
        probabilities[order[outside]] = 0
    return int(torch.multinomial(probabilities, 1, generator=random))


def described(
    logits: Tensor,
    token: int,
    sampling: RequestSampling,
    tokenizer: PreTrainedTokenizerBase,
    offset: int,
) -> Token:
    """``token`` with the log probabilities that the request asked for."""
    if sampling.logprobs is None:
        return Token("", None, (), offset)
    import torch

    values = torch.log_softmax(logits, dim=-1)
    best = values.topk(sampling.logprobs)
    top = tuple(
        (tokenizer.decode([id_]), value)
        for id_, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
    return Token(tokenizer.decode([token]), float(values[token]), top, offset)


class Text:
    """The text of the tokens so far, given out as soon as nothing that follows can change it.

    Everything is decoded anew at each token: the text is then that of
    :func:`workshop_utils.inference.generate.generate`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]):
        self._tokenizer, self._stop = tokenizer, stop
        # A stop string may be half there. The tokenizer's clean-up joins blanks with up to three
        # characters after them.
        clean_up = 3 if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0
        self._hold = max([clean_up, *(len(word) - 1 for word in stop)])
        self.text, self._given = "", 0

    def update(self, ids: list[int]) -> bool:
        """Decode ``ids``; True when a stop string is in the text, which then ends before it."""
        self.text = self._tokenizer.decode(ids, skip_special_tokens=True)
        places = [at for at in map(self.text.find, self._stop) if at >= 0]
        if places:
            self.text = self.text[: min(places)]
        return bool(places)

    def take(self, last: bool) -> str:
        """What can be given out now; with ``last``, all that is left."""
        whole = self.text if last else self.text.rstrip("\ufffd")  # the first bytes of a character
        end = len(whole) if last else max(self._given, len(whole) - self._hold)
        new, self._given = whole[self._given : end], max(self._given, end)
        return new
