"""The names that writers of checkpoints leave in their pickles, with the library and the versions
that write each: one table.

What is not in it is refused when a checkpoint is read. Nothing in it does anything by itself. The
versions are the first and the last of those whose sources were read, and which write the name:
torch 2.4 to 2.15, Megatron-Core 0.11 to 0.19, Transformer Engine 1.0 to 2.9. dtypes are not in it
(:data:`.tensor.DTYPE_BYTES`), nor the functions that put tensors together (:mod:`.torch_archive`).
Distributed tensors (``DTensor``), quantised, sparse and nested ones are not read.
"""

import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from workshop_utils.checkpoints.formats.pickle_machine import GETATTR, Enumeration, Foreign


class Written(NamedTuple):
    """``names`` of ``module``, separated by blanks, and who writes them."""

    module: str
    names: str
    writer: str


_DCP = "torch.distributed.checkpoint"
_RECIPE = "transformer_engine.common.recipe"
_PATHS = "Path PosixPath PurePath PurePosixPath WindowsPath PureWindowsPath"
_BUILTINS = "bool bytearray complex dict float int list object slice str tuple type"

INDEX = (
    Written("torch", "Size", "torch 2.4 to 2.15"),
    Written("torch.serialization", "_get_layout", "torch 2.4 to 2.15"),
    Written(f"{_DCP}.metadata", "Metadata MetadataIndex TensorStorageMetadata ChunkStorageMetadata "
        "BytesStorageMetadata TensorProperties", "torch 2.4 to 2.15"),
    Written(f"{_DCP}.metadata", "StorageMeta", "torch 2.4 to 2.15"),
    Written(f"{_DCP}.filesystem", "_StorageInfo _StoragePrefix", "torch 2.4 to 2.15"),
    Written(f"{_DCP}.planner", "SavePlan", "Megatron-Core 0.16 to 0.19, nvidia-resiliency-ext 0.7"),
    Written(f"{_DCP}.planner", "WriteItem TensorWriteData", "Megatron-Core 0.11 to 0.19"),
    Written(f"{_DCP}.planner", "BytesIOWriteData", "torch 2.8 to 2.15"),
    Written("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan",
        "Megatron-Core 0.11 to 0.15"),
    Written("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata",
        "Megatron-Core 0.15"),
    Written("pathlib", _PATHS, "torch; Megatron-Core 0.11 and 0.12; before Python 3.13"),
    Written("pathlib._local", _PATHS, "torch, with Python 3.13"),
)  # fmt: skip
"""Names in ``.metadata``, the index of a torch_dist checkpoint.

Source: ``torch/distributed/checkpoint/{metadata,filesystem,planner}.py`` and
``megatron/core/dist_checkpointing/strategies/torch.py``.
"""

STATE = (
    Written("builtins", _BUILTINS, "Python 3"),
    Written("__builtin__", f"{_BUILTINS} long unicode", "Python 3, in protocol 2"),
    Written("typing", "Any Dict List Optional Union", "OmegaConf 2.3"),
    Written("collections", "Counter", "torch 2.4 to 2.15"),
    Written("datetime", "date datetime time timedelta timezone", "Python 3"),
    Written("pathlib", _PATHS, "Megatron-LM, before Python 3.13"),
    Written("pathlib._local", _PATHS, "Megatron-LM, with Python 3.13"),
    Written("signal", "Signals", "Megatron-Core 0.16 to 0.19, from Python 3.11.5 on"),
    Written("torch", "device", "torch 2.4 to 2.15"),
    Written("torch._C", "Generator", "Megatron-Core 0.18 and 0.19"),
    Written("torch.torch_version", "TorchVersion", "torch 2.4 to 2.15"),
    Written("numpy", "dtype ndarray float32 float64 int32 int64", "NumPy 1 and 2"),
    Written("numpy.core.multiarray", "_reconstruct scalar", "NumPy 1"),
    Written("numpy._core.multiarray", "_reconstruct scalar", "NumPy 2"),
    Written("omegaconf.base", "ContainerMetadata Metadata", "OmegaConf 2.3, in NeMo 1"),
    Written("omegaconf.dictconfig", "DictConfig", "OmegaConf 2.3, in NeMo 1"),
    Written("omegaconf.listconfig", "ListConfig", "OmegaConf 2.3, in NeMo 1"),
    Written("omegaconf.nodes", "AnyNode BooleanNode FloatNode IntegerNode StringNode",
        "OmegaConf 2.3, in NeMo 1"),
    Written("megatron.core.optimizer.optimizer_config", "OptimizerConfig",
        "Megatron-Core 0.16 to 0.19"),
    Written("megatron.core.extensions.transformer_engine", "TEDelayedScaling",
        "Megatron-Core 0.11 to 0.19"),
    Written(_RECIPE, "_OverrideLinearPrecision", "Transformer Engine 1.0 to 1.13"),
    Written(_RECIPE, "DelayedScaling _FormatHelper", "Transformer Engine 1.0 to 2.9"),
    Written(_RECIPE, "MXFP8BlockScaling", "Transformer Engine 2.0 to 2.9"),
    Written(_RECIPE, "Float8CurrentScaling MMParams QParams", "Transformer Engine 2.2 to 2.9"),
    Written(_RECIPE, "Float8BlockScaling", "Transformer Engine 2.3 to 2.9"),
    Written(_RECIPE, "NVFP4BlockScaling", "Transformer Engine 2.8 and 2.9"),
)  # fmt: skip
"""Names of values in what ``torch.save`` wrote: ``common.pt``, ``.ckpt``, ``.bin``, and the objects
inside ``.distcp`` files.

Sources: ``megatron/core/safe_globals.py`` (0.14 to 0.19: NVIDIA's own list),
``transformer_engine/common/recipe/__init__.py``, ``torch/_weights_only_unpickler.py``. What puts
tensors together is in :mod:`.torch_archive`.
"""

VALUES = (
    Written("signal", " ".join(signal.Signals.__members__),
        "Megatron-Core 0.16 to 0.19, before Python 3.11.5: the member's own name"),
    Written("torch", "Tensor", "torch 2.4 to 2.15, as the type of a tensor with attributes"),
    Written("torch.nn.parameter", "Parameter",
        "torch 2.4 to 2.15, as the type of a tensor with attributes"),
)  # fmt: skip
"""Names in the same files that are looked up and never called."""

_ENUMS = "megatron.core.transformer.enums"
_RERUN = "megatron.core.rerun_state_machine"
ENUMERATIONS = (
    (f"{_DCP}.metadata._MEM_FORMAT_ENCODING",
        "TORCH_CONTIGUOUS_FORMAT TORCH_CHANNELS_LAST TORCH_PRESERVE_FORMAT", "torch 2.4 to 2.15"),
    (f"{_DCP}.planner.WriteItemType", "TENSOR SHARD BYTE_IO", "Megatron-Core 0.11 to 0.19"),
    ("megatron.core.enums.ModelType",
        "encoder_or_decoder encoder_and_decoder retro_encoder retro_decoder",
        "Megatron-Core 0.11 to 0.19"),
    ("megatron.core.enums.Fp8Recipe", "delayed tensorwise mxfp8 blockwise custom",
        "Megatron-Core 0.12 to 0.19"),
    ("megatron.core.enums.Fp4Recipe", "nvfp4 custom", "Megatron-Core 0.15 to 0.19"),
    (f"{_RERUN}.RerunDiagnostic", "CORRECT_RESULT TRANSIENT_ERROR PERSISTENT_ERROR",
        "Megatron-Core 0.11 to 0.19"),
    (f"{_RERUN}.RerunMode", "DISABLED VALIDATE_RESULTS REPORT_DETERMINISM_STATS",
        "Megatron-Core 0.11 to 0.19"),
    (f"{_RERUN}.RerunState",
        "NOT_RUNNING_YET INITIAL_RUN RERUNNING_IN_PLACE WILL_RERUN_FROM_CHECKPOINT "
        "RERUNNING_FROM_CHECKPOINT RERUNNING_AGAIN_FROM_CHECKPOINT", "Megatron-Core 0.11 to 0.19"),
    (f"{_ENUMS}.ModelType", "encoder_or_decoder encoder_and_decoder", "Megatron-Core 0.11 to 0.19"),
    (f"{_ENUMS}.LayerType", "embedding loss encoder decoder mtp", "Megatron-Core 0.11 to 0.19"),
    (f"{_ENUMS}.AttnType", "self_attn cross_attn", "Megatron-Core 0.11 to 0.19"),
    (f"{_ENUMS}.AttnMaskType",
        "padding causal no_mask padding_causal arbitrary causal_bottom_right",
        "Megatron-Core 0.11 to 0.19"),
    (f"{_ENUMS}.AttnBackend", "flash fused unfused local auto", "Megatron-Core 0.11 to 0.19"),
    (f"{_ENUMS}.CudaGraphScope",
        "full_iteration attn mlp moe moe_router moe_preprocess mamba full_iteration_inference",
        "Megatron-Core 0.16 to 0.19"),
    (f"{_ENUMS}.CudaGraphModule", "attn mlp moe moe_router moe_preprocess mamba",
        "Megatron-Core 0.18 and 0.19"),
    (f"{_ENUMS}.InferenceCudaGraphScope", "none layer block", "Megatron-Core 0.18 and 0.19"),
    (f"{_RECIPE}.Format", "E4M3 E5M2 HYBRID",
        "Transformer Engine 1.0 to 2.9"),
)  # fmt: skip
"""Enumerations in either, with the names of their members in all versions."""


def names(table: Iterable[Written]) -> Iterator[tuple[str, str]]:
    """(module, name) of each row of ``table``."""
    return ((row.module, name) for row in table for name in row.names.split())


def enumerations() -> dict[tuple[str, str], Enumeration | Foreign]:
    """(module, name) -> stand-in of each enumeration, and of ``getattr``, by which some versions of
    Python name a member."""
    allowed = {
        tuple(text.rsplit(".", 1)): Enumeration(text, members.split())
        for text, members, _ in ENUMERATIONS
    }
    return allowed | {("builtins", "getattr"): GETATTR, ("__builtin__", "getattr"): GETATTR}
