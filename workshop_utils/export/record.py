"""What an export says about itself: made from which adapter, for which reader, in which row order."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from workshop_utils import __version__
from workshop_utils.export.adapter import LoraAdapter
from workshop_utils.export.qkv import Order

#: Who reads each form. The key is (``to``, ``reader``).
READERS = {
    (
        "nemo",
        "trtllm",
    ): "TensorRT-LLM's .nemo reader (lora_manager.py); NIM 1.x names this format, but its own loader is closed",
    ("nemo", "nemo"): "NeMo: MegatronGPTSFTModel.load_adapters and nemo/export/utils/lora_converter.py",
    ("hf-peft", None): "Hugging Face PEFT, vLLM, TensorRT-LLM's Hugging Face reader, NIM",
}


@dataclass(frozen=True)
class Record:
    """Written into every export: the ``workshop`` section of a ``.nemo``, ``workshop_export.json`` beside a PEFT adapter.

    ``qkv_order`` is the row order of the fused query/key/value matrix, or ``"separate"`` where there is no fused matrix.
    ``alpha_baked_in`` says whether ``alpha / rank`` was multiplied into the weights.
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

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, for YAML and JSON."""
        return asdict(self)


def make_record(adapter: LoraAdapter, to: str, reader: str | None, base: str) -> Record:
    """The record of exporting ``adapter`` to ``to`` for ``reader`` (``None`` for hf-peft)."""
    order = {("nemo", "trtllm"): "qkv", ("nemo", "nemo"): "interleaved", ("hf-peft", None): "separate"}[to, reader]
    return Record(
        to=to,
        reader=READERS[to, reader],
        qkv_order=order,
        alpha_baked_in=reader == "trtllm",
        rank=adapter.rank,
        trained_alpha=adapter.alpha,
        base=base,
        source=adapter.source.name,
        source_sha256=adapter.sha256,
        exporter=f"nemo-lora-workshop {__version__}",
    )
