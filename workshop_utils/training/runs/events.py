"""What a training process tells while it runs: one JSON object a line, read by the progress display
and the plots.

Lightning adds the callback to every Trainer through its ``lightning.pytorch.callbacks_factory``
entry points, so NeMo's own scripts report as well. Without ``WORKSHOP_EVENTS`` in the environment
there is no callback. ``WORKSHOP_TOKENS_PER_STEP`` is the mean number of tokens of one optimizer
step, padding aside, from which a step's tokens a second are made.
"""

import contextlib
import json
import os
import time
from pathlib import Path


def callbacks() -> list:
    """The factory that Lightning calls."""
    target = os.environ.get("WORKSHOP_EVENTS")
    return [_event_writer(Path(target))] if target else []


def _event_writer(target: Path):
    from lightning.pytorch import Callback

    class EventWriter(Callback):
        """Writes "start" (max_steps), "step" (loss and lr, null where there is none, seconds and
        tokens a second of this step, bytes of memory), "validation" (loss) and "end" on rank 0; of
        a test "start" and "step" alone, counted in batches of all test sets together."""

        def _write(self, trainer, event: str, **values) -> None:
            if not trainer.is_global_zero:
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            told = {"event": event, "step": trainer.global_step, "time": time.time(), **values}
            with target.open("a+b") as stream:
                # A full disk, or the end of an earlier start, can have cut the line before.
                if stream.tell():
                    stream.seek(-1, os.SEEK_END)
                    if stream.read(1) != b"\n":
                        stream.write(b"\n")
                stream.write(json.dumps(told).encode() + b"\n")

        def on_train_start(self, trainer, module):
            _leave_callbacks_out_of_checkpoints(trainer)
            self._write(trainer, "start", max_steps=trainer.max_steps)

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self._began = time.perf_counter()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            loss = trainer.callback_metrics.get("reduced_train_loss")
            seconds = time.perf_counter() - self._began
            tokens = os.environ.get("WORKSHOP_TOKENS_PER_STEP")
            self._write(
                trainer,
                "step",
                loss=None if loss is None else float(loss),
                lr=trainer.optimizers[0].param_groups[0].get("lr") if trainer.optimizers else None,
                seconds=seconds,
                tokens_per_second=float(tokens) / seconds if tokens else None,
                memory=_memory(),
            )

        def on_validation_end(self, trainer, module):
            metrics = trainer.callback_metrics
            loss = metrics.get("val_loss", metrics.get("validation_loss"))
            if loss is not None and not trainer.sanity_checking:
                self._write(trainer, "validation", loss=float(loss))

        def on_test_start(self, trainer, module):
            self._write(trainer, "start", max_steps=sum(trainer.num_test_batches))

        def on_test_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            before = sum(trainer.num_test_batches[:dataloader_idx])
            self._write(trainer, "step", step=before + batch_idx + 1)

        def on_train_end(self, trainer, module):
            self._write(trainer, "end")

    return EventWriter()


def _leave_callbacks_out_of_checkpoints(trainer) -> None:
    """NeMo 2.0 describes its Trainer in the context of each checkpoint, callbacks that are not
    NeMo's own as pickles. No reader of a checkpoint needs them, and
    :mod:`workshop_utils.checkpoints.verify` rightly refuses pickles that it cannot know.
    """
    described = getattr(trainer, "__io__", None)
    if getattr(described, "callbacks", None):
        described.callbacks = []


def _memory() -> int:
    """Bytes in use: of the GPU the most so far, else of this process now."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


def read_events(path: Path) -> list[dict]:
    """The events in ``path`` so far. A line that is still being written, or was cut off, is left
    out."""
    events = []
    for line in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return [event for event in events if isinstance(event, dict)]


def last_step(path: Path) -> int:
    """The most optimizer steps that the events in ``path`` tell of."""
    steps = (event["step"] for event in read_events(path) if event["event"] == "step")
    return max(steps, default=0)
