"""``context/model.yaml`` of NeMo 2.0 -> ``model_config.yaml`` of the script path (NeMo 1).

The NeMo 2.0 fields must not be copied to the top level beside the keys of
:mod:`workshop_utils.checkpoints.formats.nemo1_config`: NeMo 1 hands every key that Megatron-Core's
``TransformerConfig`` knows straight to it, where a field that NeMo 2.0 wrote as a class or function
would override the value derived from ``activation``, ``precision`` and so on.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workshop_utils.checkpoints.formats import gpt_config, megatron_layout, nemo1_config
from workshop_utils.checkpoints.formats.nemo2 import Nemo2Checkpoint
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.core.errors import DamagedCheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint
from workshop_utils.core.paths import shown

PREFIX = "module."


def translate(checkpoint: Nemo2Checkpoint) -> dict[str, Any]:
    """The ``model_config.yaml`` of ``checkpoint``, after a check that its tensors are those that
    this configuration needs.

    Raises :class:`UnsupportedCheckpoint`, :class:`UnsafeCheckpoint` or :class:`DamagedCheckpoint`,
    each naming the field or tensor.
    """
    where = shown(checkpoint.path / "context" / "model.yaml")
    fields = gpt_config.read_fields(checkpoint.model, where)
    rows, dtype = check_tensors(
        checkpoint.model_tensors(), PREFIX, fields, shown(checkpoint.path), "context/model.yaml"
    )
    family = gpt_config.family_of(checkpoint.model, where)
    return nemo1_config.from_fields(
        fields, family, rows, dtype, tokenizer(checkpoint, where), where
    )


def check_tensors(
    tensors: Mapping[str, Tensor], prefix: str, fields: dict[str, Any], where: str, config: str
) -> tuple[int, str]:
    """Rows and dtype of the embedding, once ``tensors`` are exactly those of the model with
    ``fields``, under names with ``prefix``.

    The rows are those that are stored, whatever the configuration says: it may be padded. ``where``
    and ``config`` name the checkpoint and its configuration in errors: :class:`DamagedCheckpoint`
    (missing, or of another shape) and :class:`UnsupportedCheckpoint`.
    """
    embedding = tensors.get(prefix + megatron_layout.EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise DamagedCheckpoint(
            f"{where}: the tensor {prefix}{megatron_layout.EMBEDDING} (vocabulary x hidden) is "
            "missing."
        )
    # The loaders only log a weight that is missing and go on with random numbers, so the check has
    # to be here.
    expected = {
        prefix + name: weight.shape
        for name, weight in megatron_layout.layout(fields, embedding.shape[0]).items()
    }
    for name, shape in expected.items():
        found = tensors.get(name)
        if found is None or found.shape != shape:
            stated = f"has the shape {found.shape}" if found else "is missing"
            raise DamagedCheckpoint(
                f"{where}: the tensor {name} {stated}; {config} asks for {shape}. The "
                "configuration and the weights are not of one model."
            )
    more = sorted(set(tensors) - set(expected))
    if more:
        raise UnsupportedCheckpoint(
            f"{where} holds tensors that the model of {config} does not have: {', '.join(more[:5])}"
        )
    return embedding.shape[0], embedding.dtype


_TOKENIZERS = "nemo.collections.common.tokenizers"


def tokenizer(checkpoint: Nemo2Checkpoint, where: str) -> dict[str, Any]:
    """The ``tokenizer`` section. NeMo 1 looks paths up in the current directory, so they are
    absolute here."""
    described = checkpoint.model.get("tokenizer")
    kind = described.get("_target_") if isinstance(described, dict) else None
    if kind == f"{_TOKENIZERS}.huggingface.auto_tokenizer.AutoTokenizer":
        name = _file_field(checkpoint, where, "pretrained_model_name", hub_name_allowed=True)
        # trust_remote_code is left out on purpose: a tokenizer that brings its own code is not run.
        return {
            "library": "huggingface",
            "type": name,
            "use_fast": described.get("use_fast", True) is not False,
            "model": None,
            "vocab_file": None,
            "merge_file": None,
        }
    if kind == f"{_TOKENIZERS}.sentencepiece_tokenizer.SentencePieceTokenizer":
        return {
            "library": "sentencepiece",
            "type": None,
            "model": _file_field(checkpoint, where, "model_path"),
            "vocab_file": None,
            "merge_file": None,
            "sentencepiece_legacy": described.get("legacy", False) is True,
        }
    if isinstance(kind, str) and not kind.startswith("nemo."):
        raise UnsafeCheckpoint(
            f"{where}: tokenizer._target_ names {kind!r}, which is not NeMo's. Nothing was "
            "executed."
        )
    raise UnsupportedCheckpoint(
        f"{where}: tokenizer._target_ is {kind!r}; NeMo's AutoTokenizer and "
        "SentencePieceTokenizer are supported."
    )


def _file_field(
    checkpoint: Nemo2Checkpoint, where: str, field: str, hub_name_allowed: bool = False
) -> str:
    """Absolute path of the file or directory that ``tokenizer.<field>`` names, or the name of a
    repository on the Hub."""
    value = checkpoint.model["tokenizer"].get(field)
    if isinstance(value, dict):
        # NeMo's wrapper around a string that was no path when the checkpoint was written.
        value = value.get("attr")
    if not isinstance(value, str) or not value:
        raise DamagedCheckpoint(f"{where}: tokenizer.{field} is missing.")
    context = checkpoint.path / "context"
    if not os.path.isabs(value):
        path = Path(os.path.normpath(context / value))
        if not path.is_relative_to(context):
            raise UnsafeCheckpoint(
                f"{where}: tokenizer.{field} is {value!r}, outside the checkpoint."
            )
        if path.exists():
            return str(path)
        if hub_name_allowed and value.count("/") == 1 and not value.startswith("nemo_tokenizer"):
            return value
    elif os.path.exists(value):
        return value
    raise DamagedCheckpoint(
        f"{where}: tokenizer.{field} is {value!r}, and there is no such file. Copy the whole "
        "context/ directory."
    )
