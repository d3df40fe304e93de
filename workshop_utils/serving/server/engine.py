"""One model, many requests: continuous batching with an adapter of its own for each row.

Requests join and leave between two token steps. A step is one forward pass over all rows; PEFT
applies to each row the adapter named for it
(https://huggingface.co/docs/peft/developer_guides/lora, "Inference with different LoRA adapters in
the same batch"). Keys and values are kept in one cache, padded on the left; the mask hides the
padding and positions are counted over the mask.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workshop_utils.checkpoints.formats.lora_layout import PEFT_PREFIX, parse
from workshop_utils.core.errors import UnsupportedAdapter, WorkshopError
from workshop_utils.serving.server import sampling
from workshop_utils.serving.server.sampling import Piece, RequestSampling, Text

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BASE = "__base__"  # PEFT's name for rows without an adapter


class UnknownModel(WorkshopError):
    """No model or adapter of this name is served."""


class QueueFull(WorkshopError):
    """As many requests wait as may."""


@dataclass(eq=False)
class Row:
    """A text being generated. ``emit`` gets its pieces, in the engine's thread."""

    prompt: list[int]
    sampling: RequestSampling
    emit: Callable[[Piece], None]
    adapter: str = _BASE
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)


class _Progress:
    """What the engine remembers of a running row."""

    def __init__(self, row: Row, tokenizer: PreTrainedTokenizerBase):
        self.row, self.text = row, Text(tokenizer, row.sampling.stop)
        self.random = sampling.generator(row.sampling.seed)
        self.pending: list = []
        self.done = False


class Engine:
    """Runs ``model`` in a thread of its own; ``passes`` and ``widest`` batch are counted."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_batch: int = 16,
        max_queue: int = 64,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.max_queue = max_batch, max_queue
        self.passes = self.widest = 0
        stop = model.generation_config.eos_token_id
        stop = tokenizer.eos_token_id if stop is None else stop
        self._stop_ids = set(stop if isinstance(stop, list) else [stop])
        self._changed = threading.Condition()
        # Name -> PEFT's name for the version that new requests get.
        self._served: dict[str, str] = {}
        self._retired: set[str] = set()
        self._versions = 0
        self._waiting: list[Row] = []
        self._jobs: list[tuple[Callable, Future]] = []
        self._running: list[_Progress] = []
        self._lora: PeftModel | None = None  # around the same model, from the first adapter on
        self._cache = self._mask = None
        self._closing = False
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="engine").submit(self._run)

    # Called from any thread.

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are served."""
        with self._changed:
            return sorted(self._served)

    def submit(self, rows: Sequence[Row], adapter: str | None) -> None:
        """Queue ``rows``, all or none, for ``adapter`` (None: the base), in the version served now.

        Raises:
            UnknownModel: no such adapter.
            QueueFull: more than ``max_queue`` rows would wait.
        """
        with self._changed:
            if adapter is not None and adapter not in self._served:
                raise UnknownModel(adapter)
            if len(self._waiting) + len(rows) > self.max_queue or self._closing:
                waiting = f"{len(self._waiting)} requests are waiting"
                raise QueueFull(f"{waiting}; the most is {self.max_queue}. Try again later.")
            for row in rows:
                row.adapter = _BASE if adapter is None else self._served[adapter]
            self._waiting += rows
            self._changed.notify_all()

    def install(
        self, name: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]
    ) -> Future:
        """Serve a PEFT adapter as ``name``; rows under way keep an older one. The future's
        exception is UnsupportedAdapter when it does not fit the base."""
        return self._job(lambda: self._install(name, config, tensors))

    def remove(self, name: str) -> Future:
        """Serve ``name`` no longer; rows under way keep it."""
        return self._job(lambda: self._retire(name))

    def close(self, grace: float = 0) -> None:
        """End the thread, and wait; what is unfinished after ``grace`` seconds gets an error."""
        with self._changed:
            done = lambda: self._closing or not (self._waiting or self._running)  # noqa: E731
            self._changed.wait_for(done, grace)
            self._closing = True
            self._changed.notify_all()
        wait([self.thread])

    def _job(self, work: Callable) -> Future:
        future: Future = Future()
        with self._changed:
            if self._closing:
                future.set_exception(WorkshopError("the server is stopping."))
            else:
                self._jobs.append((work, future))
                self._changed.notify_all()
        return future

    # The engine's thread.

    def _run(self) -> None:
        import torch

        try:
            with torch.inference_mode():
                while self._wait():
                    self._step()
        finally:  # also after a fault of the model: whoever waits is told
            with self._changed:
                self._closing = True
                for row in [*self._waiting, *(each.row for each in self._running if not each.done)]:
                    row.emit(Piece(finish="error"))
                for _, future in self._jobs:
                    future.set_exception(WorkshopError("the server is stopping."))

    def _wait(self) -> bool:
        """Sleep until there is something to do; do what is no forward pass; False at the end."""
        with self._changed:
            if not self._running:
                self._changed.notify_all()  # to :meth:`close`
            self._changed.wait_for(
                lambda: self._closing or self._waiting or self._running or self._jobs
            )
            self._waiting = [row for row in self._waiting if not row.cancelled]
        while self._jobs:
            work, future = self._jobs[0]
            try:
                future.set_result(work())
            except WorkshopError as error:
                future.set_exception(error)
            del self._jobs[0]  # after a fault it is still there, for _run to tell who waits
        self._delete_retired()
        return not self._closing

    def _step(self) -> None:
        """One forward pass: over the prompts of rows that join, or each running row's last."""
        self._keep([at for at, each in enumerate(self._running) if not each.row.cancelled])
        with self._changed:
            count = self.max_batch - len(self._running)
            joining, self._waiting = self._waiting[:count], self._waiting[count:]
            new = [_Progress(row, self.tokenizer) for row in joining]
            self._running += new  # before the lock is gone: their adapters are in use
        if new:
            logits = self._join(new)
        elif self._running:
            new, logits = self._running, self._continue()
        else:
            return
        for each, row in zip(new, logits, strict=True):
            self._advance(each, row)
        self._keep([at for at, each in enumerate(self._running) if not each.done])

    def _join(self, new: list[_Progress]) -> torch.Tensor:
        """Logits ``[new, vocabulary]`` after the prompts; their keys and values join the cache."""
        import torch
        from transformers import DynamicCache

        width = max(len(each.row.prompt) for each in new)
        ids = torch.zeros(len(new), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for at, each in enumerate(new):
            start = width - len(each.row.prompt)
            ids[at, start:], mask[at, start:] = torch.tensor(each.row.prompt), 1
        cache = DynamicCache()
        logits = self._forward(new, ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        if self._cache is None:
            self._cache, self._mask = cache, mask
            return logits
        longest = max(self._mask.shape[1], width)

        def joined(old: torch.Tensor, new: torch.Tensor, dimension: int) -> torch.Tensor:
            return torch.cat([_left_padded(each, longest, dimension) for each in (old, new)])

        self._mask = joined(self._mask, mask, 1)
        for name in ("key_cache", "value_cache"):
            layers = getattr(self._cache, name)
            for layer, values in enumerate(getattr(cache, name)):
                layers[layer] = joined(layers[layer], values, 2)
        return logits

    def _continue(self) -> torch.Tensor:
        """Logits ``[running, vocabulary]`` after the last token of each row."""
        import torch

        ids = torch.tensor([[each.row.tokens[-1]] for each in self._running])
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        positions = self._mask.sum(1, keepdim=True) - 1
        return self._forward(self._running, ids, self._mask, positions, self._cache)

    def _forward(self, rows: list[_Progress], ids, mask, positions, cache) -> torch.Tensor:
        device = self.model.device
        mixed = {"adapter_names": [each.row.adapter for each in rows]} if self._lora else {}
        output = (self._lora or self.model)(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **mixed,
        )
        self.passes, self.widest = self.passes + 1, max(self.widest, len(rows))
        # An adapter of huge numbers overflows: its rows get nonsense, and the others go on.
        return output.logits[:, -1].float().cpu().nan_to_num(0).clamp(-1e30, 1e30)

    def _advance(self, each: _Progress, logits: torch.Tensor) -> None:
        """Choose the next token of one row and say what is new."""
        row, text = each.row, each.text
        token = sampling.choose(logits, row.sampling, each.random)
        each.pending.append(
            sampling.described(logits, token, row.sampling, self.tokenizer, len(text.text))
        )
        row.tokens.append(token)
        stopped = text.update(row.tokens) or token in self._stop_ids
        full = len(row.tokens) >= row.sampling.max_new_tokens
        finish = "stop" if stopped else "length" if full else None
        new = text.take(last=finish is not None)
        if new or finish:
            row.emit(Piece(new, each.pending, finish))
            each.pending = []
        each.done = finish is not None

    def _keep(self, rows: list[int]) -> None:
        """Drop the other rows, and the columns that then are padding in every row."""
        import torch

        if len(rows) == len(self._running):
            return
        self._running = [self._running[at] for at in rows]
        if not rows:
            self._cache = self._mask = None
            return
        self._mask = self._mask[rows]
        first = int(self._mask.any(0).int().argmax())
        self._mask = self._mask[:, first:]
        index = torch.tensor(rows, device=self.model.device)
        for values in (self._cache.key_cache, self._cache.value_cache):
            values[:] = [layer[index, :, first:] for layer in values]

    def _install(self, name: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        self._check_fits(tensors)
        self._versions += 1
        version = f"version{self._versions}"  # PEFT takes no dots in names
        config, lean = LoraConfig(**config), {"low_cpu_mem_usage": True}
        if self._lora:
            self._lora.add_adapter(version, config, **lean)
        else:
            self._lora = get_peft_model(self.model, config, version, **lean)
        loaded = set_peft_model_state_dict(self._lora, tensors, version, **lean)
        missing = [key for key in loaded.missing_keys if version in key]
        unexpected = loaded.unexpected_keys
        if missing or unexpected:
            self._retired.add(version)
            raise UnsupportedAdapter(
                f"{len(missing)} of its tensors are missing and {len(unexpected)} fit nowhere; "
                f"the first is {[*missing, *unexpected][0]}."
            )
        self._lora.to(self.model.device).eval()
        self._retire(name, version)

    def _check_fits(self, tensors: dict[str, torch.Tensor]) -> None:
        """Every tensor is a half for a linear layer of the base, and has its size."""
        for key, tensor in tensors.items():
            size, name = None, parse(key)
            with contextlib.suppress(AttributeError):
                layer = self.model.get_submodule(name.stem.removeprefix(PEFT_PREFIX))
                size = layer.in_features if name.half == "A" else layer.out_features
            if size is None:
                raise UnsupportedAdapter(
                    f"{key} belongs to no linear layer of the base: it is an adapter of another "
                    "model or kind."
                )
            if tensor.ndim != 2 or tensor.shape[name.half == "A"] != size:
                raise UnsupportedAdapter(
                    f"{key} is {list(tensor.shape)}, but that layer of the base has size {size}: "
                    "it is an adapter of another model."
                )

    def _retire(self, name: str, successor: str | None = None) -> None:
        with self._changed:
            old = self._served.pop(name, None)
            if old:
                self._retired.add(old)
            if successor:
                self._served[name] = successor

    def _delete_retired(self) -> None:
        """Free the versions that no row needs any more."""
        with self._changed:
            rows = [*self._waiting, *(each.row for each in self._running)]
            used = {row.adapter for row in rows}
            unused, self._retired = self._retired - used, self._retired & used
        if self._lora and unused >= self._lora.peft_config.keys():
            self.model, self._lora = self._lora.unload(), None  # PEFT cannot do without any adapter
            return
        for version in unused:
            if self._lora.active_adapter == version:  # PEFT would choose another, with a warning
                kept = next(name for name in self._lora.peft_config if name not in unused)
                self._lora.set_adapter(kept, inference_mode=True)
            self._lora.delete_adapter(version)


def _left_padded(values: torch.Tensor, size: int, dimension: int) -> torch.Tensor:
    """``values`` with zeros in front along ``dimension``, ``size`` long there."""
    import torch

    later = values.ndim - 1 - dimension
    return torch.nn.functional.pad(values, (*(0, 0) * later, size - values.shape[dimension], 0))
