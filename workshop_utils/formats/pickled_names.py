"""The names that writers of checkpoints leave in their pickles, with the library and the versions that write each: one table.

What is not in it is refused when a checkpoint is read. Nothing in it does anything by itself: classes of plain values, enumerations, and
the functions by which torch puts a tensor together. dtypes are not in it (:data:`.tensor.DTYPE_BYTES`).
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from workshop_utils.formats.pickle_machine import GETATTR, Enumeration, Foreign


class Written(NamedTuple):
    """``names`` of ``module``, separated by blanks, and who writes them."""

    module: str
    names: str
    writer: str


_DCP = "torch.distributed.checkpoint"
_MCORE = "megatron.core.dist_checkpointing.strategies"

INDEX = (
    Written("torch", "Size", "torch 2.4 to 2.13"),
    Written("torch.serialization", "_get_layout", "torch 2.4 to 2.13"),
    Written(f"{_DCP}.metadata", "Metadata MetadataIndex TensorStorageMetadata ChunkStorageMetadata BytesStorageMetadata TensorProperties",
            "torch 2.4 to 2.13"),
    Written(f"{_DCP}.metadata", "StorageMeta", "torch 2.4 to 2.13"),
    Written(f"{_DCP}.filesystem", "_StorageInfo", "torch 2.4 to 2.13"),
    Written(f"{_DCP}.planner", "SavePlan TensorWriteData WriteItem", "torch 2.4 to 2.13, in the plans that Megatron-Core keeps"),
    Written(f"{_MCORE}.torch", "MCoreMetadata MCoreSavePlan", "Megatron-Core 0.11 to 0.15"),
    Written("pathlib", "PosixPath PurePosixPath WindowsPath PureWindowsPath", "Python 3.10 to 3.12"),
    Written("pathlib._local", "PosixPath PurePosixPath WindowsPath PureWindowsPath", "Python 3.13"),
)  # fmt: skip
"""Names in ``.metadata``, the index of a torch_dist checkpoint."""

STATE = (
    Written("builtins", "bool bytearray complex dict float int list object slice str tuple type", "Python 3"),
    Written("__builtin__", "bool bytearray complex dict float int list long object slice str tuple type unicode", "Python, protocol 2"),
    Written("typing", "Any Dict List Optional Union", "OmegaConf"),
    Written("datetime", "date datetime time timedelta timezone", "Python"),
    Written("pathlib", "Path PosixPath PurePath PurePosixPath WindowsPath PureWindowsPath", "Python 3.10 to 3.12"),
    Written("pathlib._local", "Path PosixPath PurePath PurePosixPath WindowsPath PureWindowsPath", "Python 3.13"),
    Written("signal", "Signals", "Python"),
    Written("torch", "device Generator", "torch 2.4 to 2.13"),
    Written("torch.torch_version", "TorchVersion", "torch 2.4 to 2.13"),
    Written("numpy", "dtype ndarray float32 float64 int32 int64", "NumPy"),
    Written("numpy.core.multiarray", "_reconstruct scalar", "NumPy 1"),
    Written("numpy._core.multiarray", "_reconstruct scalar", "NumPy 2"),
    Written("omegaconf.base", "ContainerMetadata Metadata", "OmegaConf 2.3"),
    Written("omegaconf.dictconfig", "DictConfig", "OmegaConf 2.3"),
    Written("omegaconf.listconfig", "ListConfig", "OmegaConf 2.3"),
    Written("omegaconf.nodes", "AnyNode BooleanNode FloatNode IntegerNode StringNode", "OmegaConf 2.3"),
    Written("megatron.core.optimizer.optimizer_config", "OptimizerConfig", "Megatron-Core 0.11 to 0.19"),
    Written("transformer_engine.common.recipe", "DelayedScaling Float8BlockScaling Float8CurrentScaling MMParams MXFP8BlockScaling "
            "NVFP4BlockScaling QParams _FormatHelper", "Transformer Engine, in its _extra_state"),
)  # fmt: skip
"""Names of values in what ``torch.save`` wrote: ``common.pt``, ``.ckpt``, ``.bin``, and the objects inside ``.distcp`` files."""

ENUMERATIONS = (
    (f"{_DCP}.metadata._MEM_FORMAT_ENCODING", "TORCH_CONTIGUOUS_FORMAT TORCH_CHANNELS_LAST TORCH_PRESERVE_FORMAT", "torch 2.4 to 2.13"),
    (f"{_DCP}.planner.WriteItemType", "TENSOR SHARD BYTE_IO", "torch 2.4 to 2.13"),
    ("megatron.core.enums.ModelType", "encoder_or_decoder encoder_and_decoder retro_encoder retro_decoder", "Megatron-Core"),
    ("megatron.core.enums.Fp8Recipe", "delayed tensorwise mxfp8 blockwise custom", "Megatron-Core"),
    ("megatron.core.enums.Fp4Recipe", "nvfp4 custom", "Megatron-Core"),
    ("megatron.core.rerun_state_machine.RerunDiagnostic", "CORRECT_RESULT TRANSIENT_ERROR PERSISTENT_ERROR", "Megatron-Core"),
    ("megatron.core.rerun_state_machine.RerunMode", "DISABLED VALIDATE_RESULTS REPORT_DETERMINISM_STATS", "Megatron-Core"),
    ("megatron.core.rerun_state_machine.RerunState", ("NOT_RUNNING_YET INITIAL_RUN RERUNNING_IN_PLACE WILL_RERUN_FROM_CHECKPOINT "
     "RERUNNING_FROM_CHECKPOINT RERUNNING_AGAIN_FROM_CHECKPOINT"), "Megatron-Core"),
    ("megatron.core.transformer.enums.ModelType", "encoder_or_decoder encoder_and_decoder", "Megatron-Core"),
    ("megatron.core.transformer.enums.LayerType", "embedding loss encoder decoder mtp", "Megatron-Core"),
    ("megatron.core.transformer.enums.AttnType", "self_attn cross_attn", "Megatron-Core"),
    ("megatron.core.transformer.enums.AttnMaskType", "padding causal no_mask padding_causal arbitrary", "Megatron-Core"),
    ("megatron.core.transformer.enums.AttnBackend", "flash fused unfused local auto", "Megatron-Core"),
    ("megatron.core.transformer.enums.CudaGraphScope", "full_iteration attn mlp moe moe_router moe_preprocess mamba", "Megatron-Core"),
    ("transformer_engine.common.recipe.Format", "E4M3 E5M2 HYBRID", "Transformer Engine"),
)  # fmt: skip
"""Enumerations in either, with the names of their members in all versions."""


def names(table: Iterable[Written]) -> Iterator[tuple[str, str]]:
    """(module, name) of each row of ``table``."""
    return ((row.module, name) for row in table for name in row.names.split())


def enumerations() -> dict[tuple[str, str], Enumeration | Foreign]:
    """(module, name) -> stand-in of each enumeration, and of ``getattr``, by which some versions of Python name a member."""
    found = {tuple(text.rsplit(".", 1)): Enumeration(text, members.split()) for text, members, _ in ENUMERATIONS}
    return found | {("builtins", "getattr"): GETATTR, ("__builtin__", "getattr"): GETATTR}
