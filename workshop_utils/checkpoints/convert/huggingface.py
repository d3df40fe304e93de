"""Hugging Face model directory <-> NeMo 2.0 distributed checkpoint, by NeMo's own importers and
exporters.

NeMo's importers take a few fields for granted that a ``config.json`` may set otherwise (see
:data:`FAMILIES`), run code that a tokenizer brings along, and keep the tokenizer of every import in
one directory, ``/tmp/nemo_tokenizer``. :func:`import_checkpoint` puts the fields right, refuses
what cannot be put right, and uses a directory of its own.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats.safe_text import read_json
from workshop_utils.checkpoints.formats.summary import Kind
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.core import paths
from workshop_utils.core.errors import NotACheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint
from workshop_utils.runtime import nemo_cpu
from workshop_utils.runtime.nemo_cpu.registry import no_transformer_engine


@dataclass(frozen=True)
class HuggingFaceFamily:
    """How NeMo imports one ``model_type``.

    ``activation`` and ``unused`` (field -> the only value that NeMo's importer understands) are
    checked; ``corrections`` maps the fields of ``config.json`` to fields of NeMo's configuration
    that the importer leaves at the default of its class.
    """

    module: str
    importer: str
    activation: str = "silu"
    unused: Mapping[str, Any] = None
    corrections: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}


def _llama(config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3.1's rope: the importer keeps only the factor."""
    scaling = config.get("rope_scaling") or {}
    names = {
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "old_context_len": "original_max_position_embeddings",
    }
    return {new: scaling[old] for new, old in names.items() if old in scaling}


def _mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    # The importer takes the window for the length, and Mistral 0.2 and later have none; and rows of
    # the embedding from the tokenizer.
    return {"seq_length": config["max_position_embeddings"], "vocab_size": config["vocab_size"]}


def _rows(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the embedding, which the importer takes from the tokenizer."""
    return {"vocab_size": config["vocab_size"]}


def _qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    # The importer leaves the length and the size of a head at 4096 and 128.
    return {
        "seq_length": config["max_position_embeddings"],
        "kv_channels": config.get("head_dim") or 128,
    }


_NO_ROPE = {"rope_scaling": None}
_NO_BIAS = {"attention_bias": False}
_TIED = {"tie_word_embeddings": False}
FAMILIES = {
    "llama": HuggingFaceFamily(
        "llama", "HFLlamaImporter", unused=_NO_BIAS | {"mlp_bias": False}, corrections=_llama
    ),
    "mistral": HuggingFaceFamily(
        "mistral", "HFMistralImporter", unused=_NO_ROPE | _TIED, corrections=_mistral
    ),
    "mixtral": HuggingFaceFamily(
        "mixtral",
        "HFMixtralImporter",
        unused=_NO_ROPE | _TIED | {"sliding_window": None},
        corrections=_rows,
    ),
    "qwen2": HuggingFaceFamily(
        "qwen2", "HFQwen2Importer", unused=_NO_ROPE | {"use_sliding_window": False}
    ),
    "qwen3": HuggingFaceFamily(
        "qwen3",
        "HFQwen3Importer",
        unused=_NO_ROPE | _NO_BIAS | {"use_sliding_window": False},
        corrections=_qwen3,
    ),
    "nemotron": HuggingFaceFamily(
        "nemotron",
        "HFNemotronImporter",
        "relu2",
        _NO_ROPE | _NO_BIAS | _TIED | {"mlp_bias": False},
        _rows,
    ),
}
"""``model_type`` of ``config.json`` -> how it is imported; NeMo 2.4.1,
``nemo/collections/llm/gpt/model/*.py``."""


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
    config = read_json(hf_model / "config.json")
    nemo_cpu.apply()
    import dataclasses
    import importlib

    module = importlib.import_module(f"nemo.collections.llm.gpt.model.{family.module}")
    importer = getattr(module, family.importer)
    settings = dataclasses.replace(importer(str(hf_model)).config, **family.corrections(config))
    with (
        paths.temporary_directory("workshop-tokenizer-") as folder,
        paths.new_directory(target) as part,
    ):
        _careful(importer, settings, folder / "nemo_tokenizer")(str(hf_model)).apply(part)
    return target


def _careful(importer: type, settings: object, folder: Path) -> type:
    """NeMo's ``importer`` with the corrected ``settings``, a folder of its own for the tokenizer,
    and no code of the model's run."""

    class Importer(importer):
        """The family's importer, bound to ``settings`` and ``folder``."""

        config = settings

        def save_hf_tokenizer_assets(self, tokenizer_name_or_path, save_path=None):
            """Save the tokenizer to a folder of this import, whatever ``save_path``; that
            folder."""
            from transformers import AutoTokenizer

            # NeMo takes this folder's name over into the checkpoint; its own default is
            # /tmp/nemo_tokenizer, shared by every run.
            AutoTokenizer.from_pretrained(tokenizer_name_or_path).save_pretrained(folder)
            return str(folder)

        @property
        def tokenizer(self):
            """The tokenizer of the Hugging Face model, loaded without its code."""
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
        CheckpointError: it is unsafe or damaged.
    """
    from workshop_utils.checkpoints.formats import nemo2

    checkpoint = nemo2.locate(Path(checkpoint)).resolve()
    require_sound(checkpoint, trust, (Kind.NEMO2,))
    nemo_cpu.apply()
    from nemo.collections import llm

    with paths.new_directory(target) as part:
        llm.export_ckpt(path=checkpoint, target="hf", output_path=part, overwrite=True)
    return target


def check(hf_model: Path) -> HuggingFaceFamily:
    """The family of ``hf_model``; errors as :func:`import_checkpoint`. Reads ``config.json`` only,
    and loads nothing."""
    file = hf_model / "config.json"
    if not file.is_file():
        raise NotACheckpoint(
            f"{paths.shown(hf_model)} has no config.json: give the directory of a Hugging Face "
            "model."
        )
    config = read_json(file)
    family = FAMILIES.get(config.get("model_type"))
    if family is None:
        raise NotACheckpoint(
            f"{paths.shown(file)}: model_type is {config.get('model_type')!r}; the families that "
            f"can be converted are {', '.join(FAMILIES)}."
        )
    for name in ("config.json", "tokenizer_config.json"):
        if (hf_model / name).is_file() and read_json(hf_model / name).get("auto_map"):
            raise UnsafeCheckpoint(
                f"{paths.shown(hf_model / name)}: auto_map names Python code of the model's own, "
                "which NeMo's importer would run. Nothing was executed. Take auto_map out: the "
                "families converted here need no code."
            )
    wanted = {"hidden_act": family.activation} | dict(family.unused)
    for name, value in wanted.items():
        if config.get(name) not in (None, value):
            raise UnsupportedCheckpoint(
                f"{paths.shown(file)}: {name} is {json.dumps(config[name])}. NeMo's "
                f"{family.importer} takes {json.dumps(value)} for granted: the converted model "
                "would compute something else."
            )
    if family.module == "mistral" and config.get("sliding_window") and no_transformer_engine():
        raise UnsupportedCheckpoint(
            f"{paths.shown(file)}: sliding_window is {config['sliding_window']}. NeMo builds "
            "attention with a window only with Transformer Engine, on a GPU: convert this model "
            "there. Later versions of Mistral have no window (null)."
        )
    _check_rope(file, config)
    return family


def _check_rope(file: Path, config: Mapping[str, Any]) -> None:
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UnsupportedCheckpoint(
            f"{paths.shown(file)}: rope_scaling.rope_type is {kind!r}; NeMo's importer knows "
            "only 'llama3' and would ignore it: the converted model would compute something "
            "else."
        )
