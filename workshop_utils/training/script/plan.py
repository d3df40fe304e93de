"""From a few settings to the exact torchrun command: defaults of this machine and this data set,
then the user's overrides. Nothing is written: the rows that are rendered stay in memory."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.checkpoints.formats.architecture import section
from workshop_utils.checkpoints.formats.nemo1_config import architecture
from workshop_utils.checkpoints.formats.nemo_archive import read_config
from workshop_utils.checkpoints.formats.safe_text import read_yaml
from workshop_utils.checkpoints.formats.summary import Kind
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.core import chat_data, paths
from workshop_utils.core.chat_template import ChatTokenizer
from workshop_utils.core.errors import DataError, NotACheckpoint, WorkshopError
from workshop_utils.core.hashing import of_contents, sampled, sha256
from workshop_utils.runtime.device import Device, choose_device
from workshop_utils.training import data_report
from workshop_utils.training.runs.environment import notes, torchrun, training_environment
from workshop_utils.training.runs.run_record import Run
from workshop_utils.training.script.configuration import (
    compose,
    defaults,
    plain,
    refuse_mistyped,
    unreadable,
    word,
)
from workshop_utils.training.script.preflight import PARTS, Preflight, preflight

if TYPE_CHECKING:
    from omegaconf import DictConfig

RECIPE = {
    "trainer.max_steps": 51,
    "trainer.val_check_interval": 17,
    "trainer.limit_val_batches": 6,
    "model.global_batch_size": 8,
    "model.micro_batch_size": 8,
    "model.peft.peft_scheme": "lora",
    "model.peft.lora_tuning.target_modules": "[attention_qkv]",
    "model.peft.lora_tuning.adapter_dim": 32,
    "model.peft.lora_tuning.alpha": 64,
    "model.optim.lr": "2e-3",
    "model.optim.sched.warmup_steps": 8,
    "model.data.train_ds.max_seq_length": 512,
}
"""What the workshop trains its rendered rows with when nothing else is said; measured in notebooks
05 and 06. With files of one's own in ``model.data.train_ds.file_names`` the command line is NeMo's,
and the script's defaults hold."""

RENDERED_TEMPLATE = "'{input}{output}'"
"""How rows of :func:`workshop_utils.core.chat_data.render` are glued, as an override;
validation and test follow train_ds."""

_STARTS = ("model.peft.restore_from_path", "exp_manager.resume_from_checkpoint")
"""Overrides that name what else than the base a run starts from."""

_PLACES = (
    "file_names",
    "index_mapping_dir",
    "restore_from_path",
    "exp_manager.exp_dir",
    _STARTS[1],
)
"""Ends of overrides that say where something lies: its contents are looked at, or it is where the
run goes."""
_RUN_PLACE = ("exp_dir", "name", "explicit_log_dir")
SCRIPT = Path(__file__).with_name("megatron_gpt_finetuning.py")
SCRIPT_PATH_BASES = (Kind.BRIDGED_VIEW, Kind.NEMO1_DIRECTORY, Kind.NEMO1_ARCHIVE)
UPSTREAM_SCRIPT = Path("examples/nlp/language_modeling/tuning/megatron_gpt_finetuning.py")


@dataclass
class Plan(Run):
    """Everything that is known before training starts.

    ``data`` are the rows that were rendered, for training and for validation; ``makes_tickets``
    says that they are the workshop's own, which are not there yet.
    """

    command: list[str]
    environment: dict[str, str]
    overrides: dict[str, str | None]
    run_dir: Path
    device: Device
    config: "DictConfig"
    preflight: Preflight
    data: list[chat_data.Rendered] = field(default_factory=list)
    makes_tickets: bool = False

    again = "--fresh, or fresh=True"
    elsewhere = "give the run another --name"
    result = "its adapter"

    @property
    def adapter(self) -> Path:
        """The ``.nemo`` that NeMo writes at the end."""
        return self.run_dir / "checkpoints" / f"{self.run_dir.name}.nemo"

    def is_there(self) -> bool:
        return self.adapter.exists()

    @property
    def seed(self) -> int:
        return self.config.model.seed

    def write_rows(self) -> None:
        """Put the rendered rows where the command looks for them. Raises WorkshopError where
        nothing can be written."""
        try:
            if self.makes_tickets:
                chat_data.make_tickets()
            for rendered in self.data:
                rendered.write()
        except OSError as error:
            raise WorkshopError(
                f"{paths.shown(self.data[0].path.parent)} cannot be written: {error.strerror}. "
                "Make room, or set WORKSHOP_ROOT."
            ) from None

    def fingerprint(self) -> dict:
        """What decides the outcome: overrides, script, data, base and the adapter to go on from.
        Equal fingerprints, equal runs on one machine.

        Files count by their contents and not by their places, so that a run is known again in a
        copy of the repository.
        """
        from omegaconf import OmegaConf

        starts = [OmegaConf.select(self.config, key) for key in _STARTS]
        to_be_written = {str(rows.path): {"": sampled(rows.content)} for rows in self.data}
        data = self.config.model.data
        return {
            "overrides": {
                key.lstrip("+"): value
                for key, value in self.overrides.items()
                if not key.endswith(_PLACES)
            },
            "script": sha256(script_path()),
            "data": {
                part: [
                    to_be_written.get(name) or of_contents(Path(name))
                    for name in data[part].get("file_names") or []
                ]
                for part in PARTS
            },
            "base": _contents_of_base(Path(self.overrides["model.restore_from_path"])),
            "starts": [of_contents(Path(path)) if path else None for path in starts],
        }

    def __str__(self) -> str:
        """The command as one would type it in the repository's root; ``torchrun`` is ``python -m
        torch.distributed.run``."""
        typed = [part.replace(f"{paths.root()}/", "") for part in self.command[3:]]
        return " \\\n  ".join(["torchrun", *map(shlex.quote, typed)])


def make_plan(
    overrides: list[str],
    *,
    data: Path | None = None,
    validation: Path | None = None,
    name: str | None = None,
    nproc_per_node: int = 1,
    trust: bool = False,
    device: Device | None = None,
) -> Plan:
    """Plan a run. ``overrides`` are Hydra's ``key=value``; they win over the workshop's recipe and
    the settings of ``device`` (default: the one of this machine).

    The recipe is for rows that are rendered here (``data``, or the tickets): where ``overrides``
    name ``model.data.train_ds.file_names``, the script's own defaults take its place.

    The base, and the adapter that ``model.peft.restore_from_path`` names, are verified first
    (:mod:`workshop_utils.checkpoints.verify.verify`); with ``trust`` what is found wrong is only
    printed.

    Raises:
        WorkshopError: an override cannot be read or names a key that the script does not have, or
            ``model.restore_from_path`` is missing.
        NotACheckpoint: the script path cannot load ``model.restore_from_path``.
        CheckpointError: the base or the adapter is unsafe or damaged.
        DataError: ``data`` or ``validation`` is not usable.

    What else would go wrong stands in the plan's ``preflight``; :func:`.train.finetune` refuses to
    start then.
    """
    given = parse_overrides(overrides)
    script = script_path()
    base = base_of(given, script, trust)
    own_files = "model.data.train_ds.file_names" in {key.lstrip("+") for key in given}
    if own_files and (data or validation):
        raise WorkshopError(
            "Both --data and model.data.train_ds.file_names are given: leave one of them out."
        )
    if nproc_per_node < 1:
        raise WorkshopError(f"--nproc-per-node is {nproc_per_node}; it has to be at least 1.")
    device = device or choose_device()
    run_dir = _run_dir(given, name or f"{base.stem if base.is_file() else base.name}-lora")
    described = read_config(base) if base.is_file() else read_yaml(base / "model_config.yaml")
    tokenizer = tokenizer_of(base, described)
    rendered = [] if own_files else _render(tokenizer, run_dir, data, validation)
    recipe = {} if own_files else RECIPE
    scheme = (recipe | given).get("model.peft.peft_scheme")
    scheme = scheme or defaults(script).model.peft.peft_scheme
    settings = {**recipe, **machine_settings(device, nproc_per_node, scheme), **_files(rendered)}
    place = {"exp_manager.exp_dir": str(run_dir.parent), "exp_manager.name": run_dir.name}
    ours = place | {"model.restore_from_path": str(base)}
    if own_files:
        # Beside the rows NeMo would find the index of an earlier content, and take it; it is a
        # pickle, too.
        keys = [f"model.data.{part}.index_mapping_dir" for part in PARTS]
        ours |= {key: str(notes(run_dir) / "index") for key in keys if key not in given}
    settings = {
        key: value if value is None else str(value)
        for key, value in (settings | place | given | ours).items()
    }
    # Another version of the script may lack a key of ours in its defaults; ++ sets it either way.
    marks = {key: "" if script == SCRIPT or key in given else "++" for key in settings}
    words = [
        word(f"{marks[key]}{key}", plain(value) if key in ours else value)
        for key, value in settings.items()
    ]
    config = compose(script, words)
    with what_is_deleted(given):
        require_sound_loads(config, base, trust)
        logs = config.exp_manager
    if [logs.get(key) for key in _RUN_PLACE] != [*place.values(), None]:
        raise WorkshopError(
            "exp_manager.exp_dir and exp_manager.name say where the run goes: give them once, as "
            "plain key=value without + or ${}, and no explicit_log_dir."
        )
    in_memory = {str(rows.path): [*rows.lines] for rows in rendered}
    sizes = architecture(described)
    with what_is_deleted(given):
        checked = preflight(
            config, defaults(SCRIPT), sizes, nproc_per_node, run_dir, tokenizer, device, in_memory
        )
    checked.facts += dict.fromkeys(line for rows in rendered for line in rows.said)
    if data and (told := data_report.check([data]).told("contradiction", "repeated")):
        checked.warnings.append("\n".join([f"{paths.shown(data)}, {told[0]}", *told[1:]]))
    return Plan(
        torchrun(script, words, nproc_per_node),
        training_environment(run_dir, nproc_per_node, checked.tokens_per_step, device),
        settings,
        run_dir,
        device,
        config,
        checked,
        rendered,
        makes_tickets=not own_files and not data and not _tickets_dir().exists(),
    )


@contextlib.contextmanager
def what_is_deleted(given: dict[str, str | None]) -> Iterator[None]:
    """A key that is read and was taken out by ``~key`` as a WorkshopError."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    try:
        yield
    except (ConfigAttributeError, ConfigKeyError) as error:
        gone = ", ".join(key for key in given if key.startswith("~"))
        if not gone:
            raise
        raise WorkshopError(
            f"{gone}: the script reads {error.full_key}. Leave it there, or set it to null."
        ) from None


def _contents_of_base(base: Path) -> dict[str, Any]:
    """Digests of what ``base`` is loaded from: a ``.nemo``, or ``model_config.yaml``, the tokenizer
    that it names and ``model_weights/``."""
    if base.is_file():
        return of_contents(base)
    config = read_yaml(base / "model_config.yaml")
    # A bridged view names its tokenizer by an absolute path.
    config["tokenizer"] = {
        key: of_contents(Path(value)) if isinstance(value, str) and os.path.isabs(value) else value
        for key, value in section(config, "tokenizer").items()
    }
    return {"config": config, "weights": of_contents(base / "model_weights")}


def parse_overrides(overrides: list[str]) -> dict[str, str | None]:
    """``["a.b=1", "++c=2", "~d"]`` -> ``{"a.b": "1", "++c": "2", "~d": None}``, by Hydra's own
    grammar; a later one wins, as with Hydra. WorkshopError for what makes no single run."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, parsed = OverridesParser.create(), {}
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise WorkshopError(
                f"{text!r} is not an override: write key=value, for example trainer.max_steps=50, "
                "or ~key to take a key out."
            )
        try:
            override = parser.parse_override(text)
        except HydraException:
            raise WorkshopError(unreadable(text)) from None
        if override.is_sweep_override():
            raise WorkshopError(
                f"{text!r} is a sweep: Hydra would start a run for each value (--multirun). One "
                "run is started here: give one value, or a list as 'key=[a,b]'."
            )
        if not override.key_or_group:
            raise WorkshopError(unreadable(text))
        if override.package is not None or "/" in override.key_or_group:
            raise WorkshopError(
                f"{text!r}: / and @ choose from a group of configurations, and this script has no "
                "groups. Write key=value, with dots in the key."
            )
        parsed[override.get_key_element()] = text.partition("=")[2] if "=" in text else None
    return parsed


def require_sound_loads(config: "DictConfig", base: Path, trust: bool) -> None:
    """Verify what else than ``base`` the run with the composed ``config`` would load; Hydra has
    several spellings for each key. Raises CheckpointError for what is unsound, WorkshopError where
    Hydra ends up with another base, DataError for packed rows without ``trust``."""
    from omegaconf import OmegaConf

    said = OmegaConf.select(config, "model.restore_from_path")
    if said != str(base):
        raise WorkshopError(
            f"model.restore_from_path ends up as {said!r}: give it once, as plain key=value "
            "without + or quotes."
        )
    for key in _STARTS:
        if path := OmegaConf.select(config, key):
            require_sound(path, trust)
    if path := lightning_checkpoint(config):
        require_sound(path, trust, (Kind.LIGHTNING,))
    if OmegaConf.select(config, "model.data.train_ds.packed_sequence") and not trust:
        raise DataError(
            "model.data.train_ds.packed_sequence: NeMo reads packed rows as a pickle, which can "
            "run code. If the file is your own, add --trust."
        )


def lightning_checkpoint(config: "DictConfig") -> Path | None:
    """What ``model.peft.restore_from_ckpt`` of the generation script names, if anything. Raises
    WorkshopError where that is no file, or not all that is needed."""
    key, peft = "model.peft.restore_from_ckpt", config.model.peft
    where = peft.get("restore_from_ckpt") or {}
    folder, name = where.get("checkpoint_dir"), where.get("checkpoint_name")
    if not folder and not name:
        return None
    if not folder or not name or peft.restore_from_path:
        raise WorkshopError(
            f"{key} needs checkpoint_dir and checkpoint_name, and no model.peft.restore_from_path "
            "beside them."
        )
    if not (path := Path(folder) / name).is_file():
        raise WorkshopError(
            f"{key}: {paths.shown(path)} is no file. Give the .ckpt of an adapter's training; "
            "where the whole model was trained, give its .nemo as model.restore_from_path."
        )
    return path.resolve()


def base_of(given: dict[str, str | None], script: Path, trust: bool) -> Path:
    """The base that ``given`` names, verified. Mistyped keys come first: one may be that of the
    base. Raises WorkshopError for these, NotACheckpoint for what the script path cannot load."""
    refuse_mistyped(script, given)
    key = "model.restore_from_path"
    if not given.get(key):
        compose(script, list(starmap(word, given.items())))
        if any(name.lstrip("+") == key and value for name, value in given.items()):
            raise WorkshopError(f"Give {key} as plain key=value, without +.")
        raise WorkshopError(
            f"{key} is missing: give a directory made by `workshop bridge`, or a .nemo file."
        )
    base = Path(_unquoted(given[key])).resolve()
    where, wrong = paths.shown(base), None
    if not base.exists():
        wrong = "does not exist."
    elif base.is_file():
        wrong = None if base.suffix == ".nemo" else "is a file, but not a .nemo archive."
    elif (base / "context").is_dir():
        wrong = (
            "is a NeMo 2.0 checkpoint, which the script path cannot load. Run `workshop bridge "
            f"{where}` and give the directory that it makes."
        )
    elif not (base / "model_config.yaml").is_file() or not (base / "model_weights").is_dir():
        wrong = "has no model_config.yaml and model_weights/."
    if wrong:
        raise NotACheckpoint(f"{key}: {where} {wrong}")
    require_sound(base, trust, SCRIPT_PATH_BASES)
    return base


def machine_settings(device: Device, nproc_per_node: int, scheme: str = "") -> dict[str, str]:
    """Overrides that this device needs. Fused Adam comes with Apex; without it NeMo's plain AdamW
    does the same sums."""
    no_apex = importlib.util.find_spec("apex") is None
    settings = {
        "trainer.devices": str(nproc_per_node),
        "trainer.accelerator": device.kind,
        "trainer.precision": device.precision,
    }
    if device.kind == "cpu" and nproc_per_node > 1:
        # Every rank then draws the whole matrix and takes its slice: the run equals that of one
        # process.
        settings["model.use_cpu_initialization"] = "true"
    if device.kind == "cpu" or no_apex:
        settings["model.optim.name"] = "adamw"
    if "adapter" in scheme and no_apex:  # the default, mixedfusedlayernorm, is Apex's
        settings["model.peft.adapter_tuning.norm_type"] = "layernorm"
    return settings


def script_path() -> Path:
    """Our entry script, or the one of the NeMo clone that ``NEMO_PATH`` names."""
    clone = os.environ.get("NEMO_PATH")
    if not clone:
        return SCRIPT
    script = Path(clone).expanduser() / UPSTREAM_SCRIPT
    if not script.is_file():
        raise WorkshopError(
            f"NEMO_PATH is {clone}, but {script} does not exist. Check out NeMo v2.4.1 there, or "
            "unset NEMO_PATH."
        )
    return script


def _run_dir(given: dict[str, str | None], name: str) -> Path:
    said = {key: _unquoted(value) for key, value in given.items() if value not in (None, "null")}
    parent = Path(said.get("exp_manager.exp_dir") or paths.runs_dir() / "finetune")
    name = said.get("exp_manager.name") or name
    if not re.fullmatch(r"\w[\w.+ '-]*", name):
        raise WorkshopError(
            f"{name!r} is no name for a run, which becomes a folder and a file: use letters, "
            "digits, - _ and dots (--name, exp_manager.name)."
        )
    return parent.resolve() / name


def _unquoted(value: str) -> str:
    """``value`` without the quotes that Hydra would take off."""
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def _tickets_dir() -> Path:
    return paths.data_dir() / "tickets"


@contextlib.contextmanager
def _tickets() -> Iterator[Path]:
    """The folder of the workshop's rows; where it is not there, one for the moment."""
    if _tickets_dir().exists():
        yield _tickets_dir()
        return
    with tempfile.TemporaryDirectory(prefix="workshop-tickets-") as name:
        yield chat_data.make_tickets(Path(name))


def _render(
    tokenizer: ChatTokenizer | None, run_dir: Path, data: Path | None, validation: Path | None
) -> list[chat_data.Rendered]:
    if tokenizer is None:
        raise WorkshopError(
            "The data cannot be rendered for a .nemo base: give model.data.train_ds.file_names "
            "and validation_ds."
        )
    with contextlib.nullcontext() if data else _tickets() as tickets:
        train = Path(data) if data else tickets / "train.jsonl"
        if not data and not train.exists():
            script = paths.shown(paths.repository_file("data/make_tickets.py"))
            raise DataError(
                f"{paths.shown(train)} does not exist: run `python {script} --out "
                f"{paths.shown(train.parent)}`, or give --data."
            )
        beside = train.with_name("validation.jsonl")
        validation = Path(validation or (beside if beside.exists() else train))
        folder = paths.runs_dir() / "finetune" / "data" / run_dir.name
        return [
            chat_data.render(train, tokenizer, folder / "train.jsonl"),
            chat_data.render(validation, tokenizer, folder / "validation.jsonl"),
        ]


def _files(rendered: list[chat_data.Rendered]) -> dict[str, str]:
    if not rendered:
        return {}
    train, validation = (json.dumps([str(rows.path)], ensure_ascii=False) for rows in rendered)
    return {
        "model.data.train_ds.file_names": train,
        # The rendered input ends where the answer begins; a blank between them is no part of the
        # chat template.
        "model.data.train_ds.prompt_template": RENDERED_TEMPLATE,
        "model.data.train_ds.concat_sampling_probabilities": "[1.0]",
        "model.data.validation_ds.file_names": validation,
        "model.data.validation_ds.names": "[validation]",
    }


def tokenizer_of(base: Path, described: dict) -> ChatTokenizer | None:
    """The base's own tokenizer; None for a ``.nemo``, which carries it inside."""
    if base.is_file():
        return None
    try:
        return ChatTokenizer(Path(described["tokenizer"]["type"]))
    except (KeyError, TypeError):
        raise NotACheckpoint(
            f"{paths.shown(base / 'model_config.yaml')}: `tokenizer.type` is missing. Bridge it "
            "again."
        ) from None
