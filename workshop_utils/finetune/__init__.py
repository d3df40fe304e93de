"""LoRA fine-tuning by the script path: torchrun, NeMo's ``megatron_gpt_finetuning`` interface, live progress."""

from .events import read_events
from .launch import failure_cause, finetune, run_logged, train_seconds
from .plan import RECIPE, Plan, make_plan, script_path, torchrun, training_environment

__all__ = [
    "RECIPE",
    "Plan",
    "failure_cause",
    "finetune",
    "make_plan",
    "read_events",
    "run_logged",
    "script_path",
    "torchrun",
    "train_seconds",
    "training_environment",
]
