"""Answers of a NeMo 2.0 checkpoint by Megatron-Core's inference engines, on a GPU or a CPU.

The static engine takes batches of requests that all wait for the longest. In the dynamic one
requests join and leave between steps; their keys and values lie in blocks of one buffer. Greedy
answers are the same token for token. A prompt that never fits is refused with a sentence: the
dynamic engine alone would keep it in its queue for ever, the static one would fail with its whole
batch.

:class:`Model` loads in this process, and NeMo cannot be got rid of again:
:mod:`workshop_utils.training.recipe.predict` starts this module as a process of its own. Torch and
NeMo are imported by what needs them.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.checkpoints.formats import nemo2, safe_text
from workshop_utils.checkpoints.formats.architecture import section
from workshop_utils.checkpoints.formats.nemo2 import contents_of
from workshop_utils.checkpoints.formats.summary import Kind
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.core.errors import DamagedCheckpoint, GenerationFailed, WorkshopError
from workshop_utils.core.paths import shown
from workshop_utils.runtime import nemo_cpu
from workshop_utils.runtime.device import choose_device

if TYPE_CHECKING:
    pass

ENGINES = ("dynamic", "static")
_ADAPTER_FILE = "weights/adapter_metadata.json"
# of the buffer, for requests that go on whatever joins; Megatron-Core rounds it up to four requests
_GUARANTEED = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the options of the recipe path by their names. ``temperature`` 0 and
    ``top_k`` 1 take the likeliest token."""

    temperature: float = 0.1
    top_k: int = 0
    top_p: float = 0.95
    num_tokens_to_generate: int = 512
    random_seed: int = 42

    def __post_init__(self) -> None:
        if self.top_k > 1 and self.top_p > 0 and self.temperature > 0:
            raise WorkshopError(
                f"top_k is {self.top_k} and top_p {self.top_p}: Megatron-Core takes one of them. "
                "Set the other to 0."
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0 or self.top_k == 1

    def parameters(self):
        """Megatron-Core's own object."""
        from megatron.core.inference.sampling_params import SamplingParams

        drawn = (
            {"top_k": 1}
            if self.greedy
            else {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        )
        return SamplingParams(num_tokens_to_generate=self.num_tokens_to_generate, **drawn)


@dataclass(frozen=True)
class Limits:
    """What the engines may hold; the options of the recipe path by their names. Only
    ``max_batch_size`` and ``inference_max_seq_length`` concern the static engine. The buffer is
    never made larger than ``max_batch_size`` requests of full length can fill."""

    max_batch_size: int = 16
    block_size_tokens: int = 256
    buffer_size_gb: float = 20.0
    max_tokens: int = 65536
    inference_max_seq_length: int = 8192


@dataclass(frozen=True)
class Answer:
    """What came of a request: its new ``tokens`` without the stop token, as ``text``; or why it was
    ``refused``."""

    request: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    refused: str | None = None


class Model:
    """A NeMo 2.0 checkpoint, an adapter with its base or a full model, loaded in this process: fp32
    on a CPU, bf16 on a GPU.

    Raises:
        CheckpointError: the checkpoint, or the base of an adapter, is missing, unsafe or damaged.
            NeMo has not seen it then.
    """

    def __init__(self, checkpoint: Path | str, trust: bool = False, base: Path | str | None = None):
        """``base`` takes the place of the one that an adapter names."""
        checkpoint = nemo2.locate(Path(checkpoint)).resolve()
        require_sound(checkpoint, trust, (Kind.NEMO2, Kind.NEMO2_ADAPTER))
        if base := Path(base) if base else base_of(checkpoint):
            require_sound(base, trust, (Kind.NEMO2,))
        nemo_cpu.apply()
        import torch
        from nemo import lightning as nl
        from nemo.collections.llm.inference.base import setup_model_and_tokenizer

        device = choose_device()
        self.dtype = torch.float32 if device.kind == "cpu" else torch.bfloat16
        strategy = nl.MegatronStrategy(
            process_group_backend="gloo" if device.kind == "cpu" else "nccl", setup_optimizers=False
        )
        trainer = nl.Trainer(
            accelerator=device.kind,
            devices=1,
            num_nodes=1,
            strategy=strategy,
            logger=False,
            enable_checkpointing=False,
        )
        with _naming(checkpoint, base) as checkpoint:
            self.wrapper, self.tokenizer = setup_model_and_tokenizer(
                checkpoint, trainer, params_dtype=self.dtype
            )
        self.tokenizer.detokenize = _text_of_known(self.tokenizer)
        self.core = self.wrapper.model.to(self.dtype).eval()
        self.config = self.core.config

    def tokens(self, prompt: str) -> list[int]:
        """Token ids of ``prompt``, as the training had them: no token before it."""
        return list(self.tokenizer.tokenize(prompt))

    def logits(self, token_ids: Sequence[Sequence[int]]):
        """fp32 logits of token ids ``[batch, sequence]`` without padding, as a numpy array
        ``[batch, sequence, vocabulary]``."""
        import torch

        ids = torch.tensor(token_ids, device=next(self.core.parameters()).device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        with torch.inference_mode():
            # Without a mask Megatron-Core's attention is causal.
            return self.core(ids, positions, None).float().cpu().numpy()

    def answer(self, request: int, tokens: Sequence[int]) -> Answer:
        """An :class:`Answer` of generated ``tokens``, which end at the first stop token."""
        tokens = [int(token) for token in tokens]
        tokens = (
            tokens[: tokens.index(self.tokenizer.eod)] if self.tokenizer.eod in tokens else tokens
        )
        return Answer(
            request, self.tokenizer.detokenize(tokens, remove_special_tokens=True), tuple(tokens)
        )


def base_of(checkpoint: Path, moved_to: Path | None = None) -> Path | None:
    """The base that the adapter ``checkpoint`` was trained on; None for a full model.

    Where it is no longer at the place that the adapter names, ``moved_to`` is taken if the record
    of the run says that it is the same.

    Raises:
        DamagedCheckpoint: the base is at neither place.
    """
    file = checkpoint / _ADAPTER_FILE
    if not file.is_file():
        return None
    base = safe_text.read_json(file).get("model_ckpt_path")
    if not isinstance(base, str) or not nemo2.looks_like(Path(base)):
        if moved_to and _trained_on(checkpoint, moved_to):
            return moved_to
        raise DamagedCheckpoint(
            f"{shown(file)}: model_ckpt_path is {base!r}, which holds no NeMo 2.0 checkpoint. "
            "Put the base back there, or write the path of its present place into that file."
        )
    return Path(base)


def _trained_on(checkpoint: Path, base: Path) -> bool:
    """Whether the run of ``checkpoint`` recorded ``base``, by its contents."""
    record = checkpoint.resolve().parents[1] / "workshop" / "run.json"
    if not nemo2.looks_like(base) or not record.is_file():
        return False
    return section(safe_text.read_json(record), "fingerprint").get("base") == contents_of(base)


@contextlib.contextmanager
def _naming(checkpoint: Path, base: Path | None) -> Iterator[Path]:
    """``checkpoint``; for an adapter that names another base, a view of it that names ``base``,
    since NeMo goes by that alone."""
    file = checkpoint / _ADAPTER_FILE
    if base is None or (described := safe_text.read_json(file)).get("model_ckpt_path") == str(base):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="workshop-adapter-") as folder:
        view = Path(folder) / checkpoint.name
        (view / "weights").mkdir(parents=True)
        (view / "context").symlink_to(checkpoint / "context", target_is_directory=True)
        for part in (checkpoint / "weights").iterdir():
            if part.name != file.name:
                (view / "weights" / part.name).symlink_to(part)
        (view / _ADAPTER_FILE).write_text(
            json.dumps(described | {"model_ckpt_path": str(base)}), encoding="utf-8"
        )
        yield view


def _text_of_known(tokenizer: Any) -> Callable[..., str]:
    """``tokenizer.detokenize`` that leaves out ids which the model has and the tokenizer lacks: one
    of them would end the whole run with a TypeError. Rows of the embedding that only pad it are
    drawn now and then when the temperature is high."""
    original, known = tokenizer.detokenize, tokenizer.tokenizer.vocab_size

    def detokenize(tokens: Sequence[int], remove_special_tokens: bool = False) -> str:
        """The text of ``tokens``."""
        return original([token for token in tokens if token < known], remove_special_tokens)

    return detokenize


class Dynamic:
    """The dynamic engine: :meth:`add` at any time, :meth:`step` while :attr:`busy`.

    Raises:
        WorkshopError: ``buffer_size_gb`` is too small for a single request of
            ``inference_max_seq_length``.
    """

    def __init__(self, model: Model, sampling: Sampling, limits: Limits):
        import torch
        from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
        from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
            GPTInferenceWrapper,
        )
        from megatron.core.inference.text_generation_controllers.simple_text_generation_controller import (  # noqa: E501
            SimpleTextGenerationController,
        )

        self.model, self.sampling, self.limits = model, sampling, limits
        self.context = self._context()
        wrapper = GPTInferenceWrapper(
            model.core, model.wrapper.inference_wrapper_config, self.context
        )
        wrapper.model_is_pipeline_parallel = False  # else only set by the static engine
        controller = SimpleTextGenerationController(wrapper, model.tokenizer)
        self.engine = DynamicInferenceEngine(
            controller,
            self.context,
            termination_id=model.tokenizer.eod,
            enable_cuda_graph=False,
            random_seed=sampling.random_seed,
        )
        self.parameters = sampling.parameters()
        torch.manual_seed(sampling.random_seed)  # the engine only keeps it

    @property
    def busy(self) -> bool:
        """Whether a request runs or waits."""
        return self.engine.has_unfinished_requests()

    @property
    def running(self) -> int:
        """How many requests the next step moves on, those that wait not counted."""
        return self.context.total_request_count

    def add(self, request: int, tokens: Sequence[int]) -> Answer | None:
        """Let a request join; it waits in the engine while others have the place. The answer at
        once if it is refused, else None."""
        if reason := self._never_fits(len(tokens)):
            return Answer(request, refused=reason)
        self.engine.add_request(request, list(tokens), self.sampling.num_tokens_to_generate)
        return None

    def step(self) -> list[Answer]:
        """One token for every running request; returns those that have finished."""
        if not self.running:
            raise GenerationFailed(
                f"{len(self.engine.waiting_request_ids)} requests wait and none runs: the engine "
                "would wait for ever."
            )
        finished, _ = self.engine.step(self.parameters)
        return [
            self.model.answer(request.request_id, request.generated_tokens) for request in finished
        ]

    def _context(self):
        from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext

        config, limits = self.model.config, self.limits
        blocks = math.ceil(limits.inference_max_seq_length / limits.block_size_tokens)
        requests = DynamicInferenceContext.round_up_requests(limits.max_batch_size)
        rounder = DynamicInferenceContext.REQUEST_ROUNDER
        # Grouped-query attention keeps as many heads as there are groups. One more block is the
        # engine's dummy.
        block_bytes = (
            2
            * self.model.dtype.itemsize
            * config.num_layers
            * limits.block_size_tokens
            * config.num_query_groups
            * config.kv_channels
        )
        needed, least = ((count + rounder) * blocks + 1 for count in (requests, 1))
        available = int(limits.buffer_size_gb * 1024**3 / block_bytes)
        if available < least:
            raise WorkshopError(
                f"buffer_size_gb is {limits.buffer_size_gb:g}, room for {available} blocks of "
                f"{limits.block_size_tokens} tokens; with inference_max_seq_length "
                f"{limits.inference_max_seq_length} there have to be {least}. Raise it to "
                f"{math.ceil(100 * least * block_bytes / 1024**3) / 100:g}, or lower "
                "inference_max_seq_length."
            )
        return DynamicInferenceContext(
            params_dtype=self.model.dtype,
            num_layers=config.num_layers,
            kv_channels=config.kv_channels,
            num_attention_heads=config.num_query_groups,
            max_sequence_length=limits.inference_max_seq_length,
            buffer_size_gb=(min(needed, available) + 0.5) * block_bytes / 1024**3,
            buffer_guaranteed_fraction=_GUARANTEED,
            chunk_size_tokens=limits.block_size_tokens,
            max_requests_override=limits.max_batch_size,
            max_tokens_override=limits.max_tokens,
        )

    def _never_fits(self, prompt: int) -> str | None:
        """Why a prompt of so many tokens would find no place even if nothing else ran."""
        if reason := too_long(prompt, self.sampling, self.limits):
            return reason
        if prompt > self.context.max_tokens:
            return (
                f"the prompt has {prompt} tokens, and a step takes {self.context.max_tokens} "
                "(max_tokens)."
            )
        allocator = self.context.chunk_allocator
        if (
            not 0
            < math.ceil(prompt / self.limits.block_size_tokens)
            <= allocator.chunk_count_total - 1 - allocator.gtd_chunk_count
        ):
            return (
                f"the prompt has {prompt} tokens, more than the buffer holds (buffer_size_gb "
                f"{self.limits.buffer_size_gb:g})."
            )
        return None


def too_long(prompt: int, sampling: Sampling, limits: Limits) -> str | None:
    """Why a prompt of so many tokens cannot be answered by either engine; None if it can."""
    if not prompt:
        return "the prompt is empty."
    if prompt + sampling.num_tokens_to_generate > limits.inference_max_seq_length:
        return (
            f"the prompt has {prompt} tokens and {sampling.num_tokens_to_generate} are to be "
            "generated (num_tokens_to_generate), together more than "
            f"{limits.inference_max_seq_length} (inference_max_seq_length)."
        )
    return None


def dynamic(
    model: Model, prompts: Sequence[str], sampling: Sampling, limits: Limits
) -> Iterator[Answer]:
    """Answers as they finish, not in the order of ``prompts``; ``request`` is the index there."""
    tokens = [model.tokens(prompt) for prompt in prompts]
    engine = Dynamic(model, sampling, _narrowed(tokens, sampling, limits))
    for request, ids in enumerate(tokens):
        # Told of the given limits, not of the narrowed ones.
        reason = too_long(len(ids), sampling, limits)
        if refused := Answer(request, refused=reason) if reason else engine.add(request, ids):
            yield refused
    while engine.busy:
        yield from engine.step()


def static(
    model: Model, prompts: Sequence[str], sampling: Sampling, limits: Limits
) -> Iterator[Answer]:
    """Answers batch by batch: ``max_batch_size`` at a time, of similar length, so that few of them
    wait for others."""
    import torch
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines.static_engine import StaticInferenceEngine
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    torch.manual_seed(sampling.random_seed)
    tokens = [model.tokens(prompt) for prompt in prompts]
    reasons = [too_long(len(ids), sampling, limits) for ids in tokens]
    yield from (Answer(request, refused=reason) for request, reason in enumerate(reasons) if reason)
    fitting = sorted(
        (request for request, reason in enumerate(reasons) if not reason),
        key=lambda request: len(tokens[request]),
    )
    narrowed = _narrowed(tokens, sampling, limits)
    model.wrapper.inference_wrapper_config.inference_max_requests = narrowed.max_batch_size
    model.wrapper.inference_wrapper_config.inference_max_seq_length = (
        narrowed.inference_max_seq_length
    )
    for begin in range(0, len(fitting), narrowed.max_batch_size):
        batch = fitting[begin : begin + narrowed.max_batch_size]
        # Its buffers are as large as the first batch that it sees.
        model.wrapper.inference_context = StaticInferenceContext(
            len(batch), narrowed.inference_max_seq_length
        )
        engine = StaticInferenceEngine(
            TextGenerationController(model.wrapper, model.tokenizer),
            narrowed.max_batch_size,
            sampling.random_seed,
        )
        found = engine.generate(
            [prompts[request] for request in batch], sampling_params=sampling.parameters()
        )
        yield from (
            model.answer(request, one.generated_tokens.tolist())
            for request, one in zip(batch, found, strict=True)
        )


def _narrowed(tokens: Sequence[Sequence[int]], sampling: Sampling, limits: Limits) -> Limits:
    """``limits`` no wider than these prompts can use: the caches are made in full before the first
    token."""
    fitting = [len(ids) for ids in tokens if not too_long(len(ids), sampling, limits)]
    length = max(fitting, default=1) + sampling.num_tokens_to_generate
    return replace(
        limits,
        max_batch_size=max(1, min(limits.max_batch_size, len(fitting))),
        inference_max_seq_length=length,
    )


def _work(folder: Path) -> None:
    """The process that predict and deliver start on ``job.json``: logits of ``token_ids``, or
    answers to ``rows``."""
    job: dict[str, Any] = json.loads((folder / "job.json").read_text("utf-8"))
    model = Model(job["checkpoint"], job["trust"], job["base"])
    if "token_ids" in job:
        import numpy

        numpy.save(folder / "logits.npy", model.logits(job["token_ids"]))
    else:
        _answer(model, job, folder / "speed.json")


def _answer(model: Model, job: dict[str, Any], speed: Path) -> None:
    """Append one answer a line to the file that the job names; say how fast it was."""
    run = {"dynamic": dynamic, "static": static}[job["engine"]]
    rows, began, made = job["rows"], time.perf_counter(), 0
    with Path(job["answers"]).open("a", encoding="utf-8") as stream:
        for answer in run(
            model,
            [row["prompt"] for row in rows],
            Sampling(**job["sampling"]),
            Limits(**job["limits"]),
        ):
            made += len(answer.tokens)
            stream.write(
                json.dumps(asdict(answer) | {"request": rows[answer.request]["row"]}) + "\n"
            )
            stream.flush()
    speed.write_text(json.dumps({"tokens": made, "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
