"""The NeMo-Run configuration of a fine-tuning: NeMo's own recipe, with the imported base, the
prepared data and the options in it. Imports NeMo inside the functions."""

from typing import TYPE_CHECKING, Any

from workshop_utils.core.errors import WorkshopError
from workshop_utils.core.paths import shown
from workshop_utils.training.recipe.plan import (
    PROFILED_STEPS,
    RUN,
    SPEED_WINDOW,
    Resolved,
    require_possible,
)

if TYPE_CHECKING:
    import nemo_run as run

TRACE = "trace"  # folder of the run
STRICTNESS = "log_all"
"""NeMo loads in spite of names that do not match; each is in the log, and :mod:`.job` repeats them
on the screen."""


def finetune_recipe(resolved: Resolved, preview: bool = False) -> "run.Partial":
    """``llm.finetune`` with everything filled in, as ``workshop recipe --dry-run --resolve`` prints
    it and :mod:`.job` runs it.

    It starts as NeMo's recipe for ``recipe_cls_name``, which gives the hyper-parameters. Sizes and
    tokenizer are those of the imported base. The global batch is Megatron's: micro batch x
    accumulation x data parallel. Lightning's accumulation stays 1, so that it is counted once. With
    ``preview`` base and data may be missing: the model then is as NeMo's recipe has it, without a
    prompt template; and ``device: auto`` is a GPU, whatever this machine has.

    Raises:
        WorkshopError: the device cannot do it, or the base has not been imported.
    """
    from workshop_utils.runtime import nemo_cpu

    options = resolved.options
    cpu = (options.device if preview else resolved.device) == "cpu"
    if cpu:
        require_possible(resolved)
    nemo_cpu.apply("cpu" if cpu else None)
    from nemo.collections.llm import recipes

    recipe = getattr(recipes, resolved.recipe.name).finetune_recipe(
        dir=str(resolved.output_dir),
        name=RUN,
        num_nodes=options.num_nodes,
        num_gpus_per_node=options.gpus_per_node,
        peft_scheme="none" if options.full_ft else options.peft_scheme,
    )
    recipe.model = _model(resolved, recipe.model, preview)
    recipe.data = _data(resolved, getattr(recipe.model, "tokenizer", None), cpu, preview)
    recipe.tokenizer = "data"
    _trainer(resolved, recipe.trainer)
    _set(recipe.optim.config, lr=options.learning_rate)
    _set(getattr(recipe.optim, "lr_scheduler", None), warmup_steps=options.warmup_steps)
    targets = options.lora_target_modules
    if (peft := getattr(recipe, "peft", None)) is not None:
        _set(peft, dim=options.lora_dim, alpha=options.lora_alpha, dropout=options.lora_dropout)
        _set(peft, target_modules=targets and list(targets))
    _log_and_resume(resolved, recipe)
    _precision(resolved, recipe)
    if cpu:
        _for_cpu(recipe)
    return recipe


def _set(config: "run.Config", **values: Any) -> None:
    """What the options leave to the recipe (None) stays as the recipe has it."""
    for name, value in values.items():
        if value is not None:
            setattr(config, name, value)


def _model(resolved: Resolved, of_recipe: "run.Config", preview: bool) -> "run.Config":
    """The base's model as its checkpoint describes it, with what the recipe sets beside a model's
    sizes."""
    from nemo.lightning import io

    base, length = resolved.nemo_ckpt_dir, resolved.options.max_seq_length
    if not (base / "context" / "model.yaml").is_file():
        if preview:
            of_recipe.config.seq_length = length
            return of_recipe
        raise WorkshopError(
            f"{shown(base)} holds no imported base. Run `workshop recipe import` with the same "
            "options first."
        )
    model = io.load_context(base, subpath="model", build=False)
    for name, value in of_recipe.config.__arguments__.items():
        setattr(model.config, name, value)
    model.config.seq_length = length
    # The settings of `optim` below are used: these are the model's own, for a training without any.
    if "optim" in model.__arguments__:
        del model.optim
    return model


def _data(
    resolved: Resolved, tokenizer: "run.Config | None", cpu: bool, preview: bool
) -> "run.Config":
    """NeMo's data module on the three files of the data phase: NeMo's own class, so that a
    checkpoint names nothing of ours.

    Only packed rows take :class:`~.data_module.PreparedDataModule`: NeMo's would pack with its
    default template.
    """
    import nemo_run as run
    from nemo.collections.llm.gpt.data import FineTuningDataModule
    from nemo.collections.llm.gpt.data.packed_sequence import PackedSequenceSpecs

    from workshop_utils.training.recipe.data_module import PreparedDataModule
    from workshop_utils.training.recipe.prepare_data import MARKER, load_prepared

    options, arguments = resolved.options, {}
    if not preview or (resolved.data_dir / MARKER).is_file():
        arguments["prompt_template"] = load_prepared(resolved.data_dir).prompt_template
    if options.context_parallel_size > 1:
        arguments["pad_seq_length_to_mult"] = 2 * options.context_parallel_size
    module = run.Config(
        FineTuningDataModule,
        dataset_root=str(resolved.data_dir),
        seq_length=options.max_seq_length,
        tokenizer=tokenizer,
        micro_batch_size=options.micro_batch_size,
        global_batch_size=resolved.global_batch_size,
        seed=options.seed,
        dataset_kwargs=arguments,
    )
    if options.packed_sequence:
        arguments["pad_to_max_length"] = True
        specs = run.Config(PackedSequenceSpecs, packed_sequence_size=options.max_seq_length)
        return run.Config(PreparedDataModule, packed_sequence_specs=specs, **module.__arguments__)
    if cpu:
        # Without Transformer Engine the mask comes with the data, not from the fused kernel.
        arguments["get_attention_mask_from_fusion"] = False
        module.num_workers, module.memmap_workers, module.pin_memory = 0, 1, False
    return module


def _trainer(resolved: Resolved, trainer: "run.Config") -> None:
    options, strategy = resolved.options, trainer.strategy
    for name in ("max_steps", "val_check_interval", "limit_val_batches", "log_every_n_steps"):
        setattr(trainer, name, getattr(options, name))
    trainer.num_nodes, trainer.devices = options.num_nodes, options.gpus_per_node
    trainer.num_sanity_val_steps = 0
    # Count steps, not those of an epoch: after a resume NeMo's epoch is shorter, and the last step
    # would be neither validated nor saved.
    trainer.check_val_every_n_epoch = None
    trainer.accumulate_grad_batches = 1
    trainer.callbacks = [*(trainer.callbacks or []), *callbacks(resolved)]
    strategy.tensor_model_parallel_size = options.tensor_parallel_size
    strategy.pipeline_model_parallel_size = options.pipeline_parallel_size
    strategy.context_parallel_size = options.context_parallel_size
    strategy.ckpt_load_strictness = STRICTNESS
    strategy.sequence_parallel = (
        bool(getattr(strategy, "sequence_parallel", False)) and options.tensor_parallel_size > 1
    )
    if options.pipeline_parallel_size != resolved.recipe.pipeline_parallel_size:
        strategy.virtual_pipeline_model_parallel_size = None


def callbacks(resolved: Resolved) -> list["run.Config"]:
    """What watches a run: early stopping always, the rest as the options switch it on. Profilers
    exclude each other: :mod:`.plan` has seen to that."""
    import nemo_run as run
    from lightning.pytorch.callbacks import EarlyStopping
    from nemo.lightning.pytorch import callbacks as nemo

    options, run_dir = resolved.options, resolved.output_dir / RUN
    first, last = PROFILED_STEPS
    steps = {"start_step": first, "end_step": last}
    trace, memory = str(run_dir / TRACE), str(run_dir / "mem_profile")
    patience, threshold = options.early_stopping_patience, options.early_stopping_threshold
    stop = {"monitor": "val_loss", "mode": "min", "patience": patience, "min_delta": threshold}
    watchers = {
        "enable_megatron_progress_bar": (
            nemo.MegatronProgressBar,
            {"refresh_rate": options.log_every_n_steps},
        ),
        "enable_nsys_callback": (nemo.NsysCallback, steps),
        "enable_pytorch_profiler": (nemo.PytorchProfilerCallback, steps | {"trace_dir": trace}),
        "enable_memory_profile": (nemo.MemoryProfileCallback, {"dir": memory}),
        "enable_speed_monitor": (
            nemo.SpeedMonitor,
            {"window_size": SPEED_WINDOW, "time_unit": "seconds"},
        ),
        "enable_memory_monitor": (nemo.MemoryMonitor, {}),
        "enable_runtime_estimator": (nemo.RuntimeEstimator, {"time_unit": "minutes"}),
    }
    chosen = [watcher for name, watcher in watchers.items() if getattr(options, name)]
    return [run.Config(kind, **given) for kind, given in [(EarlyStopping, stop), *chosen]]


def _log_and_resume(resolved: Resolved, recipe: "run.Partial") -> None:
    """Keep the checkpoint with the lowest validation loss, and a link to the last one, each with
    the state of the optimizer. TensorBoard always, Weights & Biases with ``use_wandb``."""
    import nemo_run as run
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
    from nemo import lightning as nl

    options, folder, wandb = resolved.options, str(resolved.output_dir / RUN), None
    checkpoints = run.Config(
        nl.ModelCheckpoint,
        monitor="val_loss",
        mode="min",
        save_top_k=1,
        save_last="link",
        save_optim_on_train_end=True,
        filename=options.peft_scheme + "--{val_loss:.4f}-{step}",
    )
    if options.use_wandb:
        name = resolved.output_dir.name
        wandb = run.Config(WandbLogger, project="nemo-recipes", name=name, save_dir=folder)
    recipe.log = run.Config(
        nl.NeMoLogger,
        name=RUN,
        log_dir=str(resolved.output_dir),
        use_datetime_version=False,
        ckpt=checkpoints,
        update_logger_directory=False,
        tensorboard=run.Config(TensorBoardLogger, save_dir=folder, name="tensorboard", version=""),
        wandb=wandb,
    )
    base = run.Config(nl.RestoreConfig, path=str(resolved.nemo_ckpt_dir))
    recipe.resume = run.Config(
        nl.AutoResume, restore_config=base, resume_if_exists=True, resume_ignore_no_checkpoint=True
    )


def _precision(resolved: Resolved, recipe: "run.Partial") -> None:
    """The same arithmetic everywhere: the plugin, the optimizer, the pipeline and the model's own
    configuration."""
    import torch
    from nemo.collections.llm.recipes.precision import mixed_precision

    dtype, plugin = {
        "bf16-mixed": (torch.bfloat16, mixed_precision.bf16_mixed),
        "16-mixed": (torch.float16, mixed_precision.fp16_mixed),
        "32": (torch.float32, lambda: None),
    }[resolved.options.precision]
    recipe.trainer.plugins = plugin()
    recipe.trainer.strategy.pipeline_dtype = dtype
    for config in (recipe.model.config, recipe.optim.config):
        config.bf16, config.fp16 = dtype == torch.bfloat16, dtype == torch.float16
        config.params_dtype = dtype
    recipe.model.config.autocast_dtype = dtype


def _for_cpu(recipe: "run.Partial") -> None:
    """What is needed without a GPU beside the patches of :mod:`workshop_utils.runtime.nemo_cpu`."""
    trainer = recipe.trainer
    trainer.accelerator = "cpu"
    trainer.strategy.process_group_backend = "gloo"
    trainer.strategy.ckpt_async_save = False
    recipe.optim.config.use_distributed_optimizer = False
    # The default, without the overlapping of communication and kernels that some recipes ask for,
    # and the sharded optimizer.
    trainer.strategy.ddp = "megatron"
    # Recipes of large models bring callbacks that overlap the communication of tensor-parallel
    # GPUs.
    trainer.callbacks = [
        callback
        for callback in trainer.callbacks
        if "Overlap" not in callback.__fn_or_cls__.__name__
    ]
