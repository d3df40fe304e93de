"""A NeMo 1.0 configuration as NeMo 2.0 code: :func:`migrate` translates, :mod:`.code` prints.
Neither imports NeMo."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from workshop_utils.core.errors import WorkshopError
from workshop_utils.core.nearest import nearest
from workshop_utils.core.yaml_file import read_mapping
from workshop_utils.training.migrate.signatures import (
    TARGETS,
    defaults,
    parameters,
    schedule_of_nemo1,
    schedules,
)
from workshop_utils.training.migrate.table import (
    DEFAULTS,
    FP8_ROWS,
    FP16_ROWS,
    OTHER,
    ROWS,
    TAKES,
    WEIGHT_DECAY,
    WITHOUT,
    Code,
    Row,
)

SECTIONS = ("model", "trainer", "exp_manager")
SCHEDULE = "model.optim.sched."
_MIXED = {"bf16": "bf16-mixed", "16": "16-mixed"}
_BY_DEFAULT = "NeMo 1.0's default"
_DATA = {"rows", "finetuning", "pretraining"}
"""Targets that depend on the kind of data."""


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
    reason; ``unset`` counts those that are null, which need none. ``no_peft`` says which PEFT has
    none: without it every weight would be trained."""

    name: str
    parts: dict[str, dict[str, Argument]] = field(default_factory=dict)
    left: dict[str, tuple[Any, str]] = field(default_factory=dict)
    schedule: str | None = None
    finetuning: bool = False
    unset: int = 0
    no_peft: str | None = None

    def put(self, target: str, argument: str, value: Any, source: str, note: str = "") -> None:
        """Set an argument, or leave its key over where the installed version has no such
        argument."""
        if argument in parameters(target):
            self.parts.setdefault(target, {})[argument] = Argument(value, source, note)
        else:
            self.left[source] = (value, f"{target} of the installed version has no {argument}")

    def value(self, target: str, argument: str) -> Any:
        """What an argument was set to, or None."""
        argument = self.parts.get(target, {}).get(argument)
        return argument.value if argument else None


def migrate(path: Path | str, allow_unknown: bool = False) -> Migration:
    """Translate the NeMo 1.0 configuration at ``path``: one of the scripts' YAML files, or the
    model_config.yaml of a ``.nemo``.

    Raises:
        WorkshopError: it is no such file, an interpolation of it cannot be resolved, or (unless
            ``allow_unknown``) a key looks like a mistyped one.
    """
    path = Path(path)
    flat = dict(_flat(_resolved(_read(path), path)))
    finetuning = any(key.startswith("model.data.train_ds.") for key in flat)
    result = Migration(path.name, finetuning=finetuning)
    unused = {"pretraining"} if finetuning else _DATA
    if not finetuning and "model.data.data_prefix" in flat:
        unused = _DATA - {"pretraining"}
    rows = {row.key: row for row in ROWS if row.target not in unused}
    rows |= {row.key: row for row in _precision(result, flat)}
    if not allow_unknown:
        _refuse_mistyped(path, flat, rows)
    _schedule(result, flat)
    for key, value in flat.items():
        if value is None:
            result.unset += 1
        elif value == "???":
            result.left[key] = (value, "has to be given")
        elif key in rows:
            _translate(result, rows[key], value)
        elif key not in _HANDLED and not (result.schedule and _in_schedule(result, key)):
            result.left[key] = (value, _reason(key))
    _follow_up(result, flat)
    return result


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
    named = tree.get("defaults")
    others = [each for each in (named if isinstance(named, list) else [named]) if each]
    if others := [each for each in others if each != "_self_" and "hydra" not in str(each)]:
        raise WorkshopError(
            f"{path}: defaults names {str(others[0])[:60]!r}, whose settings are not in this file. "
            "Give the composed configuration: the script's own command with --cfg job prints it."
        )
    if not any(section in tree for section in SECTIONS):
        if not {f"model.{key}" for key in tree} & {row.key for row in ROWS}:
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
    except RecursionError:
        raise WorkshopError(
            f"{path}: a mapping holds itself (an alias, *name). Take it out."
        ) from None
    except OmegaConfBaseException as error:
        raise WorkshopError(
            f"{path}, {error.full_key or 'top level'}: {str(error).splitlines()[0]}. Put the "
            "value itself there."
        ) from None


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; a mapping that is one value (``model.data.data_prefix``) stays
    one."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and key != "model.data.data_prefix":
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def _translate(result: Migration, row: Row, value: Any) -> None:
    arguments = {row.argument: value}
    if row.convert is not None:
        try:
            value = row.convert(value)
        except (KeyError, IndexError, TypeError, AttributeError):
            result.left[row.key] = (value, "this value has no counterpart")
            return
        arguments = value if isinstance(value, dict) else {row.argument: value}
    for argument, setting in arguments.items():
        result.put(row.target, argument, setting, row.key, row.note)


def _precision(result: Migration, flat: dict[str, Any]) -> list[Row]:
    """Precision is an object of its own in NeMo 2.0; which further keys mean something depends on
    it."""
    key = "trainer.precision"
    precision = str(flat.get(key))
    mixed = _MIXED.get(precision.removesuffix("-mixed"))
    if precision in ("None", "???"):
        return []
    if precision in ("32", "32-true"):
        result.put("trainer", "precision", 32, key)
    elif mixed:
        result.put("precision", "precision", mixed, key)
        result.put("optimizer", "bf16" if mixed == "bf16-mixed" else "fp16", True, key)
        rows = FP16_ROWS if mixed == "16-mixed" else []
        if not flat.get("model.fp8"):
            return rows
        kind = "hybrid" if flat.get("model.fp8_hybrid") else "e4m3"
        result.put("precision", "fp8", kind, "model.fp8")
        return rows + FP8_ROWS
    else:
        why = "MegatronMixedPrecision has 16-mixed and bf16-mixed, Trainer 32"
        result.left[key] = (flat[key], why)
    return []


def _schedule(result: Migration, flat: dict[str, Any]) -> None:
    """The schedule of the learning rate: a class for each of NeMo 1.0's names."""
    name = flat.get(f"{SCHEDULE}name")
    if name is None:
        return
    if not isinstance(name, str) or name not in schedules():
        result.left[f"{SCHEDULE}name"] = (name, f"NeMo 2.0 has {', '.join(schedules())}")
        return
    result.schedule = name
    arguments = result.parts.setdefault("schedule", {})
    if (steps := flat.get("trainer.max_steps")) not in (None, "???"):
        arguments["max_steps"] = Argument(steps, "trainer.max_steps")
    for key, value in flat.items():
        if value is not None and _in_schedule(result, key):
            arguments[key.removeprefix(SCHEDULE)] = Argument(value, key)
    was = schedule_of_nemo1(name)
    for argument, now in schedules()[name].items():
        if argument in was and argument not in arguments and was[argument] != now:
            said = f"NeMo 2.0's is {now}"
            arguments[argument] = Argument(was[argument], _BY_DEFAULT, said)


def _in_schedule(result: Migration, key: str) -> bool:
    return key.startswith(SCHEDULE) and key.removeprefix(SCHEDULE) in schedules()[result.schedule]


def _follow_up(result: Migration, flat: dict[str, Any]) -> None:
    """What NeMo 2.0 needs beside the translated keys, and parts that are switched off."""
    put, value = result.put, result.value
    if value("strategy", "save_ckpt_format") == "zarr":
        why = "zarr is not saved asynchronously; NeMo 2.0 calls zarr deprecated"
        put("strategy", "ckpt_async_save", False, "model.dist_ckpt_format", why)
    if (value("strategy", "pipeline_model_parallel_size") or 1) > 1:
        types = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}
        dtype = Code(f"torch.{types.get(value('precision', 'precision'), 'float32')}")
        put("strategy", "pipeline_dtype", dtype, "trainer.precision", "needed by pipelines")
    scheme = flat.get("model.peft.peft_scheme")
    variant = flat.get("model.peft.lora_tuning.variant") or "nemo"
    no_lora = None
    if scheme not in ("lora", ["lora"]):
        no_lora = f"model.peft.peft_scheme is {scheme}"
    elif variant != "nemo":
        no_lora = (
            f"variant is {variant}: see llm.peft.CanonicalLoRA, which takes other target_modules"
        )
    stops, saves = (
        f"exp_manager.create_{name}_callback" for name in ("early_stopping", "checkpoint")
    )
    parts = result.parts
    parts.setdefault("strategy", {})
    if flat.get(stops):
        parts.setdefault("stopping", {})
    if flat.get(saves, any(key.startswith("exp_manager.") for key in flat)):
        parts.setdefault("checkpoint", {})
    if result.finetuning:
        parts.setdefault("rows", {})
    for target, why in {
        "stopping": None if flat.get(stops) else f"{stops} is off",
        "checkpoint": f"{saves} is off" if flat.get(saves) is False else None,
        "peft": no_lora,
    }.items():
        for argument in result.parts.pop(target, {}).values() if why else ():
            result.left[argument.source] = (argument.value, why)
    if scheme not in (None, "none") and no_lora:
        result.no_peft = no_lora
    if no_lora is None:
        parts.setdefault("peft", {})
    elif scheme not in (None, "none", "lora"):
        result.left["model.peft.peft_scheme"] = (scheme, WITHOUT["model.peft.*"])
    _write_defaults(result, flat)
    if "pretraining" in result.parts and not value("pretraining", "paths"):
        put("pretraining", "paths", ["DATA"], "model.data.data_prefix", "has to be given")
    if result.finetuning:
        _batch_sizes(result, flat)
        key = "model.data.train_ds.file_names"
        files = flat.get(key)
        first = files[0] if isinstance(files, list) and files else files
        is_given = isinstance(first, str) and first != "???"
        folder = str(PurePosixPath(first).parent) if is_given else "FOLDER"
        needs = "needs training.jsonl, validation.jsonl and test.jsonl in it"
        put("finetuning", "dataset_root", folder, key, needs)


def _write_defaults(result: Migration, flat: dict[str, Any]) -> None:
    """Arguments for keys that are absent, where the two versions then do otherwise; and those keys
    without which NeMo 1.0 does not start."""
    parts, value = result.parts, result.value

    def put(target: str, argument: str, setting: Any) -> None:
        if argument not in parts[target] and (now := defaults(target)[argument]) != setting:
            result.put(target, argument, setting, _BY_DEFAULT, f"NeMo 2.0's is {now}")

    for target, settings in DEFAULTS.items():
        into = "precision" if target == "fp8" else target
        is_on = value("precision", "fp8") if target == "fp8" else into in parts
        # Without num_layers the model is loaded, with what it was trained with.
        if is_on and (target != "config" or "num_layers" in parts[target]):
            for argument, setting in settings.items():
                put(into, argument, setting)
    wanted = {}
    if "peft" in parts:
        if (rank := value("peft", "dim")) is not None:
            put("peft", "alpha", rank)
        names = {"adapter_dim": "dim", "adapter_dropout": "dropout"}
        wanted |= {f"model.peft.lora_tuning.{old}": ("peft", new) for old, new in names.items()}
    if "optimizer" in parts:
        wanted["model.optim.lr"] = ("optimizer", "lr")
        name = flat.get("model.optim.name") or "adam"
        if name == "adam" and value("optimizer", "weight_decay"):
            why = "torch's Adam added it to the gradient, Megatron's takes it off the weight"
            argument = parts["optimizer"]["weight_decay"]
            parts["optimizer"]["weight_decay"] = replace(argument, note=why)
        elif isinstance(name, str) and name in WEIGHT_DECAY:
            put("optimizer", "weight_decay", WEIGHT_DECAY[name])
        elif name == "mcore_distributed_optim":
            wanted["model.optim.weight_decay"] = ("optimizer", "weight_decay")
    if result.finetuning:
        wanted["model.data.train_ds.prompt_template"] = ("rows", "prompt_template")
        if "{text}" in str(value("rows", "prompt_template")):
            put("rows", "truncation_field", "text")
    for key, (target, argument) in wanted.items():
        if argument not in parts[target]:
            result.unset -= key in flat and flat[key] is None
            result.left[key] = (flat.get(key), "has to be given")


def _batch_sizes(result: Migration, flat: dict[str, Any]) -> None:
    """NeMo 1.0 trains with the batch of train_ds, which usually refers to the model's."""
    for name in ("micro_batch_size", "global_batch_size"):
        key, other = f"model.data.train_ds.{name}", f"model.{name}"
        size = flat.get(key)
        if size in (None, "???"):
            continue
        if size == flat.get(other):
            result.left[key] = (size, f"{other} says the same")
            continue
        del result.left[key]
        if flat.get(other) not in (None, "???"):
            result.left[other] = (flat[other], f"NeMo 1.0 trains with {key}")
        result.put("finetuning", name, size, key)


def _reason(key: str) -> str:
    reasons = [why for pattern, why in WITHOUT.items() if fnmatchcase(key, pattern)]
    if any(fnmatchcase(key, pattern) for pattern in OTHER):
        reasons.append("no certain counterpart")
    section, _, last = key.rpartition(".")
    target = next((TAKES[name] for name in TAKES if f"{section}." == name), None)
    if key not in WITHOUT and target and last in parameters(target):
        comes = [row.key for row in ROWS if (row.target, row.argument) == (target, last)]
        of = f"{comes[0]} becomes it" if comes else "set it there, if it means the same"
        reasons = [f"no key of NeMo 1.0 that is known here; {TARGETS[target][0]} has it: {of}"]
    return [*reasons, "no key of NeMo 1.0 that is known here"][0]


def _refuse_mistyped(path: Path, flat: dict[str, Any], rows: dict[str, Row]) -> None:
    """Raises WorkshopError for a key that is none of NeMo 1.0's but nearly the name of one that is
    not in the file."""
    exact = {*rows, *_HANDLED, *(row.key for row in (*ROWS, *FP16_ROWS, *FP8_ROWS))}
    exact |= {name for name in (*WITHOUT, *OTHER) if "*" not in name}
    patterns = [name for name in WITHOUT if "*" in name and not name.endswith(".*")]
    for key in flat:
        if key in exact or any(fnmatchcase(key, pattern) for pattern in patterns):
            continue
        parent, _, last = key.rpartition(".")
        absent = (name.rpartition(".") for name in exact if name not in flat)
        siblings = [name for above, _, name in absent if above == parent]
        if near := nearest(last, siblings, cutoff=0.87):
            raise WorkshopError(
                f"{path}: {key} is no key of NeMo 1.0. Did you mean {parent}.{near[0]}? "
                "--allow-unknown goes on and lists it."
            )
