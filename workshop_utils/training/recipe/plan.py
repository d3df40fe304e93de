"""From options to everything that follows from them: sizes, batches, places. Answers in
milliseconds; no torch, no NeMo."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import string
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from workshop_utils.core.errors import DataError, WorkshopError
from workshop_utils.core.paths import shown
from workshop_utils.inference.nemo2_engine import Limits, Sampling
from workshop_utils.runtime.device import choose_device
from workshop_utils.training.recipe import index
from workshop_utils.training.recipe.options import nearest

if TYPE_CHECKING:
    from workshop_utils.training.recipe.options import RecipeOptions
if TYPE_CHECKING:
    pass

if TYPE_CHECKING:
    from workshop_utils.training.recipe.dataset_config import HFDatasetConfig
    from workshop_utils.training.recipe.options import RecipeOptions

RUN = "nemo_logs"
"""Name of a run's directory in ``output_dir``."""

PROFILERS = ("enable_nsys_callback", "enable_pytorch_profiler", "enable_memory_profile")
DOLPHIN = {
    "hfdc_dataset_config": "flan1m-alpaca-uncensored",
    "hfdc_input_template": "### Instruction:\n{instruction}\n ### Input:\n{input}\n",
    "hfdc_output_template": "### Response:\n{output}",
}
"""What the default data set needs; another data set brings none of it along. The space before the
second heading is the reference's."""

LAYERS = (
    "linear_qkv",
    "linear_proj",
    "linear_fc1",
    "linear_fc2",
    "linear_q",
    "linear_kv",
    "linear_q_proj",
    "linear_q_down_proj",
    "linear_q_up_proj",
    "linear_kv_down_proj",
    "linear_kv_up_proj",
    "in_proj",
    "out_proj",
    "eh_proj",
    "output_layer",
)
"""Megatron-Core's linear layers: of attention and MLP, then of latent attention (DeepSeek), of
Mamba, and the last one."""
ONE_MACHINE = (
    "num_nodes is above 1, and `workshop recipe` trains on one machine: NeMo-Run's LocalExecutor "
    "starts the processes of one. Give finetune_recipe(resolved) of "
    "workshop_utils.training.recipe.build to a SlurmExecutor or another of NeMo-Run's executors."
)


@dataclass(frozen=True)
class Resolved:
    """The options, with their defaults filled in, and what follows from them. Paths are absolute.

    ``global_batch_size`` rows make one optimizer step: ``micro_batch_size`` x
    ``accumulate_grad_batches`` x ``data_parallel_size``. It is what NeMo's data module and sampler
    take; Lightning's own accumulation stays 1, because Megatron counts it already.
    """

    options: RecipeOptions
    recipe: index.Recipe
    world_size: int
    data_parallel_size: int
    global_batch_size: int
    dataset: HFDatasetConfig
    output_dir: Path
    nemo_ckpt_dir: Path
    data_dir: Path

    @property
    def run_dir(self) -> Path:
        """The run to test or to export: ``nemo_logs_dir``, else the one in ``output_dir``."""
        return (
            Path(self.options.nemo_logs_dir)
            if self.options.nemo_logs_dir
            else self.output_dir / RUN
        )

    @property
    def test_path(self) -> Path:
        """The rows to test: ``test_path``, else those of ``data_dir``."""
        return (
            Path(self.options.test_path) if self.options.test_path else self.data_dir / "test.jsonl"
        )


def resolve(options: RecipeOptions) -> Resolved:
    """Check ``options`` against one another and fill in what depends on several.

    Raises:
        WorkshopError: the recipe does not exist or cannot be fine-tuned, the ranks cannot be
            divided by the parallel sizes, two
            profilers are on, the learning rate would never get to its peak, a ratio leaves a split
            empty, no prompt could be answered, a full fine-tune is to be merged, a layer or a
            converter is not there, or a path has an unknown {placeholder}.
    """
    recipe = index.find(options.recipe_cls_name)
    options = _completed(options)
    _check_scheme(recipe, options.peft_scheme)
    world, data_parallel = _ranks(options)
    _check(options, recipe)
    output_dir, nemo_ckpt_dir, data_dir = _places(options)
    batch = options.micro_batch_size * options.accumulate_grad_batches * data_parallel
    resolved = Resolved(
        options,
        recipe,
        world,
        data_parallel,
        batch,
        dataset(options),
        output_dir,
        nemo_ckpt_dir,
        data_dir,
    )
    if options.device == "cpu":
        from workshop_utils.training.recipe.plan import require_possible

        require_possible(resolved)
    return resolved


def dataset(options: RecipeOptions) -> HFDatasetConfig:
    """The data set that the ``hfdc_`` options describe. Raises DataError, with the option's
    name."""
    from workshop_utils.training.recipe.dataset_config import HFDatasetConfig

    described = {
        name.removeprefix("hfdc_"): value
        for name, value in vars(options).items()
        if name.startswith("hfdc_")
    }
    try:
        return HFDatasetConfig(**described, seed=options.seed)
    except DataError as error:
        raise DataError(f"hfdc_{error}") from None


def _check_scheme(recipe: index.Recipe, scheme: str) -> None:
    if not recipe.schemes:
        raise WorkshopError(
            f"recipe_cls_name: NeMo {index.nemo_version()} has no fine-tuning recipe for "
            f"{recipe.name} that a model and a scheme are enough for. `workshop recipe --list` "
            "shows which have one."
        )
    if scheme not in recipe.schemes:
        raise WorkshopError(
            f"peft_scheme is {scheme}, but NeMo's recipe {recipe.name} takes only "
            f"{', '.join(recipe.schemes)}."
        )


def _completed(options: RecipeOptions) -> RecipeOptions:
    """``full_ft`` as a scheme; the default data set with its configuration and templates."""
    if options.full_ft:
        if options.peft_scheme == "dora":
            raise WorkshopError(
                "full_ft trains every weight and peft_scheme: dora an adapter: choose one of them."
            )
        options = replace(options, peft_scheme="full_ft")
    options = replace(options, full_ft=options.peft_scheme == "full_ft")
    if (
        options.hfdc_dataset_name == type(options).hfdc_dataset_name
        and not options.hfdc_custom_converter
    ):
        options = replace(
            options,
            **{name: value for name, value in DOLPHIN.items() if getattr(options, name) is None},
        )
    return options


def _ranks(options: RecipeOptions) -> tuple[int, int]:
    """World size, and how many copies of the model there are: world / (TP x PP x CP)."""
    tp, pp, cp = (
        options.tensor_parallel_size,
        options.pipeline_parallel_size,
        options.context_parallel_size,
    )
    world, model = options.num_nodes * options.gpus_per_node, tp * pp * cp
    have = (
        f"there are {world} processes (num_nodes {options.num_nodes} x gpus_per_node "
        f"{options.gpus_per_node})"
    )
    need = (
        f"one copy of the model takes {model} (tensor_parallel_size {tp} x "
        f"pipeline_parallel_size {pp} x context_parallel_size {cp})"
    )
    if world < model:
        raise WorkshopError(
            f"{have}, and {need}: the data-parallel size, and with it the global batch, would be "
            "0. Add processes or lower a size."
        )
    if world % model:
        raise WorkshopError(
            f"{have}, and {need}: {world % model} would be left over. Choose sizes whose product "
            f"divides {world}."
        )
    return world, world // model


def _check(options: RecipeOptions, recipe: index.Recipe) -> None:
    """What several options, and the recipe, say together."""
    own = recipe.schemes[options.peft_scheme]
    profilers = [name for name in PROFILERS if getattr(options, name)]
    if len(profilers) > 1:
        raise WorkshopError(
            f"{' and '.join(profilers)} are both on. Each would measure the others: switch on "
            "one profiler."
        )
    if (
        options.max_seq_length % (2 * options.context_parallel_size)
        and options.context_parallel_size > 1
    ):
        raise WorkshopError(
            f"max_seq_length {options.max_seq_length} must be a multiple of 2 x "
            f"context_parallel_size ({2 * options.context_parallel_size})."
        )
    if options.node_rank >= options.num_nodes:
        raise WorkshopError(
            f"node_rank is {options.node_rank}, but there are num_nodes {options.num_nodes}; "
            "they are numbered from 0."
        )
    if options.packed_sequence and options.micro_batch_size != 1:
        raise WorkshopError(
            "packed_sequence puts several rows into one sequence, so micro_batch_size must be "
            f"1, not {options.micro_batch_size}. Raise max_seq_length instead."
        )
    if options.val_check_interval > options.max_steps:
        raise WorkshopError(
            f"val_check_interval {options.val_check_interval} is above max_steps "
            f"{options.max_steps}: nothing would be validated, and so no checkpoint saved. Lower "
            "it."
        )
    warmup = own.get("warmup_steps") if options.warmup_steps is None else options.warmup_steps
    if warmup and warmup >= options.max_steps:
        whose = (
            f" (none: the {warmup} of {recipe.name})"
            if options.warmup_steps is None
            else f" {warmup}"
        )
        raise WorkshopError(
            f"warmup_steps{whose} must be below max_steps {options.max_steps}, or the learning "
            f"rate never gets to its peak. Set warmup_steps={options.max_steps // 10}, for "
            "example."
        )
    targets = options.lora_target_modules or own.get("lora_target_modules", ())
    _check_layers(targets)
    if (
        options.peft_scheme == "dora"
        and options.tensor_parallel_size > 1
        and not all(name.endswith("linear_qkv") for name in targets)
    ):
        # `DoRALinear._get_weight_norm` and `ParallelLinearDoRAAdapter.sharded_state_dict` of
        # nemo/collections/llm/peft/dora.py
        raise WorkshopError(
            f"peft_scheme is dora and tensor_parallel_size {options.tensor_parallel_size}: NeMo "
            f"{index.nemo_version()} takes the norm of linear_proj and linear_fc2 from each "
            "rank's columns alone, and saves the magnitudes of linear_fc1 in the order of the "
            "ranks, so that the adapter would compute something else once it is loaded. Set "
            "tensor_parallel_size=1 (pipeline_parallel_size may be more), "
            "lora_target_modules=linear_qkv, or peft_scheme=lora."
        )
    if options.use_modelopt:
        raise WorkshopError(
            "use_modelopt is for quantised models; this workshop has none, and ModelOpt does not "
            "run with its torch. Leave it out."
        )
    of_options(options)
    if options.full_ft and (options.no_merge or options.target == "nemo2"):
        raise WorkshopError(
            f"{'no_merge exports an adapter' if options.no_merge else 'target: nemo2 merges an adapter into its base'}, "  # noqa: E501
            "and a full fine-tune has none: its checkpoint is a whole NeMo 2.0 model. For "
            "Hugging Face leave no_merge out and set target: hf."
        )
    if options.target == "nemo2" and options.no_merge:
        raise WorkshopError(
            "no_merge exports an adapter for Hugging Face; with target: nemo2 the adapter is "
            "merged into the base. Choose one of them."
        )


def _check_layers(targets: Sequence[str]) -> None:
    """NeMo leaves out what matches no layer, without a word. ``targets`` are names, or patterns of
    whole names with ``*``."""
    for target in targets:
        word = target.rpartition(".")[2]
        if not fnmatch.filter(LAYERS, word):
            near = (
                nearest(word, list(LAYERS)) if word.startswith("lin") else ""
            )  # of q_proj the nearest would be in_proj
            raise WorkshopError(
                f"lora_target_modules: no layer of Megatron-Core is called {word}.{near} There "
                f"are {', '.join(LAYERS[:4])} (and in some models {', '.join(LAYERS[4:])}). "
                "Hugging Face's q_proj, k_proj and v_proj together are linear_qkv, o_proj is "
                "linear_proj, gate_proj and up_proj together are linear_fc1, down_proj is "
                "linear_fc2."
            )


def _places(options: RecipeOptions) -> tuple[Path, Path, Path]:
    train, rest = options.hfdc_train_split_ratio, 1 - options.hfdc_train_split_ratio
    shares = {
        "train": train,
        "val": rest * (1 - options.hfdc_val_test_split_ratio),
        "test": rest * options.hfdc_val_test_split_ratio,
    }
    known = {"hf_model_id": _as_folder(options.hf_model_id)}
    output_dir = _filled(options, "output_dir", known)
    known["output_dir"] = str(output_dir)
    known |= {
        "name": _as_folder(options.hfdc_dataset_name).replace("/", "_"),
        "config": _as_folder(options.hfdc_dataset_config or "default"),
    }
    known |= {
        name: "own" if "/" in options.hfdc_split else f"{round(100 * share, 2):g}"
        for name, share in shares.items()
    }
    return output_dir, _filled(options, "nemo_ckpt_dir", known), _filled(options, "data_dir", known)


def _as_folder(name: str) -> str:
    """A model or data set as folders of a path: its id, or the last part of a directory that lies
    elsewhere."""
    name = name.partition("://")[2] or name
    return (
        Path(name).resolve().name
        if name.startswith(("/", ".", "~")) or ".." in Path(name).parts
        else name.replace(":", "_")
    )


def _filled(options: RecipeOptions, option: str, known: dict[str, str]) -> Path:
    template = getattr(options, option)
    try:
        used = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise WorkshopError(f"{option} is {template!r}: {error}. Write {{{{ for a brace.") from None
    if unknown := [name for name in used if name not in known]:
        raise WorkshopError(
            f"{option} is {template!r}: {{{unknown[0]}}} is unknown. There are {', '.join(known)}."
        )
    return Path(os.path.abspath(os.path.expanduser(template.format(**known))))


def notices(resolved: Resolved) -> list[str]:
    """What is allowed and yet not what was meant, a sentence each."""
    from workshop_utils.training.recipe.callbacks import LEAST_STEPS

    options = resolved.options
    found = [ONE_MACHINE] if options.num_nodes > 1 else []
    if options.tensor_parallel_size * options.pipeline_parallel_size > 1:
        found.append(
            "test and export run on one process, whatever the parallel sizes: the whole model "
            "has to fit into one GPU, or this machine's memory."
        )
    return found + [
        (
            f"{name} records nothing in a run of fewer than {least} steps; max_steps is "
            f"{options.max_steps}."
        )
        for name, least in LEAST_STEPS.items()
        if getattr(options, name) and options.max_steps < least
    ]


def shown_values(resolved: Resolved) -> str:
    """Every value, ``name: value`` a line, as YAML that is one value a line; sizes and batches
    first, with what they are made of.

    What the options leave to the recipe is the recipe's number; null stands only where there is
    none.
    """
    options = resolved.options
    tp, pp, cp = (
        options.tensor_parallel_size,
        options.pipeline_parallel_size,
        options.context_parallel_size,
    )
    data_parallel = resolved.data_parallel_size
    head = [
        (
            f"# {resolved.recipe.name}: {resolved.recipe.config}, {resolved.recipe.layers} layers, "
            f"hidden size {resolved.recipe.hidden}"
        ),
        (
            f"# world = nodes {options.num_nodes} x GPUs {options.gpus_per_node}; data parallel = "
            f"world / (TP {tp} x PP {pp} x CP {cp})"
        ),
        (
            f"# global batch = micro {options.micro_batch_size} x accumulation "
            f"{options.accumulate_grad_batches} x data parallel {data_parallel}"
        ),
    ]
    values = {
        name: getattr(resolved, name)
        for name in ("world_size", "data_parallel_size", "global_batch_size")
    }
    own = resolved.recipe.schemes[options.peft_scheme]
    values |= {
        name: own.get(name) if value is None else value
        for name, value in dataclasses.asdict(options).items()
    }
    values |= {
        name: shown(getattr(resolved, name))
        for name in ("output_dir", "nemo_ckpt_dir", "data_dir", "test_path")
    }
    values |= {
        "nemo_logs_dir": shown(resolved.run_dir),
        "lora_target_modules": values["lora_target_modules"]
        and list(values["lora_target_modules"]),
    }
    return "\n".join([*head, *(f"{name}: {_on_one_line(value)}" for name, value in values.items())])


def _on_one_line(value: object) -> str:
    """``value`` as YAML without a line break."""
    import yaml

    style = '"' if isinstance(value, str) and "\n" in value else None
    text = yaml.safe_dump(
        value, default_flow_style=True, width=float("inf"), allow_unicode=True, default_style=style
    )
    return text.removesuffix("\n").removesuffix("\n...")


def on_cpu(resolved: Resolved) -> bool:
    """Whether this run is to be on a CPU: by the option ``device``, else by what the machine
    has."""
    return resolved.options.device == "cpu" or (
        resolved.options.device == "auto" and choose_device().kind == "cpu"
    )


def require_possible(resolved: Resolved) -> None:
    """Raise WorkshopError if this device cannot do what the options ask for. Needs no NeMo."""
    options = resolved.options
    if not on_cpu(resolved):
        return
    wrong = {
        f"precision={options.precision}": options.precision != "32"
        and "The CPU path is fp32: set precision=32, "
        "or begin with `--preset cpu`, which sets everything for a machine without a GPU.",
        f"context_parallel_size={options.context_parallel_size}": options.context_parallel_size > 1
        and (
            "Only Transformer Engine's attention takes part of a sequence, and it needs a GPU: "
            "set context_parallel_size=1."
        ),
        "packed_sequence": options.packed_sequence
        and (
            "Only Transformer Engine's attention keeps the rows of a sequence apart, and it "
            "needs a GPU: leave it out."
        ),
        "enable_nsys_callback": options.enable_nsys_callback
        and "It marks steps for a profiler of GPUs: use enable_pytorch_profiler.",
        "enable_memory_monitor": options.enable_memory_monitor
        and "It reads the memory of a GPU. Our events hold that of a process anyway.",
        "enable_memory_profile": options.enable_memory_profile
        and "It records the allocations of a GPU: use enable_pytorch_profiler.",
    }
    if found := [
        f"{option} is not possible on a CPU. {why}" for option, why in wrong.items() if why
    ]:
        raise WorkshopError("\n".join(found))


def of_options(options: RecipeOptions) -> tuple[Sampling, Limits]:
    """What ``options`` say about both. Raises WorkshopError where two of them contradict each
    other."""
    sampling, limits = (
        kind(**{one.name: getattr(options, one.name) for one in fields(kind)})
        for kind in (Sampling, Limits)
    )
    if sampling.num_tokens_to_generate >= limits.inference_max_seq_length:
        raise WorkshopError(
            f"num_tokens_to_generate is {sampling.num_tokens_to_generate} and "
            "inference_max_seq_length, which counts the prompt, too, "
            f"{limits.inference_max_seq_length}: no prompt would fit. Lower the first, or raise "
            "the second."
        )
    return sampling, limits
