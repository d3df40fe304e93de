"""Which key of a NeMo 1.0 configuration became which argument in NeMo 2.0, and which became none.

Every row was compared with the source of NeMo 2.4, and a test does so with the one that is
installed. NVIDIA's own page on the checkpoint settings says ``ckpt_load_on_device``; the argument's
name is ``ckpt_load_directly_on_device``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Code:
    """A Python expression that stands for itself in the printed script."""

    text: str

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Row:
    """``key`` (dotted) becomes ``argument`` of ``target`` (see signatures.TARGETS). ``convert``
    gives the new value, or several arguments as a dict; it raises KeyError for a value that has no
    counterpart."""

    key: str
    target: str
    argument: str
    convert: Callable[[Any], Any] | None = None
    note: str = ""


def _rows(target: str, prefix: str, names: str) -> list[Row]:
    """Rows of ``names`` below ``prefix``, each the same on both sides or written OLD=NEW."""
    pairs = (name.partition("=") for name in names.split())
    return [Row(f"{prefix}.{old}", target, new or old) for old, _, new in pairs]


_MODULES = {
    "attention_qkv": ["linear_qkv"],
    "attention_dense": ["linear_proj"],
    "attention": ["linear_qkv", "linear_proj"],
    "mlp_fc1": ["linear_fc1"],
    "mlp_fc2": ["linear_fc2"],
    "mlp": ["linear_fc1", "linear_fc2"],
    "all": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
}
_GATED = {"gated_linear_unit": True}
_GELU, _SILU = (
    {"activation_func": Code(f"torch.nn.functional.{name}")} for name in ("gelu", "silu")
)
_ACTIVATIONS = {"gelu": _GELU, "swiglu": _SILU | _GATED, "geglu": _GELU | _GATED}
_NORMS = {
    "layernorm": {"normalization": "LayerNorm"},
    "layernorm1p": {"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True},
    "rmsnorm": {"normalization": "RMSNorm"},
}
_DISTRIBUTED = ("distributed_fused_adam", "mcore_distributed_optim")
_OPTIMIZERS = {
    name: {"optimizer": "adam", "use_distributed_optimizer": name in _DISTRIBUTED}
    for name in ("adam", "adamw", "fused_adam", "megatron_fused_adam", *_DISTRIBUTED)
}


def _target_modules(names: list[str] | str) -> list[str]:
    names = [names] if isinstance(names, str) else names
    return list(dict.fromkeys(new for name in names for new in _MODULES[name]))


def _path(text: Any) -> str:
    if not isinstance(text, str):
        raise KeyError(text)
    return text


def _metric(text: str) -> str:
    """NeMo 2.0 calls the validation loss val_loss everywhere."""
    return text.replace("validation_loss", "val_loss")


_CHECKPOINT, _STOPPING = (
    f"exp_manager.{name}_callback_params" for name in ("checkpoint", "early_stopping")
)
CHECKPOINTING = [
    *_rows("strategy", "model", "dist_ckpt_format=save_ckpt_format"),
    Row(
        "model.dist_ckpt_load_on_device",
        "strategy",
        "ckpt_load_directly_on_device",
        note="only zarr checkpoints obey it",
    ),
    *_rows(
        "strategy",
        "model",
        """dist_ckpt_parallel_save=ckpt_parallel_save
        dist_ckpt_parallel_save_within_dp=ckpt_parallel_save_within_dp
        dist_ckpt_parallel_load=ckpt_parallel_load
        dist_ckpt_torch_dist_multiproc=ckpt_torch_dist_multiproc
        dist_ckpt_assume_constant_structure=ckpt_assume_constant_structure
        dist_ckpt_parallel_dist_opt=ckpt_parallel_save_optim
        dist_ckpt_load_strictness=ckpt_load_strictness""",
    ),
    Row(
        f"{_CHECKPOINT}.async_save",
        "strategy",
        "ckpt_async_save",
        note="NeMo 2.0's default is True",
    ),
]
"""The settings of distributed checkpoints."""

ROWS = [
    *CHECKPOINTING,
    *_rows(
        "strategy",
        "model",
        """tensor_model_parallel_size pipeline_model_parallel_size
        virtual_pipeline_model_parallel_size context_parallel_size expert_model_parallel_size
        expert_tensor_parallel_size sequence_parallel gradient_as_bucket_view
        nccl_communicator_config_path sharp=use_sharp""",
    ),
    *_rows(
        "ddp",
        "model.optim",
        "overlap_grad_sync=overlap_grad_reduce overlap_param_sync=overlap_param_gather",
    ),
    *_rows(
        "trainer",
        "trainer",
        """devices num_nodes accelerator max_epochs max_steps max_time log_every_n_steps
        val_check_interval check_val_every_n_epoch limit_train_batches limit_val_batches
        limit_test_batches num_sanity_val_steps accumulate_grad_batches benchmark
        enable_model_summary enable_progress_bar use_distributed_sampler min_epochs min_steps
        limit_predict_batches overfit_batches fast_dev_run deterministic inference_mode profiler
        detect_anomaly barebones sync_batchnorm reload_dataloaders_every_n_epochs
        default_root_dir""",
    ),
    Row(
        "trainer.gradient_clip_val", "optimizer", "clip_grad", note="Megatron clips, not Lightning"
    ),
    *_rows("log", "exp_manager", "name explicit_log_dir version exp_dir=log_dir"),
    *_rows(
        "checkpoint",
        _CHECKPOINT,
        """save_top_k mode dirpath save_last every_n_train_steps every_n_epochs save_weights_only
        verbose""",
    ),
    Row(f"{_CHECKPOINT}.monitor", "checkpoint", "monitor", _metric),
    Row(f"{_CHECKPOINT}.filename", "checkpoint", "filename", _metric),
    *_rows("stopping", _STOPPING, "mode min_delta patience verbose strict"),
    Row(f"{_STOPPING}.monitor", "stopping", "monitor", _metric),
    *_rows("resume", "exp_manager", "resume_if_exists resume_ignore_no_checkpoint resume_past_end"),
    *_rows("resume", "model", "resume_from_checkpoint=resume_from_path"),
    Row(
        "model.restore_from_path",
        "restore",
        "path",
        _path,
        note="a NeMo 2.0 checkpoint: `workshop convert OLD.nemo NEW --to nemo2` makes one",
    ),
    Row("model.optim.name", "optimizer", "optimizer", lambda name: _OPTIMIZERS[name]),
    *_rows("optimizer", "model.optim", "lr weight_decay eps=adam_eps"),
    Row(
        "model.optim.betas",
        "optimizer",
        "adam_beta1",
        lambda betas: {"adam_beta1": betas[0], "adam_beta2": betas[1]},
    ),
    *_rows(
        "tokenizer",
        "model.tokenizer",
        """library vocab_file delimiter use_fast type=model_name model=tokenizer_model
        merge_file=merges_file sentencepiece_legacy=legacy""",
    ),
    *_rows(
        "config",
        "model",
        """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels
        init_method_std hidden_dropout attention_dropout apply_query_key_layer_scaling
        layernorm_epsilon make_vocab_size_divisible_by position_embedding_type rotary_base
        seq_len_interpolation_factor share_embeddings_and_output_weights fp32_residual_connection
        fp16_lm_cross_entropy use_cpu_initialization bias_activation_fusion masked_softmax_fusion
        gradient_accumulation_fusion apply_rope_fusion overlap_p2p_comm batch_p2p_comm
        layernorm_zero_centered_gamma rotary_interleaved qk_layernorm num_moe_experts
        moe_router_topk moe_router_pre_softmax moe_router_load_balancing_type moe_aux_loss_coeff
        moe_z_loss_coeff moe_grouped_gemm cpu_offloading cpu_offloading_num_layers
        cpu_offloading_activations cpu_offloading_weights encoder_seq_length=seq_length
        bias=add_bias_linear qkv_bias=add_qkv_bias bias_dropout_add_fusion=bias_dropout_fusion
        rotary_percentage=rotary_percent sync_batch_comm=batch_p2p_sync
        ub_tp_comm_overlap=tp_comm_overlap
        activations_checkpoint_granularity=recompute_granularity
        activations_checkpoint_method=recompute_method
        activations_checkpoint_num_layers=recompute_num_layers""",
    ),
    Row("model.normalization", "config", "normalization", lambda name: _NORMS[name.lower()]),
    Row(
        "model.activation",
        "config",
        "activation_func",
        lambda name: _ACTIVATIONS[name.removeprefix("fast-")],
    ),
    Row("model.peft.lora_tuning.target_modules", "peft", "target_modules", _target_modules),
    *_rows(
        "peft",
        "model.peft.lora_tuning",
        """alpha dropout_position a2a_experimental adapter_dim=dim adapter_dropout=dropout
        column_init_method=lora_A_init_method row_init_method=lora_B_init_method""",
    ),
    *_rows("finetuning", "model", "micro_batch_size global_batch_size rampup_batch_size seed"),
    *_rows("pretraining", "model", "micro_batch_size global_batch_size rampup_batch_size seed"),
    *_rows(
        "finetuning",
        "model.data.train_ds",
        "memmap_workers num_workers pin_memory max_seq_length=seq_length",
    ),
    *_rows(
        "rows",
        "model.data.train_ds",
        """label_key prompt_template add_bos add_eos add_sep truncation_field truncation_method
        index_mapping_dir global_sample_mapping""",
    ),
    *_rows("rows", "model", "answer_only_loss"),
    *_rows("rows", "model.data", "chat"),
    *_rows(
        "pretraining",
        "model.data",
        """seq_length num_workers index_mapping_dir reset_position_ids reset_attention_mask
        eod_mask_loss num_dataset_builder_threads data_prefix=paths splits_string=split""",
    ),
]
"""All rows. ``finetuning`` and ``rows`` are used for a configuration with ``model.data.train_ds``,
``pretraining`` for the others."""

FP16_ROWS = _rows(
    "precision",
    "model",
    """native_amp_init_scale=fp16_initial_loss_scale
    native_amp_growth_interval=fp16_loss_scale_window hysteresis=fp16_hysteresis""",
)
FP8_ROWS = _rows(
    "precision", "model", "fp8_margin fp8_amax_history_len fp8_amax_compute_algo fp8_params"
)
"""Rows that mean something only with ``trainer.precision: 16`` and ``model.fp8: true``."""

DEFAULTS = {
    "strategy": {
        "ckpt_parallel_save": False,
        "ckpt_parallel_load": False,
        "ckpt_async_save": False,
    },
    "stopping": {"monitor": "val_loss", "min_delta": 0.001, "patience": 10, "verbose": True},
    "optimizer": {"clip_grad": 0.0},
    "config": {
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "gradient_accumulation_fusion": False,
        "seq_length": 512,
    },
    "peft": {
        "target_modules": ["linear_qkv"],
        "dropout_position": "post",
        "lora_A_init_method": "normal",
    },
    "rows": {"label_key": "answer"},
    "fp8": {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"},
}
"""What NeMo 1.0's code does where a key is absent, and NeMo 2.0 does otherwise: for each target the
arguments that say it. A test compares with the installed code of both."""

WEIGHT_DECAY = {"adam": 0, "adamw": 0.01} | dict.fromkeys(
    ("fused_adam", "megatron_fused_adam", "distributed_fused_adam"), 0.0
)
"""The same of the optimizers: torch's, and Apex's. NeMo 1.0 wants it for the others."""

_DIRECTORIES = "NeMo 2.0 writes directories, no .nemo archives"
_NO_FP8 = "fp8 is off"
_FP16_ALONE = "scaling of the loss is for trainer.precision: 16 only"
_ONE_MODULE = "one data module for all splits: it takes the settings of train_ds"
WITHOUT = {
    "name": "only other keys refer to it",
    "defaults": "Hydra's own",
    "hydra.*": "Hydra's own",
    "trainer.logger": "NeMoLogger brings the loggers",
    "trainer.enable_checkpointing": "NeMoLogger brings the ModelCheckpoint",
    "trainer.replace_sampler_ddp": "use_distributed_sampler in Lightning 2",
    "exp_manager.create_checkpoint_callback": "NeMoLogger(ckpt=...) decides it",
    "exp_manager.create_*_logger": (
        "give NeMoLogger the logger itself: tensorboard=, wandb= or extra_loggers="
    ),
    "exp_manager.*_logger_kwargs*": "arguments of the logger that you give to NeMoLogger",
    "exp_manager.resume_from_checkpoint": (
        "resume_from_path, which model.resume_from_checkpoint becomes"
    ),
    "exp_manager.checkpoint_callback_params.model_parallel_size": "the strategy knows it",
    "exp_manager.checkpoint_callback_params.*save_nemo*": _DIRECTORIES,
    "exp_manager.checkpoint_callback_params.save_best_model": _DIRECTORIES,
    "exp_manager.*": (
        "exp_manager is gone; look among the arguments of NeMoLogger, AutoResume and "
        "Trainer(callbacks=...)"
    ),
    "s3_checkpointing*": (
        "storage of checkpoints is the business of megatron.core's MultiStorageClient"
    ),
    "model.mcore_gpt": "NeMo 2.0 has Megatron-Core models only",
    "model.transformer_engine": (
        "GPTConfig.transformer_layer_spec chooses; Transformer Engine's where it is installed"
    ),
    "model.megatron_amp_O2": "MegatronMixedPrecision always keeps main parameters in fp32",
    "model.fsdp*": (
        "MegatronStrategy(fsdp=...) is another implementation, with arguments of its own"
    ),
    "model.fp8*": _NO_FP8,
    "model.reduce_amax": _NO_FP8,
    "model.native_amp_*": _FP16_ALONE,
    "model.hysteresis": _FP16_ALONE,
    "model.max_position_embeddings": "seq_length in NeMo 2.0",
    "model.restore_from_ckpt": "AutoResume(resume_from_path=...) of a NeMo 2.0 checkpoint",
    "model.peft.peft_scheme": "the kind of object that is given as peft=",
    "model.peft.restore_from_path": (
        "AutoResume(adapter_path=...) is gone; load the adapter with the checkpoint it was saved in"
    ),
    "model.peft.lora_tuning.variant": "llm.peft.LoRA is nemo, llm.peft.CanonicalLoRA is canonical",
    "model.peft.lora_tuning.layer_selection": (
        "llm.peft.LoRA chooses layers by target_modules such as *.layers.0.*.linear_qkv"
    ),
    "model.peft.lora_tuning.weight_tying": "llm.peft.LoRA ties no weights",
    "model.peft.lora_tuning.position_embedding_strategy": "llm.peft.LoRA ties no weights",
    "model.peft.lora_tuning.*": "llm.peft.LoRA has no such argument",
    "model.peft.*": "NeMo 2.0 has LoRA, DoRA and CanonicalLoRA only",
    "model.data.train_ds.file_names": (
        "FineTuningDataModule(dataset_root=...) holds training.jsonl, validation.jsonl and "
        "test.jsonl"
    ),
    "model.data.train_ds.*": "FineTuningDataModule has no such argument",
    "model.data.validation_ds.*": _ONE_MODULE,
    "model.data.test_ds.*": _ONE_MODULE,
    "model.data.*": "the data module has no such argument",
    "model.optim.sched.*": "this schedule has no such argument",
    "model.optim.*": "OptimizerConfig has no such argument",
    "model.tokenizer.*": "get_nmt_tokenizer has no such argument",
    "model.nsys_profile*": "a callback: nemo.lightning.pytorch.callbacks.NsysCallback",
    "model.gc_interval": "a callback: nemo.lightning.pytorch.callbacks.GarbageCollectionCallback",
    "model.*_batch_size": "an argument of the data module, and the configuration names no data",
    "model.seed": "the data module's seed",
    "model.save_nemo_on_validation_end": _DIRECTORIES,
}
"""Patterns of keys without a counterpart that could be set for sure, and why. The first that
matches counts; see OTHER, too."""

TAKES = {
    "model.peft.lora_tuning.": "peft",
    "model.data.train_ds.": "finetuning",
    "model.data.": "pretraining",
    "model.optim.": "optimizer",
    "model.tokenizer.": "tokenizer",
    "trainer.": "trainer",
}
"""Where the keys of a section go. The first that matches counts."""

_OTHER = """
    get_attention_mask_from_fusion grad_div_ar_fusion grad_allreduce_chunk_size_mb onnx_safe
    pre_process post_process persist_layer_norm headscale transformer_block_type openai_gelu
    ffn_dropout normalize_attention_scores attention_type scale_positional_embedding reset_lr
    reset_lr_steps do_layer_norm_weight_decay use_scaled_init_method apex_transformer_log_level
    validation_param_sync_overlap num_micro_batches_with_partial_activation_checkpoints
    activations_checkpoint_layers_per_pipeline use_emha ub_tp_comm_overlap_cfg use_flash_attention
    enable_megatron_timers megatron_timer_kwargs.* precision target nemo_version megatron_legacy
    bias_gelu_fusion disable_kv_cache
"""
OTHER = [f"model.{name}" for name in _OTHER.split()]
"""Keys of NeMo 1.0's configurations of which nothing certain can be said."""
