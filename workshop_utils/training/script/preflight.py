"""Everything that can be known to go wrong before NeMo is imported: arithmetic, files, settings.
Takes under two seconds."""

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.checkpoints.formats import nemo_archive
from workshop_utils.checkpoints.formats.architecture import Architecture
from workshop_utils.checkpoints.formats.rank_files import rank_files
from workshop_utils.checkpoints.formats.rank_files import sizes as sizes_of
from workshop_utils.core import paths
from workshop_utils.core.chat_template import ChatTokenizer
from workshop_utils.core.errors import DataError, WorkshopError
from workshop_utils.core.nearest import did_you_mean, nearest
from workshop_utils.runtime.device import Device
from workshop_utils.runtime.machine import memory
from workshop_utils.training import data_check
from workshop_utils.training.script import estimate, value_check
from workshop_utils.training.script.schemes import MODULES, SCHEMES, SECTIONS, lora_modules

if TYPE_CHECKING:
    from omegaconf import DictConfig

PARTS = ("train_ds", "validation_ds", "test_ds")

PRECISIONS = ("32", "32-true", "16", "16-mixed", "bf16", "bf16-mixed")
"""What ``torch_dtype_from_precision`` (NeMo 2.4.1) takes; "bf16" means bf16-mixed there."""

# fmt: off
GPU_OPTIMIZERS = (
    "fused_adam", "megatron_fused_adam", "distributed_fused_adam", "mcore_distributed_optim",
    "lamb",
)
OPTIMIZERS = (
    "sgd", "adam", "adamw", "adadelta", "adamax", "adagrad", "rmsprop", "rprop", "novograd",
    "adafactor", "adan", *GPU_OPTIMIZERS,
)
"""What ``nemo/core/optim/optimizers.py`` (NeMo 2.4.1) knows, and Megatron-Core's own, which the
model handles itself."""

SCHEDULERS = (
    "WarmupPolicy", "WarmupHoldPolicy", "SquareAnnealing", "CosineAnnealing", "NoamAnnealing",
    "NoamHoldAnnealing", "WarmupAnnealing", "InverseSquareRootAnnealing",
    "T5InverseSquareRootAnnealing", "SquareRootAnnealing", "PolynomialDecayAnnealing",
    "PolynomialHoldDecayAnnealing", "StepLR", "ExponentialLR", "ReduceLROnPlateau", "CyclicLR",
)
"""``AVAILABLE_SCHEDULERS`` of ``nemo/core/optim/lr_scheduler.py`` (NeMo 2.4.1)."""
# fmt: on


@dataclass
class Preflight:
    """What was found: ``facts`` (a line each), ``problems`` (a sentence with its fix each) and
    ``warnings`` that stop nothing.

    ``tokens_per_step``: mean tokens of one optimizer step, padding aside; None where rows could not
    be counted.
    """

    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tokens_per_step: float | None = None

    def require(self) -> None:
        """Raise :class:`WorkshopError` with every problem, if there is one."""
        if self.problems:
            raise WorkshopError("\n  - ".join(["this run would fail:", *self.problems]))


def preflight(
    config: "DictConfig",
    defaults: "DictConfig",
    sizes: Architecture | None,
    processes: int,
    run_dir: Path,
    tokenizer: ChatTokenizer | None,
    device: Device,
    in_memory: dict[str, list[str]],
) -> Preflight:
    """Check ``config``, the composed configuration of the script, against its ``defaults``, the
    base's ``sizes`` and this machine.

    ``processes`` is ``--nproc_per_node``. Without a ``tokenizer`` (a ``.nemo`` base) tokens are not
    counted, and a fact says so. ``in_memory`` are the lines of data files that are not written yet.
    """
    seen = Preflight(problems=list(value_check.wrong_values(config, defaults)))
    if seen.problems:
        return seen
    seen.problems += _place(run_dir)
    seen.problems += _steps(config, seen.warnings)
    seen.problems += _names(config)
    seen.problems += _batches(config, processes, seen.facts)
    seen.problems += _adapter(config, sizes)
    seen.problems += _parallel(config, sizes)
    seen.problems += _hardware(config, device, seen.facts)
    counted = _data(config, tokenizer, in_memory, seen)
    if tokenizer and counted and not seen.problems:
        train = config.model.data.train_ds
        shares = zip(train.concat_sampling_probabilities, counted, strict=False)
        mean = sum(share * file.mean_tokens for share, file in shares)
        seen.tokens_per_step = mean * config.model.global_batch_size
    if sizes and not seen.problems:
        _resources(config, sizes, counted, run_dir, seen)
    return seen


def _is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def _place(run_dir: Path) -> Iterator[str]:
    parent = _existing(run_dir.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        what = "not writable" if parent.is_dir() else "no folder"
        yield f"exp_manager.exp_dir: {paths.shown(parent)} is {what}. Give another place."


def _steps(config: "DictConfig", warnings: list[str]) -> Iterator[str]:
    """Validation, and the end of the warm-up, have to come up before the last step."""
    model, trainer = config.model, config.trainer
    steps, interval = trainer.max_steps, trainer.val_check_interval
    there_are = f"but there are {steps} steps:"
    if type(interval) is int and interval > steps:
        key = "trainer.val_check_interval"
        kept = f"no checkpoint would be kept. Set {key}={max(1, steps // 3)}."
        yield f"{key} is {interval}, {there_are} {kept}"
    if model.get("resume_from_checkpoint"):
        yield (
            "model.resume_from_checkpoint: NeMo 2.4.1 reads it nowhere. Leave it out: the same "
            "command goes on from its last checkpoint."
        )
    warmup = (model.optim.get("sched") or {}).get("warmup_steps")
    if warmup and warmup >= steps:
        late = f"{there_are} model.optim.lr is never reached."
        warnings.append(f"model.optim.sched.warmup_steps is {warmup}, {late}")


def _names(config: "DictConfig") -> Iterator[str]:
    """NeMo knows the optimizer, the schedule and the metrics by name.

    What checkpoints and early stopping go by has to be among what the script logs
    (``MegatronGPTSFTModel.inference_epoch_end`` and ``_determine_log_key`` of NeMo 2.4.1). Else the
    first validation fails, and early stopping, which is not strict, never comes.
    """
    optim = config.model.optim
    schedule = (optim.get("sched") or {}).get("name")
    named = ("name", optim.name, OPTIMIZERS), ("sched.name", schedule, SCHEDULERS)
    for key, name, known in named:
        if name is not None and name not in known:
            meant = did_you_mean(nearest(str(name), known, cutoff=0.5))
            yield f"model.optim.{key} is {name}.{meant} There are {', '.join(known)}."
    metrics = sorted({"loss", config.model.data.validation_ds.metric.name})
    logged = ["val_loss", *(f"validation_{metric}" for metric in metrics), "reduced_train_loss"]
    of_one_file = tuple(f"{name}_" for name in logged[1:-1])
    for kind in ("checkpoint", "early_stopping"):
        monitor = config.exp_manager[f"{kind}_callback_params"].monitor
        is_logged = monitor in logged or str(monitor).startswith(of_one_file)
        if config.exp_manager[f"create_{kind}_callback"] and not is_logged:
            yield (
                f"exp_manager.{kind}_callback_params.monitor is {monitor}, which the script does "
                f"not log. There are {', '.join(logged)}, and {of_one_file[0]}NAME for one of "
                "several validation files."
            )


def _batches(config: "DictConfig", processes: int, facts: list[str]) -> Iterator[str]:
    """Processes, model-parallel sizes and batch sizes have to divide each other."""
    from omegaconf import OmegaConf

    model, trainer = config.model, config.trainer
    if (devices := trainer.devices) != processes:
        started = f"torchrun starts {processes} processes"
        yield f"trainer.devices is {devices} but {started}. Give --nproc-per-node={devices}."
    if (nodes := trainer.num_nodes) != 1:
        alone = "this command starts torchrun on this machine alone"
        yield f"trainer.num_nodes is {nodes}; {alone}. Leave it out."
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    context = model.get("context_parallel_size", 1)
    split, product = tensor * pipeline * context, f"TP {tensor} x PP {pipeline} x CP {context}"
    copies, rest = divmod(processes, split)
    if rest:
        needs = f"{product} needs a multiple of {split}. Start more, or lower these sizes."
        yield f"{processes} processes cannot be shared out: {needs}"
        return
    for where in ("model", "model.data.train_ds", "model.data.validation_ds"):
        settings = OmegaConf.select(config, where)
        micro, whole = settings.micro_batch_size, settings.global_batch_size
        if whole % (rows := micro * copies):
            yield (
                f"{where}.global_batch_size {whole} is no multiple of micro batch {micro} x "
                f"{copies} data-parallel copies. Set {where}.global_batch_size="
                f"{max(1, round(whole / rows)) * rows}, or another {where}.micro_batch_size."
            )
            return
    micro, whole = model.micro_batch_size, model.global_batch_size
    facts.append(
        f"batch: {whole} rows = {micro} a micro batch x {whole // (micro * copies)} accumulated "
        f"x {copies} data-parallel ({product})"
    )


def _parallel(config: "DictConfig", sizes: Architecture | None) -> Iterator[str]:
    """Heads and layers have to be divisible by the parallel sizes."""
    model, scheme = config.model, config.model.peft.peft_scheme
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    if model.get("context_parallel_size", 1) > 1 and _is_missing("transformer_engine"):
        yield (
            "model.context_parallel_size: Megatron-Core splits the context only through "
            "Transformer Engine, which is not installed."
        )
    if model.get("sequence_parallel") and tensor == 1:
        yield "model.sequence_parallel needs model.tensor_model_parallel_size above 1."
    if tensor * pipeline > 1 and scheme == "ptuning":
        yield (
            "model.peft.peft_scheme=ptuning: NeMo writes a part for each rank, and those of "
            "ptuning are not put together. Leave the parallel sizes at 1."
        )
    section = SECTIONS[scheme] if scheme in ("lora", "adapter") else None
    if section and (rank := model.peft[section].adapter_dim) % tensor:
        yield (
            f"model.peft.{section}.adapter_dim {rank} is no multiple of "
            f"model.tensor_model_parallel_size {tensor}, which shares it out."
        )
    if not sizes:
        return
    heads = {"attention heads": sizes.heads, "key/value groups": sizes.groups}
    divided = heads | {"FFN columns": sizes.ffn}
    if wrong := [f"{number} {what}" for what, number in divided.items() if number % tensor]:
        fits = [n for n in range(1, tensor) if not any(number % n for number in heads.values())]
        yield (
            f"model.tensor_model_parallel_size {tensor} does not divide the {wrong[0]}. Possible "
            f"below it: {fits}."
        )
    if sizes.layers % pipeline:
        what = f"the {sizes.layers} layers"
        yield f"model.pipeline_model_parallel_size {pipeline} does not divide {what}."


def _hardware(config: "DictConfig", device: Device, facts: list[str]) -> Iterator[str]:
    """Precision, and what only a GPU or its libraries can do; a fact says what stands in its
    place."""
    model, half, optimizer = config.model, config.model.megatron_amp_O2, config.model.optim.name
    precision, accelerator = str(config.trainer.precision), config.trainer.accelerator
    if accelerator == "cpu":
        facts.append(
            "cpu: trainer.accelerator=cpu and model.optim.name=adamw in place of the script's "
            "gpu and fused_adam (Apex); no fused kernels"
        )
    elif device.kind == "cpu":
        yield (
            f"trainer.accelerator is {accelerator}, but this plan is for the CPU "
            f"({device.reason}). Leave it out, or set WORKSHOP_DEVICE=gpu."
        )
    if precision not in PRECISIONS:
        yield (
            f"trainer.precision is {precision!r}; there are {', '.join(PRECISIONS)}. bf16-mixed "
            "with model.megatron_amp_O2=true keeps weights in bf16."
        )
    elif half and not precision.startswith("bf16"):
        yield (
            f"model.megatron_amp_O2 works with bf16 alone; trainer.precision is {precision}. Set "
            "trainer.precision=bf16-mixed, or leave O2 out."
        )
    elif half:
        facts.append(
            "precision: weights in bf16, for the optimizer a copy in fp32 of those that are "
            "trained (O2)"
        )
    apex = optimizer != "mcore_distributed_optim" and _is_missing("apex")
    if optimizer in GPU_OPTIMIZERS and (accelerator == "cpu" or apex):
        yield (
            f"model.optim.name is {optimizer}, which needs a GPU{' and Apex' * apex}. Leave it "
            f"out: adamw is taken{', the same sums' * ('adam' in optimizer)}."
        )
    if model.get("fsdp"):
        yield "model.fsdp: sharding by FSDP is for GPUs, and not tried here. Leave it out."
    if model.data.train_ds.get("packed_sequence") and _is_missing("transformer_engine"):
        yield (
            "model.data.train_ds.packed_sequence: only the attention of Transformer Engine, "
            "which is not installed, keeps the rows of a pack apart. Leave it out."
        )


def _adapter(config: "DictConfig", sizes: Architecture | None) -> Iterator[str]:
    peft = config.model.peft
    if peft.peft_scheme not in SCHEMES:
        yield f"model.peft.peft_scheme is {peft.peft_scheme!r}; there are {', '.join(SCHEMES)}."
        return
    if peft.restore_from_path:
        yield from _to_go_on_from(Path(peft.restore_from_path), config.model)
    section = SECTIONS.get(peft.peft_scheme)
    chosen = peft[section].layer_selection if section else None
    if (
        chosen is not None
        and sizes
        and not (chosen and 1 <= min(chosen) <= max(chosen) <= sizes.layers)
    ):
        numbered = f"layers are numbered from 1 to {sizes.layers}"
        yield f"model.peft.{section}.layer_selection is {list(chosen)}; {numbered}."
    targets = peft.lora_tuning.target_modules
    unknown = [target for target in targets if target not in MODULES]
    if peft.peft_scheme == "lora" and (unknown or not targets):
        yield (
            "model.peft.lora_tuning.target_modules names "
            f"{', '.join(map(str, unknown)) or 'nothing'}; there are {', '.join(MODULES)}. "
            "Hugging Face's names (q_proj, ...) are those of the exported adapter."
        )


def _to_go_on_from(source: Path, model: "DictConfig") -> Iterator[str]:
    """The adapter that training begins with has to be of the same scheme, rank, modules and layers,
    and split over as many ranks."""
    where, peft = f"model.peft.restore_from_path: {paths.shown(source)}", model.peft
    if not source.is_file():
        yield f"{where} is a directory. Give the .nemo that a training wrote."
        return
    is_nemo = source.suffix == ".nemo"
    theirs = (nemo_archive.read_config(source).get("peft") or {}) if is_nemo else {}
    section = SECTIONS.get(peft.peft_scheme)
    if (scheme := theirs.get("peft_scheme", peft.peft_scheme)) != peft.peft_scheme:
        yield f"{where} is of the scheme {scheme}: set model.peft.peft_scheme, or leave it out."
    elif peft.peft_scheme == "none" or (is_nemo and not theirs):
        yield (
            f"{where} is no adapter, or is given to a full fine-tuning. Leave it out, or take it "
            "as the base."
        )
    elif section:
        settings = theirs.get(section) or {}
        words = {"adapter_dim": "rank", "target_modules": "modules", "layer_selection": "layers"}
        for key, what in words.items():
            ours = peft[section].get(key)
            if key in settings and _resolved(settings[key]) != _resolved(ours):
                said = json.dumps(settings[key]).replace('"', "")
                here = f"model.peft.{section}.{key} is {ours}. Set it to {said}."
                yield f"{where} has {what} {said}; {here}"
    names = [member.name for member in nemo_archive.members(source)] if is_nemo else []
    run = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    if (files := rank_files(names)) and (split := sizes_of(files)) != run:
        export = f"workshop export {paths.shown(source)} --to nemo --reader nemo"
        yield (
            f"{where} holds the weights of TP {split[0]} x PP {split[1]}; NeMo looks for those of "
            f"TP {run[0]} x PP {run[1]}. Set model.tensor_model_parallel_size={split[0]} and "
            f"model.pipeline_model_parallel_size={split[1]}"
            f"{f', or put its parts together: {export}' * (run == (1, 1))}."
        )


def _resolved(value: Any) -> Any:
    """``value`` of a key of an adapter's settings as it counts: a list in any order, with groups of
    modules resolved."""
    return value if value is None or isinstance(value, int) else sorted(lora_modules(list(value)))


def _template(config: "DictConfig") -> data_check.Template:
    """How rows become tokens, by ``model.data.train_ds``."""
    data, peft = config.model.data.train_ds, config.model.peft
    fields = data.truncation_field.split(",") if data.truncation_field else []
    extra = sum(bool(data[name]) for name in ("add_bos", "add_eos", "add_sep"))
    if peft.peft_scheme == "ptuning":
        extra += peft.p_tuning.virtual_tokens
    return data_check.Template(
        data.prompt_template,
        data.label_key,
        tuple(fields),
        data.max_seq_length,
        extra,
        data.truncation_method,
    )


def _data(
    config: "DictConfig",
    tokenizer: ChatTokenizer | None,
    in_memory: dict[str, list[str]],
    seen: Preflight,
) -> list[data_check.Counted]:
    """Count every data file; what cannot be read becomes a problem."""
    from omegaconf import OmegaConf

    rule = _template(config)
    if wrong := list(data_check.check_template(rule)):
        seen.problems += wrong
        return []
    data, counted, lines = config.model.data, [], dict(in_memory)
    files: dict[str, list[str]] = {}
    for part in PARTS:
        if OmegaConf.is_missing(data[part], "file_names") or not data[part].file_names:
            if part != "test_ds":
                seen.problems.append(
                    f"model.data.{part}.file_names is missing: give ['FILE.jsonl'], or use --data."
                )
            continue
        files[part] = list(data[part].file_names)
        if data[part].get("packed_sequence"):
            seen.facts.append(f"model.data.{part}: rows are not counted, they are packed")
            continue
        for file in files[part]:
            try:
                if file not in lines:
                    lines[file] = data_check.read_lines(Path(file))
                counted.append(data_check.count(Path(file), rule, tokenizer, lines[file]))
                inside = "" if tokenizer else ", the tokenizer is inside the .nemo"
                seen.facts.append(f"{counted[-1]}{inside}")
            except DataError as error:
                seen.problems.append(str(error))
    seen.problems += _mixture(config, files)
    for file in counted:
        if file.truncated:
            seen.warnings.append(
                f"{paths.shown(file.path)}: {file.truncated:,} of {file.sampled:,} rows are longer "
                f"than {rule.max_seq_length} tokens and are cut, {file.answers_cut:,} of them in "
                f"the answer. model.data.train_ds.max_seq_length={file.longest} would hold all."
            )
    if not seen.problems and not data.train_ds.get("packed_sequence"):
        for file in map(Path, files.get("validation_ds", [])):
            for train in map(Path, files.get("train_ds", [])):
                of = "is the training file itself"
                if train != file:
                    shared = data_check.common_rows(train, file, rule, lines)
                    of = f"repeats {shared:,} rows of {paths.shown(train)}" if shared else ""
                if of:
                    seen.warnings.append(
                        f"{paths.shown(file)} {of}: its loss will look better than the model is."
                    )
    return counted


def _mixture(config: "DictConfig", files: dict[str, list[str]]) -> Iterator[str]:
    """Sampling probabilities and names have to match the files."""
    count, data = len(files.get("train_ds", [])), config.model.data
    key = "model.data.train_ds.concat_sampling_probabilities"
    shares = data.train_ds.concat_sampling_probabilities
    if count and (shares is None or len(shares) != count):
        even = ",".join([f"{1 / count:.3g}"] * count)
        yield f"{key} needs one share for each of {count} files, for instance [{even}]."
    elif count and (abs(sum(shares) - 1) > 1e-3 or min(shares) < 0):
        right = "it has to be 1, of shares that are not below 0"
        yield f"{key} is {list(shares)} and adds up to {sum(shares):g}; {right}."
    for part in PARTS[1:]:
        names, of = data[part].names, len(files.get(part, []))
        if names is not None and of and (len(names) != of or len(set(names)) != of):
            yield f"model.data.{part}.names has {len(set(names))} names for {of} files."


def _resources(
    config: "DictConfig",
    sizes: Architecture,
    counted: list[data_check.Counted],
    run_dir: Path,
    seen: Preflight,
) -> None:
    """Memory, disk and time of the run beside what this machine has. Where no tokens were counted,
    memory is that of the longest row."""
    model, trainer, tokens = config.model, config.trainer, seen.tokens_per_step
    length = model.data.train_ds.max_seq_length
    if tokens:
        length = min(length, max(file.longest for file in counted))
    rounds, validated = _validations(config, counted)
    top = config.exp_manager.checkpoint_callback_params.save_top_k
    kept = (rounds if top < 0 else min(top, rounds)) + 1
    guess = estimate.estimate(
        sizes,
        estimate.trained(sizes, model.peft),
        not str(trainer.precision).startswith("32"),
        model.megatron_amp_O2,
        length * model.micro_batch_size,
        length,
        trained_tokens=(tokens or 0) * trainer.max_steps,
        validated_tokens=validated,
        split=model.tensor_model_parallel_size * model.pipeline_model_parallel_size,
        kept_checkpoints=kept,
    )
    disk = f"about {guess.disk / 1e6:,.0f} MB"
    seen.facts += [
        f"trainable: {guess.trainable:,} of {guess.parameters:,} weights "
        f"({guess.trainable / guess.parameters:.2%})",
        f"memory: {'' if tokens else 'at most '}about {guess.memory / 1e9:.1f} GB a process, plus "
        "2 GB for Python and NeMo",
        f"disk: {disk} for {kept} checkpoints and the .nemo",
    ]
    free = shutil.disk_usage(_existing(run_dir)).free
    if free < guess.disk:
        seen.problems.append(
            f"{paths.shown(run_dir)}: {disk} are needed on disk, {free / 1e6:,.0f} MB are free."
        )
    if trainer.accelerator != "cpu" or not tokens:
        return
    if guess.memory + 2e9 * trainer.devices > memory():
        has = f"this machine has {memory() / 1e9:.0f} GB of memory"
        seen.warnings.append(f"{has}: lower model.micro_batch_size or max_seq_length.")
    minutes = guess.operations / estimate.operations_per_second() / 60
    seen.facts.append(
        f"time: about {minutes:.1f} min for {trainer.max_steps} steps on these processors, after "
        "about 40 s of imports"
    )


def _validations(config: "DictConfig", counted: list[data_check.Counted]) -> tuple[int, float]:
    """How often the run validates, and the tokens of all these validations."""
    trainer, data, batch = config.trainer, config.model.data, config.model.global_batch_size
    interval, limit = trainer.val_check_interval, trainer.get("limit_val_batches", 1.0)
    if type(interval) is not int:
        # NeMo's epoch is the whole run, whatever the rows.
        interval = max(1, int(interval * trainer.max_steps))
    rounds, first = max(1, trainer.max_steps // interval), len(data.train_ds.file_names)
    tokens = 0.0
    for file in counted[first : first + len(data.validation_ds.file_names)]:
        rows = min(file.rows, limit * batch) if type(limit) is int else limit * file.rows
        tokens += rounds * rows * file.mean_tokens
    return rounds, tokens
