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
from workshop_utils.training import data_check
from workshop_utils.training.script import estimate, value_check
from workshop_utils.training.script.schemes import MODULES, SCHEMES, SECTIONS, lora_modules

if TYPE_CHECKING:
    from omegaconf import DictConfig


PRECISIONS = ("32", "32-true", "16", "16-mixed", "bf16", "bf16-mixed")
"""What ``torch_dtype_from_precision`` (NeMo 2.4.1) takes; "bf16" means bf16-mixed there."""

GPU_OPTIMIZERS = (
    "fused_adam",
    "megatron_fused_adam",
    "distributed_fused_adam",
    "mcore_distributed_optim",
    "lamb",
)
OPTIMIZERS = (
    "sgd",
    "adam",
    "adamw",
    "adadelta",
    "adamax",
    "adagrad",
    "rmsprop",
    "rprop",
    "novograd",
    "adafactor",
    "adan",
    *GPU_OPTIMIZERS,
)
"""What ``nemo/core/optim/optimizers.py`` (NeMo 2.4.1) knows, and Megatron-Core's own, which the
model handles itself."""

SCHEDULERS = (
    "WarmupPolicy",
    "WarmupHoldPolicy",
    "SquareAnnealing",
    "CosineAnnealing",
    "NoamAnnealing",
    "NoamHoldAnnealing",
    "WarmupAnnealing",
    "InverseSquareRootAnnealing",
    "T5InverseSquareRootAnnealing",
    "SquareRootAnnealing",
    "PolynomialDecayAnnealing",
    "PolynomialHoldDecayAnnealing",
    "StepLR",
    "ExponentialLR",
    "ReduceLROnPlateau",
    "CyclicLR",
)
"""``AVAILABLE_SCHEDULERS`` of ``nemo/core/optim/lr_scheduler.py`` (NeMo 2.4.1)."""


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
            raise WorkshopError(
                "\n".join(
                    ["this run would fail:", *(f"  - {problem}" for problem in self.problems)]
                )
            )


def preflight(
    config: "DictConfig",
    defaults: "DictConfig",
    sizes: Architecture | None,
    processes: int,
    run_dir: Path,
    tokenizer: ChatTokenizer | None,
    device: Device,
) -> Preflight:
    """Check ``config``, the composed configuration of the script, against its ``defaults``, the
    base's ``sizes`` and this machine.

    ``processes`` is ``--nproc_per_node``. Without a ``tokenizer`` (a ``.nemo`` base) tokens are not
    counted, and a fact says so.
    """
    found = Preflight(problems=list(value_check.wrong_values(config, defaults)))
    if found.problems:
        return found
    found.problems += place(run_dir)
    found.problems += steps(config, found.warnings)
    found.problems += optimization(config.model.optim)
    found.problems += monitors(config)
    found.problems += batches(config, processes, found.facts)
    found.problems += adapter(config, sizes)
    found.problems += parallel(config, sizes)
    found.problems += hardware(config, device, found.facts)
    counted = _data(config, tokenizer, found)
    if tokenizer and counted and not found.problems:
        train = counted[: len(config.model.data.train_ds.file_names)]
        shares = config.model.data.train_ds.concat_sampling_probabilities
        mean = sum(share * one.mean_tokens for share, one in zip(shares, train, strict=True))
        found.tokens_per_step = mean * config.model.global_batch_size
    if sizes and not found.problems:
        _resources(config, sizes, counted, run_dir, found)
    return found


def place(run_dir: Path) -> Iterator[str]:
    """Something can be made where the run goes."""
    parent = _existing(run_dir.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        yield (
            f"exp_manager.exp_dir: {paths.shown(parent)} is "
            f"{'no folder' if not parent.is_dir() else 'not writable'}. Give another place."
        )


def steps(config: "DictConfig", warnings: list[str]) -> Iterator[str]:
    """Validation, and the end of the warm-up, have to come up before the last step."""
    trainer, model = config.trainer, config.model
    if type(trainer.val_check_interval) is int and trainer.val_check_interval > trainer.max_steps:
        yield (
            f"trainer.val_check_interval is {trainer.val_check_interval}, but there are "
            f"{trainer.max_steps} steps: no checkpoint would be kept. Set "
            f"trainer.val_check_interval={max(1, trainer.max_steps // 3)}."
        )
    if model.get("resume_from_checkpoint"):
        yield (
            "model.resume_from_checkpoint: NeMo 2.4.1 reads it nowhere. Leave it out: the same "
            "command goes on from its last checkpoint."
        )
    if (
        warmup := (model.optim.get("sched") or {}).get("warmup_steps")
    ) and warmup >= trainer.max_steps:
        warnings.append(
            f"model.optim.sched.warmup_steps is {warmup}, but there are {trainer.max_steps} "
            "steps: model.optim.lr is never reached."
        )


def optimization(optim: "DictConfig") -> Iterator[str]:
    """NeMo knows the optimizer and the schedule by name."""
    schedule = (optim.get("sched") or {}).get("name")
    for key, name, known in (
        ("name", optim.name, OPTIMIZERS),
        ("sched.name", schedule, SCHEDULERS),
    ):
        if name is not None and name not in known:
            meant = did_you_mean(nearest(str(name), known, cutoff=0.5))
            yield f"model.optim.{key} is {name}.{meant} There are {', '.join(known)}."


def monitors(config: "DictConfig") -> Iterator[str]:
    """What checkpoints and early stopping go by has to be among what the script logs.

    ``MegatronGPTSFTModel.inference_epoch_end`` and ``_determine_log_key`` of NeMo 2.4.1. Else the
    first validation fails, and early stopping, which is not strict, never comes.
    """
    data = config.model.data.validation_ds
    metrics = {"loss", data.metric.name}
    known = [
        "val_loss",
        *sorted(f"validation_{metric}" for metric in metrics),
        "reduced_train_loss",
    ]
    of_one_file = tuple(f"validation_{metric}_" for metric in metrics)
    for callback, create in (
        ("checkpoint_callback_params", "create_checkpoint_callback"),
        ("early_stopping_callback_params", "create_early_stopping_callback"),
    ):
        monitor = config.exp_manager[callback].monitor
        if (
            config.exp_manager[create]
            and monitor not in known
            and not str(monitor).startswith(of_one_file)
        ):
            yield (
                f"exp_manager.{callback}.monitor is {monitor}, which the script does not log. "
                f"There are {', '.join(known)}, and {of_one_file[0]}NAME for one of several "
                "validation files."
            )


def batches(config: "DictConfig", processes: int, facts: list[str]) -> Iterator[str]:
    """Processes, model-parallel sizes and batch sizes have to divide each other."""
    model, trainer = config.model, config.trainer
    if trainer.devices != processes:
        yield (
            f"trainer.devices is {trainer.devices} but torchrun starts {processes} processes. "
            f"Give --nproc-per-node={trainer.devices}."
        )
    names = {
        "tensor_model_parallel_size": "TP",
        "pipeline_model_parallel_size": "PP",
        "context_parallel_size": "CP",
    }
    parts = {short: model.get(name, 1) for name, short in names.items()}
    if trainer.num_nodes != 1:
        yield (
            f"trainer.num_nodes is {trainer.num_nodes}; this command starts torchrun on this "
            "machine alone. Leave it out."
        )
    world, split = processes, parts["TP"] * parts["PP"] * parts["CP"]
    product = " x ".join(f"{short} {size}" for short, size in parts.items())
    if world % split:
        yield (
            f"{world} processes cannot be shared out: {product} needs a multiple of {split}. "
            "Start more, or lower these sizes."
        )
        return
    copies = world // split
    for where, settings in (
        ("model", model),
        *((f"model.data.{part}", model.data[part]) for part in ("train_ds", "validation_ds")),
    ):
        micro, whole = settings.micro_batch_size, settings.global_batch_size
        if whole % (micro * copies):
            nearest = max(1, round(whole / (micro * copies))) * micro * copies
            yield (
                f"{where}.global_batch_size {whole} is no multiple of micro batch {micro} x "
                f"{copies} data-parallel copies. Set {where}.global_batch_size={nearest}, or "
                f"another {where}.micro_batch_size."
            )
            return
    micro, whole = model.micro_batch_size, model.global_batch_size
    facts.append(
        f"batch: {whole} rows = {micro} a micro batch x {whole // (micro * copies)} accumulated "
        f"x {copies} data-parallel ({product})"
    )


def parallel(config: "DictConfig", sizes: Architecture | None) -> Iterator[str]:
    """Heads and layers have to be divisible by the parallel sizes."""
    model = config.model
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    if (
        model.get("context_parallel_size", 1) > 1
        and importlib.util.find_spec("transformer_engine") is None
    ):
        yield (
            "model.context_parallel_size: Megatron-Core splits the context only through "
            "Transformer Engine, which is not installed."
        )
    if model.get("sequence_parallel") and tensor == 1:
        yield "model.sequence_parallel needs model.tensor_model_parallel_size above 1."
    scheme = model.peft.peft_scheme
    if tensor * pipeline > 1 and scheme == "ptuning":
        yield (
            "model.peft.peft_scheme=ptuning with tensor- or pipeline-parallel size above 1: NeMo "
            "writes a part for each rank, and those of ptuning are not put together. Leave the "
            "sizes at 1: more processes are data-parallel then."
        )
    section = {"lora": "lora_tuning", "adapter": "adapter_tuning"}.get(scheme)
    if section and (rank := model.peft[section].adapter_dim) % tensor:
        yield (
            f"model.peft.{section}.adapter_dim {rank} is no multiple of "
            f"model.tensor_model_parallel_size {tensor}, which shares it out."
        )
    if not sizes:
        return
    for what, number in (
        ("attention heads", sizes.heads),
        ("key/value groups", sizes.groups),
        ("FFN columns", sizes.ffn),
    ):
        if number % tensor:
            fits = [
                size
                for size in range(1, tensor)
                if sizes.heads % size == 0 and sizes.groups % size == 0
            ]
            yield (
                f"model.tensor_model_parallel_size {tensor} does not divide the {number} {what}. "
                f"Possible below it: {fits}."
            )
            break
    if sizes.layers % pipeline:
        yield (
            f"model.pipeline_model_parallel_size {pipeline} does not divide the {sizes.layers} "
            "layers."
        )


def hardware(config: "DictConfig", device: Device, facts: list[str]) -> Iterator[str]:
    """Precision, and what only a GPU or its libraries can do; a fact says what stands in its
    place."""
    kind, optimizer, accelerator = (
        str(config.trainer.precision),
        config.model.optim.name,
        config.trainer.accelerator,
    )
    half = config.model.megatron_amp_O2
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
    if kind not in PRECISIONS:
        yield (
            f"trainer.precision is {kind!r}; there are {', '.join(PRECISIONS)}. bf16-mixed with "
            "model.megatron_amp_O2=true keeps weights in bf16."
        )
    elif half and not kind.startswith("bf16"):
        yield (
            f"model.megatron_amp_O2 works with bf16 alone; trainer.precision is {kind}. Set "
            "trainer.precision=bf16-mixed, or leave O2 out."
        )
    elif half:
        facts.append(
            "precision: weights in bf16, for the optimizer a copy in fp32 of those that are "
            "trained (O2)"
        )
    apex = optimizer != "mcore_distributed_optim" and importlib.util.find_spec("apex") is None
    if optimizer in GPU_OPTIMIZERS and (accelerator == "cpu" or apex):
        yield (
            f"model.optim.name is {optimizer}, which needs a GPU{' and Apex' * apex}. Leave it "
            f"out: adamw is taken{', the same sums' * ('adam' in optimizer)}."
        )
    if config.model.get("fsdp"):
        yield (
            "model.fsdp: sharding by FSDP is for GPUs, and the workshop has not tried it. Leave "
            "it out."
        )
    if (
        config.model.data.train_ds.get("packed_sequence")
        and importlib.util.find_spec("transformer_engine") is None
    ):
        yield (
            "model.data.train_ds.packed_sequence: only the attention of Transformer Engine, "
            "which is not installed, keeps the rows of a pack apart. Leave it out, and give the "
            "rows themselves."
        )


def adapter(config: "DictConfig", sizes: Architecture | None) -> Iterator[str]:
    """The adapter's settings."""
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
        and (not chosen or not all(1 <= number <= sizes.layers for number in chosen))
    ):
        yield (
            f"model.peft.{section}.layer_selection is {list(chosen)}; layers are numbered from 1 "
            f"to {sizes.layers}."
        )
    if peft.peft_scheme != "lora":
        return
    lora = peft.lora_tuning
    unknown = [target for target in lora.target_modules if target not in MODULES]
    if unknown or not lora.target_modules:
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
    theirs = (
        (nemo_archive.read_config(source).get("peft") or {}) if source.suffix == ".nemo" else {}
    )
    if (scheme := theirs.get("peft_scheme", peft.peft_scheme)) != peft.peft_scheme:
        yield (
            f"{where} is of the scheme {scheme}. Set model.peft.peft_scheme={scheme}, or leave "
            "it out."
        )
    elif peft.peft_scheme == "none" or (source.suffix == ".nemo" and not theirs):
        yield (
            f"{where} would be loaded as an adapter, and is none or is given to a full "
            "fine-tuning. Leave it out, or take it as the base."
        )
    elif section := SECTIONS.get(peft.peft_scheme):
        settings = theirs.get(section) or {}
        for key, what in (
            ("adapter_dim", "rank"),
            ("target_modules", "modules"),
            ("layer_selection", "layers"),
        ):
            his, ours = settings.get(key), peft[section].get(key)
            if key in settings and _resolved(his) != _resolved(ours):
                said = json.dumps(his).replace('"', "")
                yield (
                    f"{where} has {what} {said}; model.peft.{section}.{key} is {ours}. Set it to "
                    f"{said}."
                )
    if source.suffix == ".nemo" and (
        files := rank_files(member.name for member in nemo_archive.members(source))
    ):
        split, wanted = (
            sizes_of(files),
            (model.tensor_model_parallel_size, model.pipeline_model_parallel_size),
        )
        if split != wanted:
            merge = (
                (
                    f", or put its parts together: workshop export {paths.shown(source)} --to nemo "
                    "--reader nemo"
                )
                if wanted == (1, 1)
                else ""
            )
            yield (
                f"{where} holds the weights of TP {split[0]} x PP {split[1]}; NeMo looks for "
                f"those of TP {wanted[0]} x PP {wanted[1]}. Set "
                f"model.tensor_model_parallel_size={split[0]} and "
                f"model.pipeline_model_parallel_size={split[1]}{merge}."
            )


def _resolved(value: Any) -> Any:
    """``value`` of a key of an adapter's settings as it counts: a list in any order, with groups of
    modules resolved."""
    return value if value is None or isinstance(value, int) else sorted(lora_modules(list(value)))


def template(config: "DictConfig") -> data_check.Template:
    """How rows become tokens, by ``model.data.train_ds``."""
    data = config.model.data.train_ds
    fields = data.truncation_field.split(",") if data.truncation_field else []
    extra = sum(bool(data[name]) for name in ("add_bos", "add_eos", "add_sep"))
    if config.model.peft.peft_scheme == "ptuning":
        extra += config.model.peft.p_tuning.virtual_tokens
    return data_check.Template(
        data.prompt_template,
        data.label_key,
        tuple(fields),
        data.max_seq_length,
        extra,
        data.truncation_method,
    )


def _data(
    config: "DictConfig", tokenizer: ChatTokenizer | None, found: Preflight
) -> list[data_check.Counted]:
    """Count every data file; what cannot be read becomes a problem."""
    rule = template(config)
    if wrong := list(data_check.check_template(rule)):
        found.problems += wrong
        return []
    counted: list[data_check.Counted] = []
    files: dict[str, list[str]] = {}
    for part in ("train_ds", "validation_ds", "test_ds"):
        settings = config.model.data[part]
        from omegaconf import OmegaConf

        if OmegaConf.is_missing(settings, "file_names") or not settings.file_names:
            if part != "test_ds":
                found.problems.append(
                    f"model.data.{part}.file_names is missing: give ['FILE.jsonl'], or use --data."
                )
            continue
        files[part] = list(settings.file_names)
        if settings.get("packed_sequence"):
            found.facts.append(f"model.data.{part}: rows are not counted, they are packed")
            continue
        for file in files[part]:
            try:
                counted.append(data_check.count(Path(file), rule, tokenizer))
                found.facts.append(
                    f"{counted[-1]}{'' if tokenizer else ', the tokenizer is inside the .nemo'}"
                )
            except DataError as error:
                found.problems.append(str(error))
    found.problems += _mixture(config, files)
    for one in counted:
        if one.truncated:
            found.warnings.append(
                f"{paths.shown(one.path)}: {one.truncated:,} of {one.sampled:,} rows are longer "
                f"than {rule.max_seq_length} tokens and are cut, {one.answers_cut:,} of them in "
                f"the answer. model.data.train_ds.max_seq_length={one.longest} would hold all."
            )
    if not found.problems and not config.model.data.train_ds.get("packed_sequence"):
        for file in files.get("validation_ds", []):
            for train in files.get("train_ds", []):
                shared = (
                    data_check.common_rows(Path(train), Path(file), rule)
                    if Path(train) != Path(file)
                    else -1
                )
                if shared:
                    of = (
                        "is the training file itself"
                        if shared < 0
                        else f"repeats {shared:,} rows of {paths.shown(train)}"
                    )
                    found.warnings.append(
                        f"{paths.shown(file)} {of}: its loss will look better than the model is."
                    )
    return counted


def _mixture(config: "DictConfig", files: dict[str, list[str]]) -> Iterator[str]:
    """Sampling probabilities and names have to match the files."""
    train = files.get("train_ds", [])
    shares = config.model.data.train_ds.concat_sampling_probabilities
    if train and (shares is None or len(shares) != len(train)):
        even = ",".join([f"{1 / len(train):.3g}"] * len(train))
        yield (
            "model.data.train_ds.concat_sampling_probabilities needs one share for each of "
            f"{len(train)} files, for instance [{even}]."
        )
    elif train and (abs(sum(shares) - 1) > 1e-3 or min(shares) < 0):
        yield (
            f"model.data.train_ds.concat_sampling_probabilities is {list(shares)} and adds up to "
            f"{sum(shares):g}; it has to be 1, of shares that are not below 0."
        )
    for part in ("validation_ds", "test_ds"):
        names, of = config.model.data[part].names, files.get(part, [])
        if names is not None and of and (len(names) != len(of) or len(set(names)) != len(of)):
            yield f"model.data.{part}.names has {len(set(names))} names for {len(of)} files."


def _resources(
    config: "DictConfig",
    sizes: Architecture,
    counted: list[data_check.Counted],
    run_dir: Path,
    found: Preflight,
) -> None:
    """Memory, disk and time of the run beside what this machine has. Where no tokens were counted,
    memory is that of the longest row."""
    model, trainer = config.model, config.trainer
    trainable = estimate.trained(sizes, model.peft)
    most = model.data.train_ds.max_seq_length
    length = min(max(one.longest for one in counted), most) if found.tokens_per_step else most
    rounds, validated = _validations(config, counted)
    top = config.exp_manager.checkpoint_callback_params.save_top_k
    kept = (rounds if top < 0 else min(top, rounds)) + 1
    guess = estimate.estimate(
        sizes,
        trainable,
        not str(trainer.precision).startswith("32"),
        model.megatron_amp_O2,
        length * model.micro_batch_size,
        length,
        trained_tokens=(found.tokens_per_step or 0) * trainer.max_steps,
        validated_tokens=validated,
        split=model.tensor_model_parallel_size * model.pipeline_model_parallel_size,
        kept_checkpoints=kept,
    )
    found.facts.append(
        f"trainable: {guess.trainable:,} of {guess.parameters:,} weights "
        f"({guess.trainable / guess.parameters:.2%})"
    )
    bound = "" if found.tokens_per_step else "at most "
    found.facts.append(
        f"memory: {bound}about {guess.memory / 1e9:.1f} GB a process, plus 2 GB for Python and NeMo"
    )
    found.facts.append(
        f"disk: about {guess.disk / 1e6:,.0f} MB for {kept} checkpoints and the .nemo"
    )
    free = shutil.disk_usage(_existing(run_dir)).free
    if free < guess.disk:
        found.problems.append(
            f"{paths.shown(run_dir)}: about {guess.disk / 1e6:,.0f} MB are needed on disk, "
            f"{free / 1e6:,.0f} MB are free."
        )
    if trainer.accelerator == "cpu":
        _on_cpu(guess, trainer, found)


def _validations(config: "DictConfig", counted: list[data_check.Counted]) -> tuple[int, float]:
    """How often the run validates, and the tokens of all these validations."""
    trainer, data, batch = config.trainer, config.model.data, config.model.global_batch_size
    first, interval = len(data.train_ds.file_names), trainer.val_check_interval
    if type(interval) is not int:
        interval = max(
            1, int(interval * trainer.max_steps)
        )  # NeMo's epoch is the whole run, whatever the rows
    rounds, limit, tokens = (
        max(1, trainer.max_steps // interval),
        trainer.get("limit_val_batches", 1.0),
        0.0,
    )
    for one in counted[first : first + len(data.validation_ds.file_names)]:
        rows = min(one.rows, limit * batch) if type(limit) is int else limit * one.rows
        tokens += rounds * rows * one.mean_tokens
    return rounds, tokens


def _on_cpu(guess: estimate.Estimate, trainer: Any, found: Preflight) -> None:
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if found.tokens_per_step and guess.memory + 2e9 * trainer.devices > here:
        found.warnings.append(
            f"this machine has {here / 1e9:.0f} GB of memory: lower model.micro_batch_size or "
            "max_seq_length."
        )
    if found.tokens_per_step:
        minutes = guess.operations / estimate.operations_per_second() / 60
        found.facts.append(
            f"time: about {minutes:.1f} min for {trainer.max_steps} steps on these processors, "
            "after about 40 s of imports"
        )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
