"""The NeMo-Run configuration of a fine-tuning: NeMo's own recipe, with the imported base, the
prepared data and the options in it."""

import os
from typing import TYPE_CHECKING, Any

from workshop_utils.core.errors import WorkshopError
from workshop_utils.core.paths import shown
from workshop_utils.training.recipe.plan import RUN, Resolved, on_cpu, require_possible

if TYPE_CHECKING:
    import nemo_run as run

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

    cpu = resolved.options.device == "cpu" if preview else on_cpu(resolved)
    if cpu:
        os.environ["WORKSHOP_DEVICE"] = "cpu"
        require_possible(resolved)
    nemo_cpu.apply()
    from nemo.collections.llm import recipes

    options = resolved.options
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
    _optimizer(resolved, recipe.optim)
    _adapter(resolved, getattr(recipe, "peft", None))
    _log_and_resume(resolved, recipe)
    _precision(resolved, recipe)
    if cpu:
        _for_cpu(recipe)
    return recipe


def _model(resolved: Resolved, of_recipe: "run.Config", preview: bool) -> "run.Config":
    """The base's model as its checkpoint describes it, with what the recipe sets beside a model's
    sizes."""
    from nemo.lightning import io

    base = resolved.nemo_ckpt_dir
    if not (base / "context" / "model.yaml").is_file():
        if preview:
            of_recipe.config.seq_length = resolved.options.max_seq_length
            return of_recipe
        raise WorkshopError(
            f"{shown(base)} holds no imported base. Run `workshop recipe import` with the same "
            "options first."
        )
    model = io.load_context(base, subpath="model", build=False)
    for name, value in of_recipe.config.__arguments__.items():
        setattr(model.config, name, value)
    model.config.seq_length = resolved.options.max_seq_length
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
    from workshop_utils.training.recipe.prepare_data import load_prepared

    options = resolved.options
    prepared = not preview or (resolved.data_dir / ".data_ready").is_file()
    arguments: dict[str, Any] = (
        {"prompt_template": load_prepared(resolved.data_dir).prompt_template} if prepared else {}
    )
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
    from workshop_utils.training.recipe.callbacks import callbacks

    options, strategy = resolved.options, trainer.strategy
    for name in (
        "max_steps",
        "val_check_interval",
        "limit_val_batches",
        "log_every_n_steps",
        "num_nodes",
    ):
        setattr(trainer, name, getattr(options, name))
    trainer.devices = options.gpus_per_node
    trainer.num_sanity_val_steps = 0
    # Count steps, not those of an epoch: after a resume NeMo's epoch is shorter, and the last step
    # would be neither validated nor saved.
    trainer.check_val_every_n_epoch = None
    trainer.accumulate_grad_batches = 1
    trainer.callbacks = [*(trainer.callbacks or []), *callbacks(options, resolved.output_dir / RUN)]
    strategy.tensor_model_parallel_size = options.tensor_parallel_size
    strategy.pipeline_model_parallel_size = options.pipeline_parallel_size
    strategy.context_parallel_size = options.context_parallel_size
    strategy.ckpt_load_strictness = STRICTNESS
    strategy.sequence_parallel = (
        bool(getattr(strategy, "sequence_parallel", False)) and options.tensor_parallel_size > 1
    )
    if options.pipeline_parallel_size != resolved.recipe.pipeline_parallel_size:
        strategy.virtual_pipeline_model_parallel_size = None


def _optimizer(resolved: Resolved, optim: "run.Config") -> None:
    """The recipe's, with the learning rate and the warm-up of the options where they are given."""
    options = resolved.options
    if options.learning_rate is not None:
        optim.config.lr = options.learning_rate
    if options.warmup_steps is not None:
        optim.lr_scheduler.warmup_steps = options.warmup_steps


def _adapter(resolved: Resolved, peft: "run.Config | None") -> None:
    options = resolved.options
    if peft is None:
        return
    given = {
        "dim": options.lora_dim,
        "alpha": options.lora_alpha,
        "dropout": options.lora_dropout,
        "target_modules": options.lora_target_modules,
    }
    for name, value in given.items():
        if value is not None:
            setattr(peft, name, list(value) if name == "target_modules" else value)


def _log_and_resume(resolved: Resolved, recipe: "run.Partial") -> None:
    import nemo_run as run
    from nemo import lightning as nl

    from workshop_utils.training.recipe.callbacks import checkpoints, loggers

    recipe.log = run.Config(
        nl.NeMoLogger,
        name=RUN,
        log_dir=str(resolved.output_dir),
        use_datetime_version=False,
        ckpt=checkpoints(resolved.options.peft_scheme),
        update_logger_directory=False,
        **loggers(resolved.options, resolved.output_dir / RUN),
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

    precision = resolved.options.precision
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32": torch.float32}[
        precision
    ]
    plugin = {
        "bf16-mixed": mixed_precision.bf16_mixed,
        "16-mixed": mixed_precision.fp16_mixed,
        "32": lambda: None,
    }[precision]()
    recipe.trainer.plugins = plugin
    recipe.trainer.strategy.pipeline_dtype = dtype
    for config in (recipe.model.config, recipe.optim.config):
        config.bf16, config.fp16, config.params_dtype = (
            dtype == torch.bfloat16,
            dtype == torch.float16,
            dtype,
        )
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
