"""A fine-tuning by the script path, from its plan to the adapter."""

import time
from pathlib import Path

from filelock import FileLock, Timeout

from workshop_utils.adapters.write_nemo1 import merge_parts
from workshop_utils.core import paths
from workshop_utils.core.errors import TrainingFailed, WorkshopError
from workshop_utils.training.runs import run_record
from workshop_utils.training.runs.launch import failure_cause, prepare, run_logged, stopped
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
    plan.run_dir.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(plan.run_dir.with_name(f".{plan.run_dir.name}.lock"))
    try:
        with lock.acquire(blocking=False):
            if not fresh and (done := _identical(plan)):
                return done
            prepare(plan, fresh or not plan.config.exp_manager.resume_if_exists)
            return _train(plan, progress)
    except Timeout:
        raise WorkshopError(
            f"Another process is training in {paths.shown(plan.run_dir)}. Wait, or give the run "
            "another --name."
        ) from None


def _identical(plan: Plan) -> Path | None:
    """The adapter of a finished run that was asked for in the same words."""
    record = run_record.read(plan)
    if (
        record.get("fingerprint") != plan.fingerprint()
        or record.get("status") != run_record.FINISHED
        or not plan.adapter.exists()
    ):
        return None
    print(
        f"{paths.shown(plan.run_dir)}: an identical run has finished; its adapter is used. "
        "(--fresh, or fresh=True, trains again.)"
    )
    return plan.adapter


def _train(plan: Plan, progress: bool) -> Path:
    """Run the plan's command, and write down how it ended."""
    began = time.monotonic()
    record = run_record.begin(plan)
    status, cause = None, None
    try:
        status = run_logged(
            plan.command, plan.environment, plan.log, plan.events if progress else None
        )
        if status != 0:
            cause = failure_cause(plan.log)
        elif not plan.adapter.exists():
            cause = f"torchrun ended well, but {paths.shown(plan.adapter)} is missing."
        elif plan.config.model.peft.peft_scheme in SECTIONS and merge_parts(plan.adapter):
            print(
                f"{paths.shown(plan.adapter)}: the parts of the model-parallel ranks are put "
                "together."
            )
    except KeyboardInterrupt:
        run_record.end(plan, record, run_record.INTERRUPTED, time.monotonic() - began, None)
        print(stopped(plan.run_dir))
        raise
    run_record.end(
        plan,
        record,
        run_record.FAILED if cause else run_record.FINISHED,
        time.monotonic() - began,
        status,
        cause,
    )
    if cause:
        raise TrainingFailed(f"{cause}\nThe whole log: {paths.shown(plan.log)}")
    return plan.adapter


def train_seconds(plan: Plan) -> float:
    """Seconds from the start of torchrun to its end, imports and model loading included, of the
    last start of the finished ``plan``."""
    return run_record.read(plan)["seconds"]
