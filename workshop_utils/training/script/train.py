"""A fine-tuning by the script path, from its plan to the adapter."""

from pathlib import Path

from workshop_utils.adapters.write_nemo1 import merge_parts
from workshop_utils.core import paths
from workshop_utils.training.runs import launch, run_record
from workshop_utils.training.script.plan import Plan
from workshop_utils.training.script.schemes import SECTIONS


def finetune(plan: Plan, progress: bool = True, fresh: bool = False) -> Path:
    """Train and return the path of the ``.nemo`` adapter that NeMo wrote, merged if several
    model-parallel ranks wrote it.

    A finished run of the same overrides, script, data and base is used as it is; an unfinished one
    is continued from its last checkpoint. A line says which. Any other earlier run of the same name
    is kept under a numbered name, as is the same one with ``fresh``.

    Raises:
        WorkshopError: the plan's preflight found something that would make the run fail, or another
            process trains there.
        TrainingFailed: with the cause from the worker's log. The log stays beside the run.
    """
    plan.preflight.require()

    def start() -> None:
        plan.write_rows()
        launch.run_recorded(
            plan, plan.command, plan.environment, progress, lambda status: _cause(plan, status)
        )

    launch.make(plan, start, fresh, plan.config.exp_manager.resume_if_exists)
    return plan.adapter


def _cause(plan: Plan, status: int) -> str | None:
    """Why the run that ended with ``status`` has failed; parts of a sound adapter are merged."""
    if status != 0:
        return launch.failure_cause(plan.log)
    adapter = paths.shown(plan.adapter)
    if not plan.adapter.exists():
        return f"torchrun ended well, but {adapter} is missing."
    if plan.config.model.peft.peft_scheme in SECTIONS and merge_parts(plan.adapter):
        print(f"{adapter}: the parts of the model-parallel ranks are put together.")
    return None


def train_seconds(plan: Plan) -> float:
    """Seconds from the start of torchrun to its end, imports and model loading included, of the
    last start of the finished ``plan``."""
    return run_record.read(plan)["seconds"]
