"""What watches a run: NeMo's and Lightning's own callbacks, configured. Imports NeMo inside the
functions."""

from pathlib import Path
from typing import TYPE_CHECKING

from workshop_utils.training.recipe.options import RecipeOptions

if TYPE_CHECKING:
    import nemo_run as run

PROFILED_STEPS = (5, 10)
"""First and last step that a profiler looks at: the ones before warm up."""
TRACE = "trace"  # folder of the run
SPEED_WINDOW = 10  # steps that the speed is the mean of
LEAST_STEPS = {
    "enable_nsys_callback": PROFILED_STEPS[1],
    "enable_pytorch_profiler": PROFILED_STEPS[1],
    "enable_speed_monitor": SPEED_WINDOW + 1,
}
"""Options that record nothing at all in a shorter run: a profiler writes when it stops, the speed
is logged when its window is full."""


def checkpoints(name: str) -> "run.Config":
    """Keep the checkpoint with the lowest validation loss, and a link to the last one, each with
    the state of the optimizer; their names begin with ``name``."""
    import nemo_run as run
    from nemo import lightning as nl

    return run.Config(
        nl.ModelCheckpoint,
        monitor="val_loss",
        mode="min",
        save_top_k=1,
        save_last="link",
        save_optim_on_train_end=True,
        filename=name + "--{val_loss:.4f}-{step}",
    )


def loggers(options: RecipeOptions, run_dir: Path) -> dict[str, "run.Config | None"]:
    """TensorBoard always, Weights & Biases with ``use_wandb``; the arguments ``tensorboard`` and
    ``wandb`` of NeMoLogger."""
    import nemo_run as run
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

    tensorboard = run.Config(
        TensorBoardLogger, save_dir=str(run_dir), name="tensorboard", version=""
    )
    wandb = (
        run.Config(
            WandbLogger, project="nemo-recipes", name=run_dir.parent.name, save_dir=str(run_dir)
        )
        if options.use_wandb
        else None
    )
    return {"tensorboard": tensorboard, "wandb": wandb}


def callbacks(options: RecipeOptions, run_dir: Path) -> list["run.Config"]:
    """Early stopping always, the rest as the options switch it on. Profilers exclude each other:
    :mod:`.plan` has seen to that."""
    import nemo_run as run
    from lightning.pytorch.callbacks import EarlyStopping
    from nemo.lightning.pytorch import callbacks as nemo

    first, last = PROFILED_STEPS
    found = [
        run.Config(
            EarlyStopping,
            monitor="val_loss",
            mode="min",
            patience=options.early_stopping_patience,
            min_delta=options.early_stopping_threshold,
        )
    ]
    if options.enable_megatron_progress_bar:
        found.append(run.Config(nemo.MegatronProgressBar, refresh_rate=options.log_every_n_steps))
    if options.enable_speed_monitor:
        found.append(run.Config(nemo.SpeedMonitor, window_size=SPEED_WINDOW, time_unit="seconds"))
    if options.enable_memory_monitor:
        found.append(run.Config(nemo.MemoryMonitor))
    if options.enable_runtime_estimator:
        found.append(run.Config(nemo.RuntimeEstimator, time_unit="minutes"))
    if options.enable_nsys_callback:
        found.append(run.Config(nemo.NsysCallback, start_step=first, end_step=last))
    if options.enable_pytorch_profiler:
        trace = str(run_dir / TRACE)
        found.append(
            run.Config(
                nemo.PytorchProfilerCallback, start_step=first, end_step=last, trace_dir=trace
            )
        )
    if options.enable_memory_profile:
        found.append(run.Config(nemo.MemoryProfileCallback, dir=str(run_dir / "mem_profile")))
    return found
