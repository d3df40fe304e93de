"""LoRA fine-tuning by the script path: torchrun, NeMo's ``megatron_gpt_finetuning`` interface, live
progress."""

from workshop_utils.training.runs.environment import torchrun, training_environment
from workshop_utils.training.runs.events import read_events
from workshop_utils.training.runs.launch import failure_cause, run_logged
from workshop_utils.training.script.plan import RECIPE, Plan, make_plan, script_path
from workshop_utils.training.script.train import finetune, train_seconds

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
