"""What an export says about itself: made from which adapter, for which reader, in which row
order."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from workshop_utils import __version__
from workshop_utils.adapters.adapter import LoraAdapter
from workshop_utils.checkpoints.formats.qkv import Order

#: Who reads each form. The key is (``to``, ``reader``).
READERS = {
    (
        "nemo",
        "trtllm",
    ): (
        "TensorRT-LLM's .nemo reader (lora_manager.py); NIM 1.x names this format, but its own "
        "loader is closed"
    ),
    (
        "nemo",
        "nemo",
    ): "NeMo: MegatronGPTSFTModel.load_adapters and nemo/export/utils/lora_converter.py",
    ("hf-peft", None): "Hugging Face PEFT, vLLM, TensorRT-LLM's Hugging Face reader, NIM",
    ("hf-merged", None): "transformers, vLLM, TensorRT-LLM and NIM, as a model of its own",
    ("nemo2-merged", None): "NeMo 2.0, as a model of its own",
}


@dataclass(frozen=True)
class Record:
    """Written into every export: the ``workshop`` section of a ``.nemo``, ``workshop_export.json``
    in a directory.

    ``qkv_order`` is the row order of the fused query/key/value matrix, or ``"separate"`` where
    there is no fused matrix. ``dtype`` is the one that was asked for; None keeps that of the
    adapter, or of the base of a merged model. ``alpha_baked_in`` says whether ``alpha / rank`` was
    multiplied into the weights.
    """

    to: str
    reader: str
    qkv_order: Order | str
    alpha_baked_in: bool
    rank: int
    trained_alpha: float
    base: str
    source: str
    source_sha256: str
    exporter: str
    dtype: str | None = None

    @property
    def for_servers(self) -> bool:
        """Whether vLLM and NIM are among the readers."""
        return self.reader in (READERS["hf-peft", None], READERS["nemo", "trtllm"])

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, for YAML and JSON; a dtype only where one was asked for."""
        return {name: value for name, value in asdict(self).items() if name != "dtype" or value}


def make_record(
    adapter: LoraAdapter, to: str, reader: str | None, base: str, dtype: str | None = None
) -> Record:
    """The record of exporting ``adapter`` to ``to`` for ``reader`` (``None`` for all but nemo)."""
    order = {"hf-merged": "separate", "nemo2-merged": "interleaved", "hf-peft": "separate"}.get(
        to
    ) or {
        "trtllm": "qkv",
        "nemo": "interleaved",
    }[reader]
    return Record(
        to=to,
        reader=_fewer_readers(adapter, to, reader) or READERS[to, reader],
        qkv_order=order,
        alpha_baked_in=reader == "trtllm",
        rank=adapter.rank,
        trained_alpha=adapter.alpha,
        base=base,
        source=adapter.source.name,
        source_sha256=adapter.sha256,
        exporter=f"nemo-lora-workshop {__version__}",
        dtype=dtype,
    )


def _fewer_readers(adapter: LoraAdapter, to: str, reader: str | None) -> str | None:
    """Who reads ``adapter`` where not all of :data:`READERS` do, and what to do about it."""
    wide = any(
        str(half.dtype) == "torch.float64" for halves in adapter.weights.values() for half in halves
    )
    if to == "hf-peft" and adapter.magnitudes:
        return "Hugging Face PEFT (vLLM and NIM take no DoRA: merge it for them)"
    if to == "hf-peft" and wide:
        return (
            "Hugging Face PEFT (vLLM and NIM may take no float64: export it for them with "
            "--dtype bfloat16)"
        )
    if reader == "trtllm" and wide:
        return (
            "TensorRT-LLM's .nemo reader (lora_manager.py), which casts it (NIM may take no "
            "float64: export it for NIM with --dtype bfloat16)"
        )
    return None
