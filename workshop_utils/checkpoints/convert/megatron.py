"""Megatron-LM and Megatron-Bridge checkpoints, ``iter_XXXXXXX/`` directories (their files:
:mod:`workshop_utils.checkpoints.formats.megatron`), as a :class:`.source.Source`.

Source: ``megatron/training/{arguments,checkpointing}.py`` (Megatron-LM core_r0.13),
``megatron/bridge/training/checkpointing.py``.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from workshop_utils.checkpoints.convert import layered
from workshop_utils.checkpoints.convert.source import Source, Tokenizer
from workshop_utils.checkpoints.formats import gpt_config, nemo1_config, saved_tensors, torch_dist
from workshop_utils.checkpoints.formats.files import Files
from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.gpt_classes import BASE, ROPE_SCALING
from workshop_utils.checkpoints.formats.megatron import RUN_CONFIG, rank_files, read_common
from workshop_utils.checkpoints.formats.megatron_layout import EMBEDDING
from workshop_utils.checkpoints.formats.safe_text import read_yaml
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.checkpoints.formats.torch_archive import SavedTensor
from workshop_utils.core.errors import DamagedCheckpoint, UnsupportedCheckpoint
from workshop_utils.core.paths import shown

_PREFIXES = ("", "model.", "module.")
_BLOCKS = ("decoder.", "embedding.", "output_layer.")

_ARGUMENTS = {
    "max_position_embeddings": "seq_length",
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "num_experts": "num_moe_experts",
}
"""Names of Megatron-LM's arguments that differ from the fields of its TransformerConfig."""


def read(path: Path, tokenizer: Tokenizer | None, report: Report = stop) -> Source:
    """The directory ``path``, which has no tokenizer that could be taken along."""
    files = Files(path.resolve())
    if ranks := rank_files(path):
        file = path / min(ranks.values())
        with file.open("rb") as opened:
            state = saved_tensors.read_state(opened, shown(file), report)
        fields, where = _arguments(state, shown(file))
        load = partial(_saved_model, report=report)
        tensors, objects, prefix = layered.read(files, fields, ranks, "", load), {}, ""
    else:
        index = torch_dist.read_directory(path, report)
        if (path / RUN_CONFIG).is_file():
            fields, where = _run_config(path)
        else:
            fields, where = _arguments(*read_common(path, index.objects, report))
        prefix = next((prefix for prefix in _PREFIXES if prefix + EMBEDDING in index.tensors), None)
        if prefix is None:
            raise DamagedCheckpoint(f"{shown(path)}: the tensor {EMBEDDING} is missing.")
        blocks = tuple(prefix + block for block in _BLOCKS)
        tensors, objects = (
            {name: entry for name, entry in entries.items() if name.startswith(blocks)}
            for entries in (index.tensors, index.objects)
        )
    family = nemo1_config.family_of_features(fields)
    gpt_config.check(fields, family, f"{where}.", "Megatron")
    weights = (tensors, objects), prefix, files
    return Source.checked(path, "Megatron", fields, family, *weights, tokenizer, where)


def _run_config(path: Path) -> tuple[dict[str, Any], str]:
    """The fields in ``run_config.yaml``, and what to call their place in errors."""
    where = f"{shown(path / RUN_CONFIG)}: model"
    stated = read_yaml(path / RUN_CONFIG).get("model")
    if not isinstance(stated, Mapping):
        raise DamagedCheckpoint(f"{where} is missing.")
    # Fields of Megatron-Bridge's providers that are not called as in NeMo 2.0.
    own = {}
    if stated.get("window_size"):
        own["window_size"] = list(stated["window_size"])
    if stated.get("rope_scaling"):
        own["scale_factor"] = stated.get("rope_scaling_factor", ROPE_SCALING["scale_factor"])
    return gpt_config.typed({**stated, **own}, _defaults(stated), f"{where}."), where


def _arguments(state: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """The fields in the arguments that Megatron-LM saves in the ``state`` at ``where``
    (``core_transformer_config_from_args`` and ``pretrain_gpt.py``), and what to call their place in
    errors."""
    where, stated = f"{where}: args", state.get("args")
    if not isinstance(stated, Mapping):
        raise DamagedCheckpoint(
            f"{where} is missing, and with it the architecture: Megatron-LM saves its arguments "
            "there."
        )
    names = {name: name for name in BASE} | _ARGUMENTS
    fields = {field: stated[name] for name, field in names.items() if stated.get(name) is not None}
    if not stated.get("group_query_attention"):
        fields.pop("num_query_groups", None)
    position = stated.get("position_embedding_type", "learned_absolute")
    if position != "rope":
        raise UnsupportedCheckpoint(
            f"{where}.position_embedding_type is {position!r}; only rope is supported."
        )
    gated, tied = bool(stated.get("swiglu")), not stated.get("untie_embeddings_and_output_weights")
    plain = "squared_relu" if stated.get("squared_relu") else "gelu"
    fields |= {
        "share_embeddings_and_output_weights": tied,
        "seq_len_interpolation_factor": stated.get("rotary_seq_len_interpolation_factor"),
        "position_embedding_type": position,
        "activation_func": "silu" if gated else plain,
        "gated_linear_unit": gated,
    }
    if stated.get("use_rope_scaling"):
        fields["scale_factor"] = stated.get("rope_scaling_factor") or ROPE_SCALING["scale_factor"]
    return gpt_config.typed(fields, _defaults(stated), f"{where}."), where


def _saved_model(opened: IO[bytes], where: str, part: str, report: Report) -> list[Tensor]:
    model = saved_tensors.read_state(opened, where, report).get("model")
    if not isinstance(model, Mapping):
        raise UnsupportedCheckpoint(
            f"{where} has no state dict called model; virtual pipeline stages are not supported."
        )
    held = {name: value for name, value in model.items() if isinstance(value, SavedTensor)}
    return [saved_tensors.tensor(name, value, part) for name, value in held.items()]


def _defaults(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The fields to read: Llama 3.1's rope only where it is used."""
    scaled = stated.get("use_rope_scaling") or stated.get("rope_scaling")
    return BASE | ROPE_SCALING if scaled or "scale_factor" in stated else BASE
