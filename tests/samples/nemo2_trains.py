"""A tiny model trained through the NeMo 2.0 API: ``[torchrun ...] nemo2_trains.py BASE FOLDER
SCHEME... [--tp 2] [--steps 4]``.

BASE is a NeMo 2.0 checkpoint. FOLDER holds ``data/training.jsonl`` and ``data/validation.jsonl``
(see :func:`write_data`) and gets, for each scheme, ``SCHEME/`` (with ``checkpoints/*-last``) and
``SCHEME.json`` with the losses.
"""

import argparse
import json
import sys
from pathlib import Path

SCHEMES = ("lora", "dora", "canonical_lora", "full")


def write_data(folder: Path, rows: int = 16) -> Path:
    """Rows of a task that two layers can begin to learn, as NeMo's FineTuningDataModule reads
    them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, start in (("training", 0), ("validation", rows), ("test", 2 * rows)):
        lines = [
            {"input": f"number {i}?", "output": f"it is {i}"} for i in range(start, start + rows)
        ]
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def train(
    base: Path, folder: Path, scheme: str, tp: int = 1, pp: int = 1, steps: int = 4, dim: int = 4
) -> dict:
    """Train and save; returns the last metrics."""
    import os

    import torch
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.llm.gpt.data import FineTuningDataModule
    from nemo.lightning import io

    from workshop_utils.training.runs.events import read_events

    # What our events say, as in a user's run: a callback of this module could not be written into
    # the checkpoint's context.
    events = folder / f"{scheme}.events.jsonl"
    events.unlink(missing_ok=True)
    os.environ["WORKSHOP_EVENTS"] = str(events)
    model = io.load_context(base, subpath="model")
    schemes = {"lora": "LoRA", "dora": "DoRA", "canonical_lora": "CanonicalLoRA"}
    peft = getattr(llm.peft, schemes[scheme]) if scheme in schemes else None
    on_cpu = {"num_workers": 0, "memmap_workers": 1, "pin_memory": False}
    data = FineTuningDataModule(
        folder / "data",
        seq_length=64,
        tokenizer=model.tokenizer,
        micro_batch_size=2,
        global_batch_size=4,
        dataset_kwargs={"get_attention_mask_from_fusion": False},
        **on_cpu,
    )
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        process_group_backend="gloo",
        ckpt_async_save=False,
    )
    every = {"val_check_interval": steps, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = nl.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        num_nodes=1,
        strategy=strategy,
        max_steps=steps,
        log_every_n_steps=1,
        **every,
    )
    checkpoints = nl.ModelCheckpoint(
        monitor="val_loss", save_top_k=1, save_last=True, filename="{step}-{val_loss:.3f}"
    )
    rate = {"lr": 1e-2 if peft else 1e-3, "clip_grad": 1.0}
    optimizer = OptimizerConfig(
        optimizer="adam", bf16=False, use_distributed_optimizer=False, **rate
    )
    log = {"use_datetime_version": False, "ckpt": checkpoints}
    torch.manual_seed(0)
    llm.finetune(
        model=model,
        data=data,
        trainer=trainer,
        optim=nl.MegatronOptimizerModule(optimizer),
        log=nl.NeMoLogger(log_dir=str(folder), name=scheme, **log),
        resume=nl.AutoResume(restore_config=nl.RestoreConfig(path=str(base))),
        peft=peft(dim=dim, alpha=2 * dim) if peft else None,
    )
    losses = [event["loss"] for event in read_events(events) if event["event"] == "step"]
    loss = float(trainer.callback_metrics["val_loss"])
    result = {"losses": losses, "step": trainer.global_step, "val_loss": loss}
    if trainer.is_global_zero:
        (folder / f"{scheme}.json").write_text(json.dumps(result))
    return result


def reset() -> None:
    """Forget the process groups, so that the next Trainer of this process can make its own. With
    several processes: one scheme a start."""
    import torch
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    from workshop_utils.runtime import nemo_cpu

    nemo_cpu.apply()
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("schemes", nargs="+", choices=SCHEMES)
    for name, default in (("tp", 1), ("pp", 1), ("steps", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args(sys.argv[1:])
    for scheme in given.schemes:
        sizes = (given.tp, given.pp, given.steps)
        print(scheme, train(given.base, given.folder, scheme, *sizes), flush=True)
        reset()
