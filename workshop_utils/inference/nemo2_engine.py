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
from typing import Any

from workshop_utils.checkpoints.formats import nemo2, safe_text
from workshop_utils.checkpoints.formats.architecture import section
from workshop_utils.checkpoints.formats.summary import Kind
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.core.errors import DamagedCheckpoint, GenerationFailed, WorkshopError
from workshop_utils.core.paths import shown
from workshop_utils.inference.sampling import Sampling
from workshop_utils.runtime import nemo_cpu
from workshop_utils.runtime.device import choose_device

ENGINES = ("dynamic", "static")
_ADAPTER_FILE = "weights/adapter_metadata.json"
# of the buffer, for requests that go on whatever joins; Megatron-Core rounds it up to four requests
_GUARANTEED = 1e-6


@dataclass(frozen=True)
class EngineLimits:
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

    def __init__(
        self,
        checkpoint: Path | str,
        trust: bool = False,
        base: Path | str | None = None,
        device: str | None = None,
    ):
        """``base`` takes the place of the one that an adapter names. ``device``: cpu or gpu; by
        default what the machine has."""
        checkpoint = nemo2.locate(Path(checkpoint)).resolve()
        require_sound(checkpoint, trust, (Kind.NEMO2, Kind.NEMO2_ADAPTER))
        if base := Path(base) if base else base_of(checkpoint):
            require_sound(base, trust, (Kind.NEMO2,))
        nemo_cpu.apply(device)
        import torch
        from nemo import lightning as nl
        from nemo.collections.llm.inference.base import setup_model_and_tokenizer

        device = device or choose_device().kind
        cpu = device == "cpu"
        self.dtype, backend = (torch.float32, "gloo") if cpu else (torch.bfloat16, "nccl")
        strategy = nl.MegatronStrategy(process_group_backend=backend, setup_optimizers=False)
        off = {"logger": False, "enable_checkpointing": False}
        trainer = nl.Trainer(accelerator=device, devices=1, num_nodes=1, strategy=strategy, **off)
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

    def answer(self, request: int, tokens: Sequence[int]) -> Answer:
        """An :class:`Answer` of generated ``tokens``, which end at the first stop token."""
        tokens, stop = [int(token) for token in tokens], self.tokenizer.eod
        tokens = tokens[: tokens.index(stop)] if stop in tokens else tokens
        text = self.tokenizer.detokenize(tokens, remove_special_tokens=True)
        return Answer(request, text, tuple(tokens))


def megatron_logits(model: Any, token_ids: Sequence[Sequence[int]]):
    """fp32 logits, a numpy array ``[batch, sequence, vocabulary]``, of token ids ``[batch,
    sequence]`` without padding, by a GPT model of Megatron-Core."""
    import torch

    ids = torch.tensor(token_ids, device=next(model.parameters()).device)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    with torch.inference_mode():
        # Without a mask Megatron-Core's attention is causal.
        return model(ids, positions, None).float().cpu().numpy()


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
    if isinstance(base, str) and nemo2.looks_like(Path(base)):
        return Path(base)
    if moved_to and _trained_on(checkpoint, moved_to):
        return moved_to
    raise DamagedCheckpoint(
        f"{shown(file)}: model_ckpt_path is {base!r}, which holds no NeMo 2.0 checkpoint. Put the "
        "base back there, or write the path of its present place into that file."
    )


def _trained_on(checkpoint: Path, base: Path) -> bool:
    """Whether the run of ``checkpoint`` recorded ``base``, by its contents."""
    record = checkpoint.resolve().parents[1] / "workshop" / "run.json"
    if not nemo2.looks_like(base) or not record.is_file():
        return False
    recorded = section(safe_text.read_json(record), "fingerprint").get("base")
    return recorded == nemo2.contents_of(base)


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
        renamed = json.dumps(described | {"model_ckpt_path": str(base)})
        (view / _ADAPTER_FILE).write_text(renamed, encoding="utf-8")
        yield view


def _text_of_known(tokenizer: Any) -> Callable[..., str]:
    """``tokenizer.detokenize`` that leaves out ids which the model has and the tokenizer lacks: one
    of them would end the whole run with a TypeError. Rows of the embedding that only pad it are
    drawn now and then when the temperature is high."""
    original, known = tokenizer.detokenize, tokenizer.tokenizer.vocab_size

    def detokenize(tokens: Sequence[int], remove_special_tokens: bool = False) -> str:
        return original([token for token in tokens if token < known], remove_special_tokens)

    return detokenize


def check(sampling: Sampling, limits: EngineLimits) -> None:
    """Raise WorkshopError where no prompt could be answered, or the engines cannot draw so."""
    _drawn(sampling)
    if sampling.max_new_tokens >= limits.inference_max_seq_length:
        raise WorkshopError(
            f"num_tokens_to_generate is {sampling.max_new_tokens} and inference_max_seq_length, "
            f"which counts the prompt, too, {limits.inference_max_seq_length}: no prompt would "
            "fit. Lower the first, or raise the second."
        )


def _drawn(sampling: Sampling) -> dict[str, Any]:
    """How tokens are drawn, as Megatron-Core's SamplingParams takes it."""
    if sampling.greedy:
        return {"top_k": 1}
    top_k, top_p = sampling.top_k, sampling.top_p if sampling.top_p < 1 else 0
    if top_k and top_p:
        raise WorkshopError(
            f"top_k is {top_k} and top_p {top_p}: Megatron-Core takes one of them. Set the other "
            "to 0."
        )
    return {"temperature": sampling.temperature, "top_k": top_k, "top_p": float(top_p)}


def _start(sampling: Sampling) -> tuple[Any, int]:
    """Megatron-Core's parameters, and the seed, which the engines only keep: it is set here."""
    import torch
    from megatron.core.inference.sampling_params import SamplingParams

    seed = torch.seed() if sampling.seed is None else sampling.seed
    torch.manual_seed(seed)
    count = sampling.max_new_tokens
    return SamplingParams(num_tokens_to_generate=count, **_drawn(sampling)), seed


class Dynamic:
    """The dynamic engine: :meth:`add` at any time, :meth:`step` while :attr:`busy`.

    Raises:
        WorkshopError: ``buffer_size_gb`` is too small for a single request of
            ``inference_max_seq_length``, or both ``top_k`` and ``top_p`` are set.
    """

    def __init__(self, model: Model, sampling: Sampling, limits: EngineLimits):
        from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
        from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
            GPTInferenceWrapper,
        )
        from megatron.core.inference.text_generation_controllers import (
            simple_text_generation_controller as controllers,
        )

        self.model, self.sampling, self.limits = model, sampling, limits
        self.context = self._context()
        config = model.wrapper.inference_wrapper_config
        wrapper = GPTInferenceWrapper(model.core, config, self.context)
        wrapper.model_is_pipeline_parallel = False  # else only set by the static engine
        controller = controllers.SimpleTextGenerationController(wrapper, model.tokenizer)
        self.parameters, seed = _start(sampling)
        self.engine = DynamicInferenceEngine(
            controller,
            self.context,
            termination_id=model.tokenizer.eod,
            enable_cuda_graph=False,
            random_seed=seed,
        )

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
        self.engine.add_request(request, list(tokens), self.sampling.max_new_tokens)
        return None

    def step(self) -> list[Answer]:
        """One token for every running request; returns those that have finished."""
        if not self.running:
            raise GenerationFailed(
                f"{len(self.engine.waiting_request_ids)} requests wait and none runs: the engine "
                "would wait for ever."
            )
        finished, _ = self.engine.step(self.parameters)
        return [self.model.answer(done.request_id, done.generated_tokens) for done in finished]

    def _context(self):
        from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext

        config, limits = self.model.config, self.limits
        blocks = math.ceil(limits.inference_max_seq_length / limits.block_size_tokens)
        requests = DynamicInferenceContext.round_up_requests(limits.max_batch_size)
        # Keys and values; grouped-query attention keeps as many heads as there are groups.
        token_bytes = 2 * self.model.dtype.itemsize * config.num_query_groups * config.kv_channels
        block_bytes = limits.block_size_tokens * config.num_layers * token_bytes
        rounder = DynamicInferenceContext.REQUEST_ROUNDER
        # One more block is the engine's dummy.
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
        said, step = f"the prompt has {prompt} tokens", self.context.max_tokens
        if prompt > step:
            return f"{said}, and a step takes {step} (max_tokens)."
        allocator = self.context.chunk_allocator
        room = allocator.chunk_count_total - 1 - allocator.gtd_chunk_count
        if math.ceil(prompt / self.limits.block_size_tokens) > room:
            size = self.limits.buffer_size_gb
            return f"{said}, more than the buffer holds (buffer_size_gb {size:g})."
        return None


def too_long(prompt: int, sampling: Sampling, limits: EngineLimits) -> str | None:
    """Why a prompt of so many tokens cannot be answered by either engine; None if it can."""
    if not prompt:
        return "the prompt is empty."
    if prompt + sampling.max_new_tokens > limits.inference_max_seq_length:
        return (
            f"the prompt has {prompt} tokens and {sampling.max_new_tokens} are to be generated "
            "(num_tokens_to_generate), together more than "
            f"{limits.inference_max_seq_length} (inference_max_seq_length)."
        )
    return None


def dynamic(
    model: Model, prompts: Sequence[str], sampling: Sampling, limits: EngineLimits
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
    model: Model, prompts: Sequence[str], sampling: Sampling, limits: EngineLimits
) -> Iterator[Answer]:
    """Answers batch by batch: ``max_batch_size`` at a time, of similar length, so that few of them
    wait for others."""
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines.static_engine import StaticInferenceEngine
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    parameters, seed = _start(sampling)
    tokens = [model.tokens(prompt) for prompt in prompts]
    fitting = []
    for request, ids in sorted(enumerate(tokens), key=lambda item: len(item[1])):
        if reason := too_long(len(ids), sampling, limits):
            yield Answer(request, refused=reason)
        else:
            fitting.append(request)
    narrowed = _narrowed(tokens, sampling, limits)
    size, length = narrowed.max_batch_size, narrowed.inference_max_seq_length
    config = model.wrapper.inference_wrapper_config
    config.inference_max_requests, config.inference_max_seq_length = size, length
    for begin in range(0, len(fitting), size):
        batch = fitting[begin : begin + size]
        # Its buffers are as large as the first batch that it sees.
        model.wrapper.inference_context = StaticInferenceContext(len(batch), length)
        controller = TextGenerationController(model.wrapper, model.tokenizer)
        asked = [prompts[request] for request in batch]
        engine = StaticInferenceEngine(controller, size, seed)
        answers = engine.generate(asked, sampling_params=parameters)
        for request, answer in zip(batch, answers, strict=True):
            yield model.answer(request, answer.generated_tokens.tolist())


def _narrowed(
    tokens: Sequence[Sequence[int]], sampling: Sampling, limits: EngineLimits
) -> EngineLimits:
    """``limits`` no wider than these prompts can use: the caches are made in full before the first
    token."""
    fitting = [len(ids) for ids in tokens if not too_long(len(ids), sampling, limits)]
    length = max(fitting, default=1) + sampling.max_new_tokens
    size = max(1, min(limits.max_batch_size, len(fitting)))
    return replace(limits, max_batch_size=size, inference_max_seq_length=length)


def _work(folder: Path) -> None:
    """The process that predict and deliver start on ``job.json``: logits of ``token_ids``, or
    answers to ``rows``, one a line appended to the file that the job names."""
    job: dict[str, Any] = json.loads((folder / "job.json").read_text("utf-8"))
    model = Model(job["checkpoint"], job["trust"], job["base"], job["device"])
    if "token_ids" in job:
        import numpy

        numpy.save(folder / "logits.npy", megatron_logits(model.core, job["token_ids"]))
        return
    run = {"dynamic": dynamic, "static": static}[job["engine"]]
    sampling, limits = Sampling(**job["sampling"]), EngineLimits(**job["limits"])
    rows, began, tokens = job["rows"], time.perf_counter(), 0
    with Path(job["answers"]).open("a", encoding="utf-8") as stream:
        for answer in run(model, [row["prompt"] for row in rows], sampling, limits):
            tokens += len(answer.tokens)
            line = asdict(answer) | {"request": rows[answer.request]["row"]}
            stream.write(json.dumps(line) + "\n")
            stream.flush()
    speed = {"tokens": tokens, "seconds": time.perf_counter() - began}
    (folder / "speed.json").write_text(json.dumps(speed))


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
