"""A NeMo 1.0 configuration as NeMo 2.0 code: :func:`migrate` translates, :mod:`.code` prints.
Neither imports NeMo."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from workshop_utils.core.errors import WorkshopError
from workshop_utils.core.nearest import nearest
from workshop_utils.core.yaml_file import read_mapping
from workshop_utils.training.migrate.signatures import parameters, schedules
from workshop_utils.training.migrate.table import (
    FP8_ROWS,
    FP16_ROWS,
    OTHER,
    ROWS,
    WITHOUT,
    Code,
    Row,
)

SECTIONS = ("model", "trainer", "exp_manager")
_MIXED = {
    "bf16": "bf16-mixed",
    "bf16-mixed": "bf16-mixed",
    "16": "16-mixed",
    "16-mixed": "16-mixed",
}


@dataclass(frozen=True)
class Argument:
    """One argument of the code: its value, the YAML key that it comes from (or why it is there) and
    a remark."""

    value: Any
    source: str
    note: str = ""


@dataclass
class Migration:
    """``parts`` holds, for each target of :data:`.signatures.TARGETS` (and "schedule"), its
    arguments by name. ``left`` are the keys without a counterpart, each with its value and the
    reason; ``unset`` counts those that are null, which need none."""

    name: str
    parts: dict[str, dict[str, Argument]] = field(default_factory=dict)
    left: dict[str, tuple[Any, str]] = field(default_factory=dict)
    schedule: str | None = None
    finetuning: bool = False
    unset: int = 0

    def put(self, target: str, argument: str, value: Any, source: str, note: str = "") -> None:
        """Set an argument, or leave its key over where the installed version has no such
        argument."""
        if argument in parameters(target):
            self.parts.setdefault(target, {})[argument] = Argument(value, source, note)
        else:
            self.left[source] = (value, f"{target} of the installed version has no {argument}")

    def value(self, target: str, argument: str) -> Any:
        """What an argument was set to, or None."""
        found = self.parts.get(target, {}).get(argument)
        return found.value if found else None


def migrate(path: Path | str, allow_unknown: bool = False) -> Migration:
    """Translate the NeMo 1.0 configuration at ``path``: one of the scripts' YAML files, or the
    model_config.yaml of a ``.nemo``.

    Raises:
        WorkshopError: the file is no YAML, is another kind of file, an interpolation of it cannot
            be resolved, or (unless
            ``allow_unknown``) a key looks like a mistyped one; the message names the key.
    """
    path = Path(path)
    flat = _flat(_resolved(_read(path), path))
    made = Migration(
        path.name, finetuning=any(key.startswith("model.data.train_ds.") for key in flat)
    )
    used = (
        {"rows", "finetuning"}
        if made.finetuning
        else {"pretraining"}
        if "model.data.data_prefix" in flat
        else set()
    )
    rows = {
        row.key: row
        for row in ROWS
        if row.target in used or row.target not in ("rows", "finetuning", "pretraining")
    }
    rows |= _precision(made, flat)
    if not allow_unknown:
        _refuse_mistyped(path, flat, rows)
    _schedule(made, flat)
    for key, value in flat.items():
        if value is None:
            made.unset += 1
        elif value == "???":
            made.left[key] = (value, "has to be given")
        elif key in rows:
            _translate(made, rows[key], value)
        elif key not in _HANDLED and not (made.schedule and _in_schedule(made, key)):
            made.left[key] = (value, _reason(key) or "no key of NeMo 1.0 that is known here")
    _follow_up(made, flat)
    return made


_HANDLED = {
    "trainer.precision",
    "exp_manager.create_early_stopping_callback",
    "model.optim.sched.name",
    "model.fp8",
    "model.fp8_hybrid",
    "model.fp8_e4m3",
    "model.peft.peft_scheme",
    "model.peft.lora_tuning.variant",
    "model.data.train_ds.file_names",
}
"""Keys that several arguments follow from."""


def _read(path: Path) -> dict[str, Any]:
    tree = read_mapping(path)
    if "_target_" in tree:
        raise WorkshopError(
            f"{path}: _target_ is {tree['_target_']}: this is the model.yaml of a NeMo 2.0 "
            "checkpoint. It needs no migration."
        )
    if "architectures" in tree or "model_type" in tree:
        raise WorkshopError(
            f"{path} is the configuration of a Hugging Face model. `workshop import` converts "
            "such a model to NeMo 2.0."
        )
    if not any(section in tree for section in SECTIONS):
        if not any(f"model.{key}" in {row.key for row in ROWS} for key in tree):
            raise WorkshopError(
                f"{path} has none of the sections {', '.join(SECTIONS)}, nor keys of a model: it "
                "is no NeMo 1.0 configuration."
            )
        tree = {"model": tree}
    for section in SECTIONS:
        if not isinstance(tree.get(section, {}), dict):
            raise WorkshopError(
                f"{path}, {section}: is {tree[section]!r}; in NeMo 1.0 it is a mapping of settings."
            )
    return tree


def _resolved(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """``tree`` with its ``${...}`` filled in, NeMo 1.0's own arithmetic among them."""
    import math

    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for name, function in {
        "multiply": lambda *x: math.prod(x),
        "sum": lambda *x: sum(x),
        "div": lambda a, b: a / b,
        "int_div": lambda a, b: a // b,
    }.items():
        if not OmegaConf.has_resolver(name):
            OmegaConf.register_new_resolver(name, function)
    try:
        return OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        raise WorkshopError(
            f"{path}, {error.full_key or 'top level'}: {str(error).splitlines()[0]}. Put the "
            "value itself there."
        ) from None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values; a mapping that is one value (``model.data.data_prefix``) stays
    one."""
    flat = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and key != "model.data.data_prefix":
            flat |= _flat(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def _translate(made: Migration, row: Row, value: Any) -> None:
    if row.convert is not None:
        try:
            value = row.convert(value)
        except (KeyError, IndexError, TypeError, AttributeError):
            made.left[row.key] = (value, "this value has no counterpart")
            return
    for argument, one in (
        value if isinstance(value, dict) and row.convert else {row.argument: value}
    ).items():
        made.put(row.target, argument, one, row.key, row.note)


def _precision(made: Migration, flat: dict[str, Any]) -> dict[str, Row]:
    """Precision is an object of its own in NeMo 2.0; which further keys mean something depends on
    it."""
    precision, rows = flat.get("trainer.precision"), {}
    if precision is None or precision == "???":
        return rows
    if str(precision) in ("32", "32-true"):
        made.put("trainer", "precision", 32, "trainer.precision")
    elif str(precision) in _MIXED:
        mixed = _MIXED[str(precision)]
        made.put("precision", "precision", mixed, "trainer.precision")
        made.put(
            "optimizer", "bf16" if mixed == "bf16-mixed" else "fp16", True, "trainer.precision"
        )
        rows |= {row.key: row for row in FP16_ROWS if mixed == "16-mixed"}
        if flat.get("model.fp8"):
            made.put(
                "precision",
                "fp8",
                "hybrid" if flat.get("model.fp8_hybrid") else "e4m3",
                "model.fp8",
            )
            rows |= {row.key: row for row in FP8_ROWS}
    else:
        made.left["trainer.precision"] = (
            precision,
            "MegatronMixedPrecision has 16-mixed and bf16-mixed, Trainer 32",
        )
    return rows


def _schedule(made: Migration, flat: dict[str, Any]) -> None:
    """The schedule of the learning rate: a class for each of NeMo 1.0's names."""
    name = flat.get("model.optim.sched.name")
    if name is None:
        return
    if name not in schedules():
        made.left["model.optim.sched.name"] = (name, f"NeMo 2.0 has {', '.join(schedules())}")
        return
    made.schedule = name
    arguments = made.parts.setdefault("schedule", {})
    if (steps := flat.get("trainer.max_steps")) not in (None, "???"):
        arguments["max_steps"] = Argument(steps, "trainer.max_steps")
    prefix = "model.optim.sched."
    for key, value in flat.items():
        if value is not None and _in_schedule(made, key):
            arguments[key.removeprefix(prefix)] = Argument(value, key)


def _in_schedule(made: Migration, key: str) -> bool:
    return (
        key.startswith("model.optim.sched.")
        and key.removeprefix("model.optim.sched.") in schedules()[made.schedule]
    )


def _follow_up(made: Migration, flat: dict[str, Any]) -> None:
    """What NeMo 2.0 needs beside the translated keys, and parts that are switched off."""
    if made.value("strategy", "save_ckpt_format") == "zarr":
        made.put(
            "strategy",
            "ckpt_async_save",
            False,
            "model.dist_ckpt_format",
            "zarr is not saved asynchronously; NeMo 2.0 calls zarr deprecated",
        )
    if (made.value("strategy", "pipeline_model_parallel_size") or 1) > 1:
        dtype = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}.get(
            made.value("precision", "precision"), "float32"
        )
        made.put(
            "strategy",
            "pipeline_dtype",
            Code(f"torch.{dtype}"),
            "trainer.precision",
            "needed by pipelines",
        )
    for target, off, why in (
        (
            "stopping",
            not flat.get("exp_manager.create_early_stopping_callback"),
            "exp_manager.create_early_stopping_callback is off",
        ),
        (
            "checkpoint",
            flat.get("exp_manager.create_checkpoint_callback") is False,
            "exp_manager.create_checkpoint_callback is off",
        ),
        ("peft", _adapter(flat) is not None, _adapter(flat)),
    ):
        for argument in made.parts.pop(target, {}).values() if off else ():
            made.left[argument.source] = (argument.value, why)
    if "peft" in made.parts:
        if "dropout_position" not in made.parts["peft"]:
            made.put("peft", "dropout_position", "post", "NeMo 1.0's default", "NeMo 2.0's is pre")
    elif (scheme := flat.get("model.peft.peft_scheme")) not in (None, "none", "lora"):
        made.left["model.peft.peft_scheme"] = (scheme, WITHOUT["model.peft.*"])
    if "pretraining" in made.parts and not made.value("pretraining", "paths"):
        made.put("pretraining", "paths", ["DATA"], "model.data.data_prefix", "has to be given")
    if made.finetuning:
        files = flat.get("model.data.train_ds.file_names")
        first = files[0] if isinstance(files, list) and files else files
        folder = (
            str(PurePosixPath(first).parent)
            if isinstance(first, str) and first != "???"
            else "FOLDER"
        )
        made.put(
            "finetuning",
            "dataset_root",
            folder,
            "model.data.train_ds.file_names",
            "needs training.jsonl, validation.jsonl and test.jsonl in it",
        )


def _adapter(flat: dict[str, Any]) -> str | None:
    """Why there is no LoRA, or None where there is."""
    scheme, variant = (
        flat.get("model.peft.peft_scheme"),
        flat.get("model.peft.lora_tuning.variant") or "nemo",
    )
    if scheme not in ("lora", ["lora"]):
        return f"model.peft.peft_scheme is {scheme}"
    return (
        None
        if variant == "nemo"
        else f"variant is {variant}: see llm.peft.CanonicalLoRA, which takes other target_modules"
    )


def _reason(key: str) -> str | None:
    found = [why for pattern, why in WITHOUT.items() if fnmatchcase(key, pattern)]
    return (
        found[0]
        if found
        else "no certain counterpart"
        if any(fnmatchcase(key, pattern) for pattern in OTHER)
        else None
    )


def _refuse_mistyped(path: Path, flat: dict[str, Any], rows: dict[str, Row]) -> None:
    """Raises WorkshopError for a key that is none of NeMo 1.0's but nearly the name of one that is
    not in the file."""
    exact = {
        *rows,
        *_HANDLED,
        *(row.key for row in (*ROWS, *FP16_ROWS, *FP8_ROWS)),
        *(name for name in (*WITHOUT, *OTHER) if "*" not in name),
    }
    for key in flat:
        if key in exact or any(
            "*" in pattern and not pattern.endswith(".*") and fnmatchcase(key, pattern)
            for pattern in WITHOUT
        ):
            continue
        parent, _, last = key.rpartition(".")
        siblings = [
            one.rpartition(".")[2]
            for one in exact
            if one.rpartition(".")[0] == parent and one not in flat
        ]
        if near := nearest(last, siblings, cutoff=0.87):
            raise WorkshopError(
                f"{path}: {key} is no key of NeMo 1.0. Did you mean {parent}.{near[0]}? "
                "--allow-unknown goes on and lists it."
            )
