"""From options to everything that follows from them: sizes, batches, places. Answers in
milliseconds and writes nothing; no torch, no NeMo."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from workshop_utils.core.errors import DataError, WorkshopError
from workshop_utils.core.paths import shown
from workshop_utils.inference import nemo2_engine
from workshop_utils.inference.sampling import Sampling
from workshop_utils.runtime.device import choose_device
from workshop_utils.training.recipe import index, options
from workshop_utils.training.recipe.dataset_config import HFDatasetConfig
from workshop_utils.training.recipe.options import RecipeOptions

RUN = "nemo_logs"
"""Name of a run's directory in ``output_dir``."""

PROFILERS = ("enable_nsys_callback", "enable_pytorch_profiler", "enable_memory_profile")
PROFILED_STEPS = (5, 10)
"""First and last step that a profiler looks at: the ones before warm up."""
SPEED_WINDOW = 10  # steps that the speed is the mean of
LEAST_STEPS = {
    "enable_nsys_callback": PROFILED_STEPS[1],
    "enable_pytorch_profiler": PROFILED_STEPS[1],
    "enable_speed_monitor": SPEED_WINDOW + 1,
}
"""Options that record nothing at all in a shorter run: a profiler writes when it stops, the speed
is logged when its window is full."""
DOLPHIN = {
    "hfdc_dataset_config": "flan1m-alpaca-uncensored",
    "hfdc_input_template": "### Instruction:\n{instruction}\n ### Input:\n{input}\n",
    "hfdc_output_template": "### Response:\n{output}",
}
"""What the default data set needs; another data set brings none of it along. The space before the
second heading is the reference's."""

LAYERS = (
    *("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),  # attention and MLP
    *("linear_q", "linear_kv", "linear_q_proj", "linear_q_down_proj", "linear_q_up_proj"),
    *("linear_kv_down_proj", "linear_kv_up_proj"),  # latent attention (DeepSeek)
    *("in_proj", "out_proj"),  # Mamba
    *("eh_proj", "output_layer"),
)
"""Megatron-Core's linear layers."""
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
        return Path(self.options.nemo_logs_dir or self.output_dir / RUN)

    @property
    def test_path(self) -> Path:
        """The rows to test: ``test_path``, else those of ``data_dir``."""
        return Path(self.options.test_path or self.data_dir / "test.jsonl")

    @property
    def device(self) -> str:
        """cpu or gpu: as the option ``device`` says, else what the machine has."""
        chosen = self.options.device
        return choose_device().kind if chosen == "auto" else chosen

    def engine(self) -> tuple[Sampling, nemo2_engine.EngineLimits]:
        """How to draw tokens, and what the engines may hold. Raises WorkshopError where options
        contradict each other."""
        given = self.options
        drawn = (given.temperature, given.top_k, given.top_p, given.num_tokens_to_generate)
        sampling = Sampling(*drawn, given.random_seed)
        names = [field.name for field in dataclasses.fields(nemo2_engine.EngineLimits)]
        limits = nemo2_engine.EngineLimits(**{name: getattr(given, name) for name in names})
        nemo2_engine.check(sampling, limits)
        return sampling, limits


def resolve(given: RecipeOptions) -> Resolved:
    """Check the options ``given`` against one another and fill in what depends on several.

    Raises:
        WorkshopError: the first thing that cannot be, with the options that contradict each other.
    """
    recipe = index.find(given.recipe_cls_name)
    given = _completed(given)
    _check_scheme(recipe, given.peft_scheme)
    world, data_parallel = _ranks(given)
    _check(given, recipe)
    batch = given.micro_batch_size * given.accumulate_grad_batches * data_parallel
    resolved = Resolved(
        given, recipe, world, data_parallel, batch, _dataset(given), *_places(given)
    )
    resolved.engine()
    if given.device == "cpu":
        require_possible(resolved)
    return resolved


def _dataset(given: RecipeOptions) -> HFDatasetConfig:
    described = {
        name.removeprefix("hfdc_"): value
        for name, value in vars(given).items()
        if name.startswith("hfdc_")
    }
    try:
        return HFDatasetConfig(**described, seed=given.seed)
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


def _completed(given: RecipeOptions) -> RecipeOptions:
    """``full_ft`` as a scheme; the default data set with its configuration and templates."""
    if given.full_ft and given.peft_scheme == "dora":
        raise WorkshopError(
            "full_ft trains every weight and peft_scheme: dora an adapter: choose one of them."
        )
    full = given.full_ft or given.peft_scheme == "full_ft"
    given = replace(given, full_ft=full, peft_scheme="full_ft" if full else given.peft_scheme)
    is_default = given.hfdc_dataset_name == options.default("hfdc_dataset_name")
    if not is_default or given.hfdc_custom_converter:
        return given
    missing = {name: value for name, value in DOLPHIN.items() if getattr(given, name) is None}
    return replace(given, **missing)


def _ranks(given: RecipeOptions) -> tuple[int, int]:
    """World size, and how many copies of the model there are: world / (TP x PP x CP)."""
    tp, pp = given.tensor_parallel_size, given.pipeline_parallel_size
    cp, world = given.context_parallel_size, given.num_nodes * given.gpus_per_node
    model = tp * pp * cp
    if world % model == 0:
        return world, world // model
    raise WorkshopError(
        f"there are {world} processes (num_nodes {given.num_nodes} x gpus_per_node "
        f"{given.gpus_per_node}), and one copy of the model takes {model} (tensor_parallel_size "
        f"{tp} x pipeline_parallel_size {pp} x context_parallel_size {cp}): "
        + (
            "the data-parallel size, and with it the global batch, would be 0. Add processes or "
            "lower a size."
            if world < model
            else f"{world % model} would be left over. Choose sizes whose product divides {world}."
        )
    )


def _check(given: RecipeOptions, recipe: index.Recipe) -> None:
    """What several options, and the recipe, say together."""
    own = recipe.schemes[given.peft_scheme]
    profilers = [name for name in PROFILERS if getattr(given, name)]
    multiple = 2 * given.context_parallel_size
    warmup = own.get("warmup_steps") if given.warmup_steps is None else given.warmup_steps
    whose = f" {warmup}" if given.warmup_steps else f" (none: the {warmup} of {recipe.name})"
    targets = given.lora_target_modules or own.get("lora_target_modules", ())
    _check_layers(targets)
    fused = all(name.endswith("linear_qkv") for name in targets)
    aim = "no_merge exports an adapter" if given.no_merge else "target: nemo2 merges an adapter"
    aim += "" if given.no_merge else " into its base"
    adapter = given.no_merge or given.target == "nemo2"
    never = given.val_check_interval > given.max_steps
    packed = given.packed_sequence and given.micro_batch_size != 1
    # `DoRALinear._get_weight_norm` and `ParallelLinearDoRAAdapter.sharded_state_dict` of
    # nemo/collections/llm/peft/dora.py
    dora = given.peft_scheme == "dora" and given.tensor_parallel_size > 1 and not fused
    reasons = {
        f"{' and '.join(profilers)} are both on. Each would measure the others: switch on one "
        "profiler.": len(profilers) > 1,
        f"max_seq_length {given.max_seq_length} must be a multiple of 2 x context_parallel_size "
        f"({multiple}).": given.context_parallel_size > 1 and given.max_seq_length % multiple,
        f"node_rank is {given.node_rank}, but there are num_nodes {given.num_nodes}; they are "
        "numbered from 0.": given.node_rank >= given.num_nodes,
        "packed_sequence puts several rows into one sequence, so micro_batch_size must be 1, not "
        f"{given.micro_batch_size}. Raise max_seq_length instead.": packed,
        f"val_check_interval {given.val_check_interval} is above max_steps {given.max_steps}: "
        "nothing would be validated, and so no checkpoint saved. Lower it.": never,
        f"warmup_steps{whose} must be below max_steps {given.max_steps}, or the learning rate "
        f"never gets to its peak. Set warmup_steps={given.max_steps // 10}, for example.": warmup
        and warmup >= given.max_steps,
        f"peft_scheme is dora and tensor_parallel_size {given.tensor_parallel_size}: NeMo "
        f"{index.nemo_version()} takes the norm of linear_proj and linear_fc2 from each rank's "
        "columns alone, and saves the magnitudes of linear_fc1 in the order of the ranks, so that "
        "the adapter would compute something else once it is loaded. Set tensor_parallel_size=1 "
        "(pipeline_parallel_size may be more), lora_target_modules=linear_qkv, or "
        "peft_scheme=lora.": dora,
        "use_modelopt is for quantised models; this workshop has none, and ModelOpt does not run "
        "with its torch. Leave it out.": given.use_modelopt,
        f"{aim}, and a full fine-tune has none: its checkpoint is a whole NeMo 2.0 model. For "
        "Hugging Face leave no_merge out and set target: hf.": given.full_ft and adapter,
        "no_merge exports an adapter for Hugging Face; with target: nemo2 the adapter is merged "
        "into the base. Choose one of them.": given.target == "nemo2" and given.no_merge,
    }
    for reason, wrong in reasons.items():
        if wrong:
            raise WorkshopError(reason)


def _check_layers(targets: Sequence[str]) -> None:
    """NeMo leaves out what matches no layer, without a word. ``targets`` are names, or patterns of
    whole names with ``*``."""
    for target in targets:
        word = target.rpartition(".")[2]
        if not fnmatch.filter(LAYERS, word):
            # Of q_proj the nearest would be in_proj.
            near = options.nearest(word, list(LAYERS)) if word.startswith("lin") else ""
            raise WorkshopError(
                f"lora_target_modules: no layer of Megatron-Core is called {word}.{near} There "
                f"are {', '.join(LAYERS[:4])} (and in some models {', '.join(LAYERS[4:])}). "
                "Hugging Face's q_proj, k_proj and v_proj together are linear_qkv, o_proj is "
                "linear_proj, gate_proj and up_proj together are linear_fc1, down_proj is "
                "linear_fc2."
            )


def _places(given: RecipeOptions) -> tuple[Path, Path, Path]:
    """``output_dir``, ``nemo_ckpt_dir`` and ``data_dir``."""
    train, rest = given.hfdc_train_split_ratio, 1 - given.hfdc_train_split_ratio
    test = rest * given.hfdc_val_test_split_ratio
    shares = {"train": train, "val": rest - test, "test": test}
    known = {"hf_model_id": _as_folder(given.hf_model_id)}
    output_dir = _filled(given, "output_dir", known)
    known |= {
        "output_dir": str(output_dir),
        "name": _as_folder(given.hfdc_dataset_name).replace("/", "_"),
        "config": _as_folder(given.hfdc_dataset_config or "default"),
    }
    for name, share in shares.items():
        known[name] = "own" if "/" in given.hfdc_split else f"{round(100 * share, 2):g}"
    return output_dir, _filled(given, "nemo_ckpt_dir", known), _filled(given, "data_dir", known)


def _as_folder(name: str) -> str:
    """A model or data set as folders of a path: its id, or the last part of a directory that lies
    elsewhere."""
    name = name.partition("://")[2] or name
    if name.startswith(("/", ".", "~")) or ".." in Path(name).parts:
        return Path(name).resolve().name
    return name.replace(":", "_")


def _filled(given: RecipeOptions, option: str, known: dict[str, str]) -> Path:
    template = getattr(given, option)
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
    given = resolved.options
    lines = [ONE_MACHINE] if given.num_nodes > 1 else []
    if given.tensor_parallel_size * given.pipeline_parallel_size > 1:
        lines.append(
            "test and export run on one process, whatever the parallel sizes: the whole model "
            "has to fit into one GPU, or this machine's memory."
        )
    return lines + [
        f"{name} records nothing in a run of fewer than {least} steps; max_steps is "
        f"{given.max_steps}."
        for name, least in LEAST_STEPS.items()
        if getattr(given, name) and given.max_steps < least
    ]


def shown_values(resolved: Resolved) -> str:
    """Every value, ``name: value`` a line, as YAML that is one value a line; sizes and batches
    first, with what they are made of.

    What the options leave to the recipe is the recipe's number; null stands only where there is
    none.
    """
    given, recipe = resolved.options, resolved.recipe
    sizes = ("world_size", "data_parallel_size", "global_batch_size")
    values = {name: getattr(resolved, name) for name in sizes}
    own = recipe.schemes[given.peft_scheme]
    for name, value in dataclasses.asdict(given).items():
        values[name] = own.get(name) if value is None else value
    for name in ("output_dir", "nemo_ckpt_dir", "data_dir", "test_path"):
        values[name] = shown(getattr(resolved, name))
    values["nemo_logs_dir"] = shown(resolved.run_dir)
    targets = values["lora_target_modules"]
    values["lora_target_modules"] = targets and list(targets)
    head = (
        f"# {recipe.name}: {recipe.config}, {recipe.layers} layers, hidden size {recipe.hidden}\n"
        f"# world = nodes {given.num_nodes} x GPUs {given.gpus_per_node}; data parallel = world / "
        f"(TP {given.tensor_parallel_size} x PP {given.pipeline_parallel_size} x CP "
        f"{given.context_parallel_size})\n"
        f"# global batch = micro {given.micro_batch_size} x accumulation "
        f"{given.accumulate_grad_batches} x data parallel {resolved.data_parallel_size}"
    )
    return "\n".join([head, *(f"{name}: {_on_one_line(value)}" for name, value in values.items())])


def _on_one_line(value: object) -> str:
    """``value`` as YAML without a line break."""
    import yaml

    style = '"' if isinstance(value, str) and "\n" in value else None
    form = {"default_flow_style": True, "width": float("inf"), "allow_unicode": True}
    text = yaml.safe_dump(value, default_style=style, **form)
    return text.removesuffix("\n").removesuffix("\n...")


def require_possible(resolved: Resolved) -> None:
    """Raise WorkshopError if this device cannot do what the options ask for. Needs no NeMo."""
    given = resolved.options
    if resolved.device == "gpu":
        return
    fused = "Only Transformer Engine's attention"
    reasons = {
        f"precision={given.precision}": given.precision != "32"
        and "The CPU path is fp32: set precision=32, or begin with `--preset cpu`, which sets "
        "everything for a machine without a GPU.",
        f"context_parallel_size={given.context_parallel_size}": given.context_parallel_size > 1
        and f"{fused} takes part of a sequence, and it needs a GPU: set context_parallel_size=1.",
        "packed_sequence": f"{fused} keeps the rows of a sequence apart, and it needs a GPU: leave "
        "it out.",
        "enable_nsys_callback": "It marks steps for a profiler of GPUs: use "
        "enable_pytorch_profiler.",
        "enable_memory_monitor": "It reads the memory of a GPU. Our events hold that of a process "
        "anyway.",
        "enable_memory_profile": "It records the allocations of a GPU: use "
        "enable_pytorch_profiler.",
    }
    if wrong := [
        f"{option} is not possible on a CPU. {reason}"
        for option, reason in reasons.items()
        if reason and getattr(given, option, True)
    ]:
        raise WorkshopError("\n".join(wrong))
