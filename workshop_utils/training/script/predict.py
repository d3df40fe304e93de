"""Predictions by the script path: NeMo's ``megatron_gpt_generate`` on the rows of a file, with an
adapter or without."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.checkpoints.formats import lightning, saved_tensors
from workshop_utils.checkpoints.formats.architecture import section
from workshop_utils.checkpoints.formats.nemo_archive import read_config
from workshop_utils.checkpoints.formats.safe_text import read_yaml
from workshop_utils.core import chat_data, data_files, paths
from workshop_utils.core.errors import DataError, TrainingFailed, WorkshopError
from workshop_utils.runtime.device import Device, choose_device
from workshop_utils.training.runs.environment import torchrun, training_environment
from workshop_utils.training.runs.launch import failure_cause, run_logged
from workshop_utils.training.script import value_check
from workshop_utils.training.script.configuration import compose, defaults, plain, word
from workshop_utils.training.script.plan import (
    RENDERED_TEMPLATE,
    base_of,
    lightning_checkpoint,
    machine_settings,
    parse_overrides,
    require_sound_loads,
    tokenizer_of,
    what_is_deleted,
)
from workshop_utils.training.script.preflight import Preflight

if TYPE_CHECKING:
    from omegaconf import DictConfig

SCRIPT = Path(__file__).with_name("megatron_gpt_generate.py")
ROWS = ("label_key", "prompt_template", "add_bos", "add_eos", "add_sep", "truncation_field")
KINDS = ("lora_tuning", "adapter_tuning", "p_tuning", "ia3_tuning")
TEST = "model.data.test_ds"


def predict(
    overrides: Sequence[str],
    data: Path | None = None,
    out: Path | None = None,
    trust: bool = False,
    device: Device | None = None,
) -> Path:
    """Answer the rows of ``data`` and return the file of predictions: one ``{"input", "pred",
    "label"}`` a line, as NeMo writes it.

    ``overrides`` are those of ``megatron_gpt_generate``: ``model.restore_from_path`` is the base,
    ``model.peft.restore_from_path`` the adapter, or ``model.peft.restore_from_ckpt`` a Lightning
    checkpoint of its training. Without ``data`` they name the files
    (``model.data.test_ds.file_names``), which are taken as the adapter's training took its own.
    ``out``, or ``inference.outfile_path``, is where the predictions go (default:
    ``runs/predictions/ADAPTER-DATA.jsonl``).

    Raises:
        WorkshopError: an override is not known, the base cannot be loaded, or ``data`` is missing.
        DataError: a row is not usable.
        TrainingFailed: NeMo failed; with the cause from its log.
    """
    given = parse_overrides(list(overrides))
    base = base_of(given, SCRIPT, trust)
    if out and Path(out).is_dir():
        raise WorkshopError(f"--out: {paths.shown(out)} is a directory. Give a file.")
    if data and f"{TEST}.file_names" in given:
        raise WorkshopError(f"Both --data and {TEST}.file_names are given: leave one of them out.")
    if not data and f"{TEST}.file_names" not in given:
        raise WorkshopError(
            f"Nothing to answer: give --data FILE.jsonl, or {TEST}.file_names=[FILE.jsonl]."
        )
    device = device or choose_device()
    with (
        what_is_deleted(given),
        tempfile.TemporaryDirectory(prefix="workshop-predict-") as name,
    ):
        folder = Path(name)
        settings = machine_settings(device, 1) | {f"{TEST}.names": "[test]"}
        settings.pop("model.optim.name", None)
        if data:
            settings |= _rendered(base, data, folder / "test.jsonl")
        settings |= {
            f"{TEST}.output_file_path_prefix": str(folder / "answers"),
            f"{TEST}.index_mapping_dir": str(folder),
            **given,
            "model.restore_from_path": plain(str(base)),
        }
        # What the adapter says comes below the rest, and which one it is Hydra has to tell.
        config = compose(SCRIPT, list(starmap(word, settings.items())))
        require_sound_loads(config, base, trust)
        adapter = lightning_checkpoint(config) or config.model.peft.restore_from_path
        settings = _settings_of(adapter, rows=data is None) | settings
        words = list(starmap(word, settings.items()))
        config = compose(SCRIPT, words)
        Preflight(problems=list(_problems(config))).require()
        named = config.inference.outfile_path
        if named and out:
            raise WorkshopError(
                "Both --out and inference.outfile_path are given: leave one of them out."
            )
        log = paths.runs_dir() / "predictions" / "torchrun.log"
        print(f"NeMo answers; its log: {paths.shown(log)}", flush=True)
        environment = training_environment(folder, device=device)
        events = Path(environment["WORKSHOP_EVENTS"])
        if run_logged(torchrun(SCRIPT, words), environment, log, events, "answering", "batch"):
            raise TrainingFailed(f"{failure_cause(log)}\nThe whole log: {paths.shown(log)}")
        if f"{TEST}.output_file_path_prefix" in given:
            return Path(given[f"{TEST}.output_file_path_prefix"]).parent
        source, rows = (
            Path(adapter).stem if adapter else "base",
            Path(data).stem if data else "test",
        )
        target = Path(out or named or paths.runs_dir() / "predictions" / f"{source}-{rows}.jsonl")
        parts = sorted(folder.glob("answers_test_*_inputs_preds_labels.jsonl"))
        try:
            return paths.write_text(target, "".join(part.read_text("utf-8") for part in parts))
        except OSError as error:
            raise WorkshopError(
                f"{paths.shown(target)} cannot be written: {error.strerror}. Give another --out."
            ) from None


def _rendered(base: Path, data: Path, target: Path) -> dict[str, str]:
    """Put the rows of ``data`` into ``target``; the overrides that name them."""
    if base.is_file():
        raise WorkshopError(
            f"Rows cannot be rendered for a .nemo base: give {TEST}.file_names and prompt_template."
        )
    tokenizer = tokenizer_of(base, read_yaml(base / "model_config.yaml"))
    rendered = chat_data.render(data, tokenizer, target)
    rendered.write()
    print(*rendered.said, sep="\n", end="\n" * bool(rendered.said))
    return {
        f"{TEST}.file_names": json.dumps([str(target)]),
        f"{TEST}.prompt_template": RENDERED_TEMPLATE,
        f"{TEST}.tokens_to_generate": "48",
    }


def _settings_of(adapter: str | Path | None, rows: bool) -> dict[str, str]:
    """Overrides that repeat what ``adapter`` was trained with: with ``rows``, how they become
    tokens, which NeMo's own defaults repeat as well; and the kind of a Lightning checkpoint, which
    NeMo wants on the command line. Empty where the adapter does not say.
    """
    if not adapter or not (source := Path(adapter)).is_file():
        return {}
    settings: dict[str, Any] = {}
    if source.suffix == ".nemo":
        config = read_config(source)
    else:
        with source.open("rb") as file:
            state = saved_tensors.read_state(file, paths.shown(source))
        config, _ = lightning.configuration(source, state)
        peft, known = section(config, "peft"), defaults(SCRIPT).model.peft
        settings = {
            f"model.peft.{kind}.{key}": value
            for kind in KINDS
            for key, value in section(peft, kind).items()
            if key in known[kind]
        }
        settings["model.peft.peft_scheme"] = peft.get("peft_scheme", known.peft_scheme)
    if rows:
        train = section(section(config, "data"), "train_ds")
        settings |= {f"{TEST}.{key}": train[key] for key in ROWS if key in train}
    return {
        key: plain(value) if isinstance(value, str) else json.dumps(value)
        for key, value in settings.items()
    }


def _problems(config: "DictConfig") -> Iterator[str]:
    """What would fail after half a minute of imports."""
    if wrong := list(value_check.wrong_values(config, defaults(SCRIPT))):
        yield from wrong
        return
    model, test = config.model, config.model.data.test_ds
    for key in ("server", "web_server"):
        if config[key]:
            yield (
                f"{key} is true, but `workshop predict` answers a file. `workshop serve` answers "
                f"over HTTP, base and adapters. Leave {key} out."
            )
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if model[key] != 1:
            yield f"model.{key} is {model[key]}; predictions are made by one process. Leave it out."
    if test.global_batch_size % test.micro_batch_size:
        yield (
            f"model.global_batch_size {test.global_batch_size} is no multiple of "
            f"model.micro_batch_size {test.micro_batch_size}."
        )
    if (adapter := model.peft.restore_from_path) and not Path(adapter).is_file():
        yield (
            f"model.peft.restore_from_path: {paths.shown(adapter)} is a directory. Give the "
            ".nemo that a training wrote."
        )
    names, files = len(set(test.names)), len(test.file_names)
    if names != files:
        yield f"{TEST}.names has {names} names for {files} files."
    for name in test.file_names:
        try:
            data_files.lines(Path(name))
        except DataError as error:
            yield str(error)
