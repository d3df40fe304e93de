"""Training: the recipe under NeMo-Run, watched from outside NeMo.

The calling process stays free of NeMo. It starts ``python -m workshop_utils.training.recipe.job
FILE``, which builds the configuration and hands it to NeMo-Run's LocalExecutor; that starts
torchrun, and torchrun the workers. Progress comes back as the events that the script path has too
(:mod:`workshop_utils.training.runs.events`); a worker's error comes back through the log.
"""

import dataclasses
import json
import os
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from workshop_utils.checkpoints.formats import nemo2
from workshop_utils.core import paths
from workshop_utils.core.errors import WorkshopError
from workshop_utils.core.hashing import sha256
from workshop_utils.training.recipe import choose_checkpoint
from workshop_utils.training.recipe.build import TRACE, finetune_recipe
from workshop_utils.training.recipe.options import FIELDS, TRAIN, from_mapping
from workshop_utils.training.recipe.plan import (
    ONE_MACHINE,
    RUN,
    Resolved,
    require_possible,
    resolve,
)
from workshop_utils.training.recipe.prepare_data import load_prepared, require_whole_batch
from workshop_utils.training.runs import launch, run_record
from workshop_utils.training.runs.environment import training_environment
from workshop_utils.training.runs.events import last_step, read_events

_PLACES = ("output_dir", "nemo_ckpt_dir", "data_dir")
_NOT_DECISIVE = (
    *_PLACES,
    *("hf_model_id", "log_every_n_steps", "enable_", "use_wandb", "resume", "import_timeout"),
    *("trust", "nemo_logs_dir", "hfdc_num_proc"),
)
"""Beginnings of the options of training that change what is seen of a run, not its outcome, or that
only say where what decides it lies."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its directory, the checkpoints (``best`` by validation loss), losses, steps
    done and seconds of this start."""

    run_dir: Path
    best: Path
    last: Path
    val_loss: float | None
    steps: int
    stopped_early: bool
    seconds: float

    def __str__(self) -> str:
        early = ", stopped early: the validation loss no longer fell" if self.stopped_early else ""
        loss = "" if self.val_loss is None else f", validation loss {self.val_loss:.4f}"
        best, last = paths.shown(self.best), paths.shown(self.last)
        return f"{self.steps} steps{early}{loss}\nbest: {best}\nlast: {last}"


@dataclass(frozen=True)
class Job(run_record.Run):
    """One run of the recipe path."""

    resolved: Resolved
    again = "--no-resume, or resume: false"
    elsewhere = "set another output_dir"

    @property
    def run_dir(self) -> Path:
        """NeMo's directory: checkpoints, TensorBoard, logs. Our own files are in ``workshop`` in
        it."""
        return self.resolved.output_dir / RUN

    @property
    def seed(self) -> int:
        """Of data order and adapter."""
        return self.resolved.options.seed

    @cached_property
    def device(self) -> str:
        """cpu or gpu."""
        return self.resolved.device

    def fingerprint(self) -> dict:
        """What decides the outcome: options of training, base and data. Equal fingerprints, equal
        runs on one machine."""
        kept = {
            name: value
            for name, value in dataclasses.asdict(self.resolved.options).items()
            if FIELDS[name].metadata["script"] == TRAIN and not name.startswith(_NOT_DECISIVE)
        }
        files = [self.resolved.data_dir / f"{name}.jsonl" for name in ("training", "validation")]
        base = nemo2.contents_of(self.resolved.nemo_ckpt_dir)
        digests = [sha256(file) for file in files if file.is_file()]
        # As JSON would give it back: a tuple becomes a list.
        return json.loads(json.dumps({"options": kept, "files": digests, "base": base}))

    def __str__(self) -> str:
        options = self.resolved.options
        processes = f"{self.resolved.world_size} processes"
        return f"llm.finetune, {options.recipe_cls_name}, {options.peft_scheme}, {processes}"


def train(resolved: Resolved, progress: bool | None = None) -> TrainResult:
    """Train with the recipe and return where the checkpoints are.

    A finished run of the same options, base and data is used as it is; an interrupted one goes on
    from its last checkpoint; a line says which. Any other earlier run in ``output_dir`` is kept
    under a numbered name, as is every one with ``resume`` off.

    Args:
        progress: a progress bar; by default yes.

    Raises:
        WorkshopError: the device cannot do it, base or data are missing, or another process trains
            there.
        TrainingFailed: with the error of the worker that failed first. The log stays beside the
            run.
    """
    _require_ready(resolved)
    job = Job(resolved)
    launch.make(job, lambda: _run(job, progress is not False), not resolved.options.resume)
    return _result(job)


def _require_ready(resolved: Resolved) -> None:
    require_possible(resolved)
    if resolved.options.num_nodes > 1:
        raise WorkshopError(ONE_MACHINE)
    for name in ("training", "validation"):
        file = resolved.data_dir / f"{name}.jsonl"
        if not file.is_file() or not file.stat().st_size:
            raise WorkshopError(
                f"{paths.shown(file)} is missing or empty. Run `workshop recipe data` with the "
                "same options first."
            )
    if not (resolved.nemo_ckpt_dir / "context" / "model.yaml").is_file():
        raise WorkshopError(
            f"{paths.shown(resolved.nemo_ckpt_dir)} holds no imported base. Run `workshop recipe "
            "import` with the same options first."
        )
    require_whole_batch(load_prepared(resolved.data_dir), resolved.global_batch_size)


def _run(job: Job, progress: bool) -> None:
    """``python -m`` of this module on the options and the places, as JSON."""
    options, asked = job.resolved.options, job.record.with_name("job.json")
    places = {name: str(getattr(job.resolved, name)) for name in _PLACES}
    paths.write_text(asked, json.dumps(dataclasses.asdict(options) | places, indent=2))
    environment = training_environment(job.run_dir, options.gpus_per_node) | {
        "WORKSHOP_DEVICE": job.device,
        "PL_GLOBAL_SEED": str(options.seed),
        "NEMORUN_HOME": str(asked.with_name("nemo_run")),
        # NeMo-Run starts the `torchrun` that it finds first.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    if options.use_wandb:
        # Our defaults; WANDB_MODE=offline of a person stays.
        off = {"WANDB_MODE": "disabled", "WANDB_DISABLED": "true"}.items()
        environment = dict(environment.items() - off)
    if options.enable_pytorch_profiler:
        (job.run_dir / TRACE).mkdir(exist_ok=True)  # NeMo asks for it
    command = [sys.executable, "-m", "workshop_utils.training.recipe.job", str(asked)]
    launch.run_recorded(
        job, command, environment, progress, lambda status: _cause(job.log) if status else None
    )
    for line in mismatches(job.log):
        print(f"note: {line}", file=sys.stderr)


def _cause(log: Path) -> str:
    """The worker's error. Lines of a worker begin with the task's and the rank's name, which are
    taken off first."""
    text = re.sub(r"(?m)^\S+/\d+ (\[\w+\]:)?", "", log.read_text(errors="replace"))
    paths.write_text(log, text)
    return launch.failure_cause(log)


def mismatches(log: Path) -> list[str]:
    """What NeMo said in ``log`` about names of weights that the checkpoint or the model lacks; each
    line once."""
    said = r"(?:Missing|Unexpected) keys \(for [^)]*\): .*"
    return list(dict.fromkeys(re.findall(said, log.read_text(errors="replace"))))


def _result(job: Job) -> TrainResult:
    events, steps = read_events(job.events), last_step(job.events)
    losses = [event["loss"] for event in events if event["event"] == "validation"]
    return TrainResult(
        run_dir=job.run_dir,
        best=choose_checkpoint.choose(job.run_dir, "best"),
        last=choose_checkpoint.choose(job.run_dir, "last"),
        val_loss=min(losses, default=None),
        steps=steps,
        stopped_early=steps < job.resolved.options.max_steps,
        seconds=run_record.read(job)["seconds"],
    )


def _experiment(resolved: Resolved) -> int:
    """Run the recipe with NeMo-Run on this machine; 0 if it succeeded. For the process that
    :func:`train` starts."""
    import nemo_run as run
    from torchx.specs import AppState

    recipe, processes = finetune_recipe(resolved), resolved.options.gpus_per_node
    executor = run.LocalExecutor(ntasks_per_node=processes, launcher="torchrun")
    with run.Experiment("recipe") as experiment:
        experiment.add(recipe, executor=executor, name="train")
        experiment.run(sequential=True, tail_logs=True)
    # It is only when it is left that the experiment waits for its jobs.
    return 0 if all(job.state == AppState.SUCCEEDED for job in experiment.jobs) else 1


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.exit(_experiment(resolve(from_mapping(asked))))
