"""What an export says about itself: made from which adapter, for which reader, in which row order;
and whether the same export is there already."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workshop_utils import __version__
from workshop_utils.adapters.adapter import LoraAdapter
from workshop_utils.adapters.base_id import same_base
from workshop_utils.adapters.rules.table import VLLM_RANKS
from workshop_utils.checkpoints.formats import nemo_archive
from workshop_utils.checkpoints.formats.architecture import section
from workshop_utils.checkpoints.formats.qkv import Order
from workshop_utils.core.errors import OutputExists

FILE = "workshop_export.json"
#: Who reads each form. The key is (``to``, ``reader``).
READERS = {
    ("nemo", "nemo"): "NeMo (MegatronGPTSFTModel.load_adapters, lora_converter.py), and NIM 1.x by "
    "NVIDIA's tutorial",
    ("nemo", "trtllm"): "TensorRT-LLM's .nemo reader (lora_manager.py)",
    ("hf-peft", None): "Hugging Face PEFT, vLLM, TensorRT-LLM's Hugging Face reader, NIM",
    ("hf-merged", None): "transformers, vLLM, TensorRT-LLM and NIM, as a model of its own",
    ("nemo2-merged", None): "NeMo 2.0, as a model of its own",
}
_ORDERS = {"trtllm": "qkv", "nemo": "interleaved", "nemo2-merged": "interleaved"}


@dataclass(frozen=True)
class Record:
    """Written into every export: the ``workshop`` section of a ``.nemo``, :data:`FILE` in a
    directory.

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
        return self.reader in (READERS["hf-peft", None], READERS["nemo", "nemo"])

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, for YAML and JSON; a dtype only where one was asked for."""
        return {name: value for name, value in asdict(self).items() if name != "dtype" or value}

    def is_that_of(self, target: Path) -> bool:
        """Whether the export at ``target`` is this one; not where it names its base in another way.

        What it holds has still to be checked. Raises :class:`OutputExists` where it is another.
        """
        if target.is_file():
            there = section(nemo_archive.read_config(target), "workshop")
        else:
            file = target / FILE
            there = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if not there:
            raise OutputExists("It was not made by this workshop.")
        # Neither the name of the file it was made from matters, nor the version that made it.
        differing = {name for name, value in asdict(self).items() if there.get(name) != value} - {
            "source",
            "exporter",
        }
        if differing == {"base"} and same_base(str(there.get("base") or ""), self.base):
            return False
        if differing:
            raise OutputExists(
                "It was made from another adapter, or for another reader, base or dtype."
            )
        return True


def make_record(
    adapter: LoraAdapter, to: str, reader: str | None, base: str, dtype: str | None = None
) -> Record:
    """The record of exporting ``adapter`` to ``to`` for ``reader`` (``None`` for all but nemo)."""
    halves = (half for both in adapter.weights.values() for half in both)
    wide = any(str(half.dtype) == "torch.float64" for half in halves)
    readers = READERS[to, reader]
    if to == "hf-peft" and adapter.magnitudes:
        readers = "Hugging Face PEFT (vLLM and NIM take no DoRA: merge it for them)"
    elif to == "hf-peft" and wide:
        readers = (
            "Hugging Face PEFT (vLLM and NIM may take no float64: export it for them with "
            "--dtype bfloat16)"
        )
    elif to == "hf-peft" and adapter.rank > VLLM_RANKS[-1]:
        readers = (
            "Hugging Face PEFT and TensorRT-LLM (vLLM, and NIM 2.x with it, takes no rank above "
            f"{VLLM_RANKS[-1]})"
        )
    elif reader == "nemo" and wide:
        readers = "NeMo (NIM may take no float64: export it for NIM with --dtype bfloat16)"
    return Record(
        to=to,
        reader=readers,
        qkv_order=_ORDERS.get(reader or to, "separate"),
        alpha_baked_in=reader == "trtllm",
        rank=adapter.rank,
        trained_alpha=adapter.alpha,
        base=base,
        source=adapter.source.name,
        source_sha256=adapter.sha256,
        exporter=f"nemo-lora-workshop {__version__}",
        dtype=dtype,
    )
