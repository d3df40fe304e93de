"""Megatron-LM and Megatron-Bridge checkpoints: ``iter_XXXXXXX/`` directories with a torch_dist
index in them.

    iter_0000100/.metadata, metadata.json, *.distcp   the weights; names have no prefix,
    ``optimizer.`` entries lie beside them
    iter_0000100/common.pt                            Megatron-LM: ``args``, an argparse.Namespace
    (Megatron-Core 0.19: in the index)
    iter_0000100/run_config.yaml                      Megatron-Bridge: the configuration, under
    ``model``
    iter_0000100/mp_rank_00/model_optim_rng.pt        the old form: ``model`` and ``args``, one file
    for each rank

Source: ``megatron/training/{arguments,checkpointing}.py`` (Megatron-LM core_r0.13),
``megatron/bridge/training/checkpointing.py``.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from workshop_utils.checkpoints.convert import bridge_config, layered
from workshop_utils.checkpoints.convert.source import Source, Tokenizer
from workshop_utils.checkpoints.formats import gpt_config, nemo1_config, saved_tensors, torch_dist
from workshop_utils.checkpoints.formats.files import Files
from workshop_utils.checkpoints.formats.findings import Report, stop
from workshop_utils.checkpoints.formats.gpt_classes import BASE, ROPE_SCALING
from workshop_utils.checkpoints.formats.megatron import read_common
from workshop_utils.checkpoints.formats.megatron_layout import EMBEDDING
from workshop_utils.checkpoints.formats.rank_files import megatron_rank_files
from workshop_utils.checkpoints.formats.safe_text import read_yaml
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.checkpoints.formats.torch_archive import SavedTensor
from workshop_utils.core.errors import DamagedCheckpoint, UnsupportedCheckpoint
from workshop_utils.core.paths import shown

_PREFIXES = ("", "model.", "module.")

_ARGUMENTS = {
    "max_position_embeddings": "seq_length",
    "norm_epsilon": "layernorm_epsilon",
    "rotary_percent": "rotary_percent",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "num_experts": "num_moe_experts",
}
"""Names of Megatron-LM's arguments that differ from the fields of its TransformerConfig."""


def read(path: Path, tokenizer: Tokenizer | None, report: Report = stop) -> Source:
    """What the directory ``path`` holds, which has no tokenizer that could be taken along; errors
    as :func:`workshop_utils.checkpoints.convert.readers.read`."""
    ranks = megatron_rank_files(str(file.relative_to(path)) for file in path.glob("mp_rank_*/*"))
    files = Files(path.resolve())
    if ranks:
        file = path / min(ranks.values())
        with file.open("rb") as opened:
            fields, where = _arguments(
                saved_tensors.read_state(opened, shown(file), report), shown(file)
            )
        tensors, objects, prefix = (
            layered.read(files, fields, ranks, "", partial(_saved_model, report=report)),
            {},
            "",
        )
    else:
        index = torch_dist.read_directory(path, report)
        described = (path / "run_config.yaml").is_file()
        fields, where = (
            _run_config(path)
            if described
            else _arguments(*read_common(path, index.objects, report))
        )
        prefix = next((prefix for prefix in _PREFIXES if prefix + EMBEDDING in index.tensors), None)
        if prefix is None:
            raise DamagedCheckpoint(f"{shown(path)}: the tensor {EMBEDDING} is missing.")
        block = f"{prefix}decoder.", f"{prefix}embedding.", f"{prefix}output_layer."
        tensors = {name: tensor for name, tensor in index.tensors.items() if name.startswith(block)}
        objects = {name: entry for name, entry in index.objects.items() if name.startswith(block)}
    family = nemo1_config.family_of_features(fields)
    gpt_config.check(fields, family, f"{where}.", "Megatron")
    rows, dtype = bridge_config.check_tensors(tensors, prefix, fields, shown(path), where)
    return Source(
        path=path,
        format="Megatron",
        fields=fields,
        family=family,
        rows=rows,
        dtype=dtype,
        tensors=tensors,
        objects=objects,
        prefix=prefix,
        files=files,
        tokenizer=tokenizer,
    )


def _run_config(path: Path) -> tuple[dict[str, Any], str]:
    """The fields in ``run_config.yaml``, and what to call their place in errors."""
    where = f"{shown(path / 'run_config.yaml')}: model"
    stated = read_yaml(path / "run_config.yaml").get("model")
    if not isinstance(stated, Mapping):
        raise DamagedCheckpoint(f"{where} is missing.")
    return gpt_config.typed(stated | _from_provider(stated), _defaults(stated), f"{where}."), where


def _arguments(state: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """The fields in the arguments that Megatron-LM saves in the ``state`` at ``where``, and what to
    call their place in errors."""
    where, stated = f"{where}: args", state.get("args")
    if not isinstance(stated, Mapping):
        raise DamagedCheckpoint(
            f"{where} is missing, and with it the architecture: Megatron-LM saves its arguments "
            "there."
        )
    return gpt_config.typed(_from_arguments(stated, where), _defaults(stated), f"{where}."), where


def _saved_model(opened: IO[bytes], where: str, part: str, report: Report) -> list[Tensor]:
    """The tensors of the model in one file of the old form, beside optimizer state and
    arguments."""
    model = saved_tensors.read_state(opened, where, report).get("model")
    if not isinstance(model, Mapping):
        raise UnsupportedCheckpoint(
            f"{where} has no state dict called model; virtual pipeline stages are not supported."
        )
    return [
        saved_tensors.tensor(name, value, part)
        for name, value in model.items()
        if isinstance(value, SavedTensor)
    ]


def _defaults(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The fields to read: Llama 3.1's rope only where it is used."""
    scaled = (
        stated.get("use_rope_scaling") or stated.get("rope_scaling") or "scale_factor" in stated
    )
    return BASE | ROPE_SCALING if scaled else BASE


def _from_provider(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Megatron-Bridge's providers that are not called as in NeMo 2.0."""
    found = {"window_size": list(stated["window_size"])} if stated.get("window_size") else {}
    if stated.get("rope_scaling"):
        found["scale_factor"] = stated.get("rope_scaling_factor", ROPE_SCALING["scale_factor"])
    return found


def _from_arguments(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields that Megatron-LM's arguments stand for (``core_transformer_config_from_args`` and
    ``pretrain_gpt.py``)."""
    found = {name: stated[name] for name in BASE if stated.get(name) is not None}
    found |= {
        field: stated[name] for name, field in _ARGUMENTS.items() if stated.get(name) is not None
    }
    if not stated.get("group_query_attention"):
        found.pop("num_query_groups", None)
    found["share_embeddings_and_output_weights"] = not stated.get(
        "untie_embeddings_and_output_weights", False
    )
    found["seq_len_interpolation_factor"] = stated.get("rotary_seq_len_interpolation_factor")
    found["position_embedding_type"] = stated.get("position_embedding_type", "learned_absolute")
    if found["position_embedding_type"] != "rope":
        raise UnsupportedCheckpoint(
            f"{where}.position_embedding_type is {found['position_embedding_type']!r}; only rope "
            "is supported."
        )
    gated, squared = bool(stated.get("swiglu")), bool(stated.get("squared_relu"))
    found |= {
        "activation_func": "silu" if gated else "squared_relu" if squared else "gelu",
        "gated_linear_unit": gated,
    }
    if stated.get("use_rope_scaling"):
        found["scale_factor"] = stated.get("rope_scaling_factor") or ROPE_SCALING["scale_factor"]
    return found
