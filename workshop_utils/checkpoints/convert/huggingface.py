"""Hugging Face model directory <-> NeMo 2.0 distributed checkpoint, by NeMo's own importers and
exporters.

NeMo's importers take a few fields for granted that a ``config.json`` may set otherwise (see
:class:`.gpt_classes.Family`), run code that a tokenizer brings along, and keep the tokenizer of
every import in one directory, ``/tmp/nemo_tokenizer``. :func:`import_checkpoint` puts the fields
right, refuses what cannot be put right, and uses a directory of its own.
"""

import dataclasses
import importlib
import re
import sys
from functools import reduce
from pathlib import Path

from workshop_utils.checkpoints.formats import huggingface, huggingface_config, nemo2
from workshop_utils.checkpoints.formats.architecture import section
from workshop_utils.checkpoints.formats.findings import Severity, pass_over
from workshop_utils.checkpoints.formats.gpt_classes import FAMILIES, Family
from workshop_utils.checkpoints.formats.safe_text import read_json, read_yaml
from workshop_utils.checkpoints.formats.summary import Kind
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.core import paths
from workshop_utils.core.errors import NotACheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint
from workshop_utils.core.paths import shown
from workshop_utils.runtime import nemo_cpu
from workshop_utils.runtime.nemo_cpu.registry import no_transformer_engine


def import_checkpoint(hf_model: Path, target: Path, trust: bool = False) -> Path:
    """Convert ``hf_model`` to a NeMo 2.0 checkpoint at ``target`` and return ``target``.

    Written beside ``target`` first and renamed when complete, so a directory of that name is always
    whole. The weights keep the dtype that ``config.json`` names in ``torch_dtype``. ``hf_model`` is
    verified first; with ``trust`` what is found wrong is only printed.

    Raises:
        NotACheckpoint: ``hf_model`` is no Hugging Face model of a family in :data:`FAMILIES`.
        UnsafeCheckpoint: the model brings code along, which NeMo's importer would run.
        UnsupportedCheckpoint: a field of its configuration has a value that NeMo's importer would
            ignore.
        CheckpointError: it is unsafe or damaged.
    """
    hf_model, target = Path(hf_model).resolve(), Path(target)
    family = check(hf_model)
    require_sound(hf_model, trust, (Kind.HUGGINGFACE,))
    dtype = huggingface.describe(hf_model, pass_over(trust)).dtype or "float32"
    check(hf_model, dtype)
    for finding in huggingface_config.findings(hf_model):
        print(f"not known: {finding}", file=sys.stderr)
    config = huggingface_config.spelled(read_json(hf_model / "config.json"), shown(hf_model))
    nemo_cpu.apply()
    module, name = family.importer
    importer = getattr(importlib.import_module(module), name)
    ignored = {}
    for field, path in family.copied.items():
        *above, last = path.split(".")
        value = reduce(section, above, config).get(last)
        if value is not None:
            ignored[field] = value
    more = {
        "config.json": config
        | {"torch_dtype": config.get("torch_dtype") or dtype.partition(",")[0]}
    }
    if not (hf_model / "generation_config.json").is_file():  # which some importers demand
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        more["generation_config.json"] = {name: config.get(name) for name in tokens}
    with (
        paths.temporary_directory("workshop-tokenizer-") as folder,
        paths.new_directory(target) as part,
        huggingface_config.readable(hf_model, more) as place,
    ):
        with huggingface_config.loading(hf_model):
            tokenizer = huggingface_config.load_tokenizer(hf_model, place)
            settings = dataclasses.replace(importer(str(place)).config, **ignored)
        tokenizer.save_pretrained(folder / "nemo_tokenizer")
        _careful(importer, settings, folder / "nemo_tokenizer")(str(place)).apply(part)
    return target


def _careful(importer: type, settings: object, folder: Path) -> type:
    """NeMo's ``importer`` with corrected ``settings`` and the tokenizer in ``folder``, which runs
    no code of the model's."""

    class Importer(importer):
        config = settings

        def save_hf_tokenizer_assets(self, tokenizer_name_or_path, save_path=None):
            # NeMo takes this folder's name over into the checkpoint; its own default is
            # /tmp/nemo_tokenizer, shared by every run.
            return str(folder)

        @property
        def tokenizer(self):
            # Some importers write trust_remote_code=True into the checkpoint, for whoever loads it.
            from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

            return AutoTokenizer(self.save_hf_tokenizer_assets(str(self)))

    return Importer


def export_huggingface(checkpoint: Path, target: Path, trust: bool = False) -> Path:
    """The other way, for a model that comes as NeMo 2.0 (from NGC): ``llm.export_ckpt`` to a
    Hugging Face directory.

    ``checkpoint`` is verified first, since NeMo imports and calls what its ``io.json`` names;
    ``trust`` only prints what is wrong.

    Raises:
        NotACheckpoint: ``checkpoint`` is no NeMo 2.0 directory.
        UnsupportedCheckpoint: NeMo's exporter would leave out a field that changes the model.
        CheckpointError: it is unsafe or damaged.
    """
    checkpoint = nemo2.locate(Path(checkpoint)).resolve()
    require_sound(checkpoint, trust, (Kind.NEMO2,))
    _check_written(checkpoint / "context" / "model.yaml")
    nemo_cpu.apply()
    from nemo.collections import llm

    with paths.new_directory(target) as part:
        llm.export_ckpt(path=checkpoint, target="hf", output_path=part, overwrite=True)
    return target


#: What NeMo 2.4's exporters of the Llama-like families write nothing of, and what it is when it
#: does nothing (``nemo/collections/llm/gpt/model/{llama,qwen2,qwen3,mistral,mixtral}.py``).
_NOT_WRITTEN = {
    "rotary_percent": (None, 1),
    "seq_len_interpolation_factor": (None,),
    "rotary_interleaved": (None, False),
    "layernorm_zero_centered_gamma": (None, False),
}
_LLAMA_LIKE = re.compile(r"\.(Llama|Qwen[23]|Mistral|Mixtral)Model$")


def _check_written(file: Path) -> None:
    model = read_yaml(file) if file.is_file() else {}
    if not _LLAMA_LIKE.search(str(model.get("_target_"))):
        return
    for name, idle in _NOT_WRITTEN.items():
        if (value := section(model, "config").get(name)) not in idle:
            raise UnsupportedCheckpoint(
                f"{shown(file)}: config.{name} is {str(value)[:40]}, which NeMo's exporter leaves "
                "out: the Hugging Face model would compute something else."
            )


def check(hf_model: Path, dtype: str | None = None) -> Family:
    """Reads ``config.json`` only; ``dtype`` is that of the weights, where it is known. Errors as
    :func:`import_checkpoint`."""
    file = hf_model / "config.json"
    if not file.is_file():
        raise NotACheckpoint(
            f"{shown(hf_model)} has no config.json: give the directory of a Hugging Face model."
        )
    config = read_json(file)
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise NotACheckpoint(
            f"{shown(file)}: model_type is {config.get('model_type')!r}; the families that can be "
            f"converted are {', '.join(FAMILIES)}."
        )
    for other in (file, hf_model / "tokenizer_config.json"):
        if other.is_file() and read_json(other).get("auto_map"):
            raise UnsafeCheckpoint(
                f"{shown(other)}: auto_map names Python code of the model's own, which NeMo's "
                "importer would run. Nothing was executed. Take auto_map out: the families "
                "converted here need no code."
            )
    found = huggingface_config.findings(hf_model, dtype)
    if refused := [item for item in found if item.severity is Severity.REFUSED]:
        raise refused[0].error()
    window = huggingface_config.with_defaults(config).get("sliding_window")
    if family.name == "mistral" and window and no_transformer_engine():
        raise UnsupportedCheckpoint(
            f"{shown(file)}: sliding_window is {window}. NeMo builds attention with a window only "
            "with Transformer Engine, on a GPU: convert this model there. Later versions of "
            "Mistral have no window (null)."
        )
    return family
