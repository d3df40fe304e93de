"""Hugging Face model directory <-> NeMo 2.0 distributed checkpoint, by NeMo's own importer and exporter."""

import json
from pathlib import Path

from workshop_utils import nemo_cpu, paths
from workshop_utils.errors import NotACheckpoint, UnsupportedCheckpoint

LLAMA31_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Values of Llama 3.1's scaled rope that NeMo 2.4.1's HFLlamaImporter takes for granted (class Llama31Config)."""


def import_checkpoint(hf_model: Path, target: Path) -> Path:
    """Convert ``hf_model`` to a NeMo 2.0 checkpoint at ``target`` and return ``target``.

    Written beside ``target`` first and renamed when complete, so a directory of that name is always whole.
    The weights keep the dtype that ``config.json`` names in ``torch_dtype``.

    Raises:
        NotACheckpoint: ``hf_model`` is no Hugging Face model of the Llama family.
        UnsupportedCheckpoint: its rope scaling is one that NeMo's importer would change.
    """
    hf_model, target = Path(hf_model).resolve(), Path(target)
    _check_family(hf_model)
    nemo_cpu.apply()
    from nemo.collections import llm
    from nemo.collections.llm.gpt.model.llama import HFLlamaImporter

    config = HFLlamaImporter(str(hf_model)).config
    with paths.new_directory(target) as part:
        llm.import_ckpt(model=llm.LlamaModel(config), source=f"hf://{hf_model}", output_path=part, overwrite=True)
    return target


def export_huggingface(checkpoint: Path, target: Path) -> Path:
    """The other way, for a model that comes as NeMo 2.0 (from NGC): ``llm.export_ckpt`` to a Hugging Face directory.

    Raises:
        NotACheckpoint: ``checkpoint`` is no NeMo 2.0 directory.
    """
    from workshop_utils.formats import nemo2

    checkpoint = nemo2.locate(Path(checkpoint)).resolve()
    nemo_cpu.apply()
    from nemo.collections import llm

    with paths.new_directory(target) as part:
        llm.export_ckpt(path=checkpoint, target="hf", output_path=part, overwrite=True)
    return target


def _check_family(hf_model: Path) -> None:
    file = hf_model / "config.json"
    if not file.is_file():
        raise NotACheckpoint(f"{paths.shown(hf_model)} has no config.json: give the directory of a Hugging Face model.")
    config = json.loads(file.read_text())
    if config.get("model_type") != "llama":
        raise NotACheckpoint(
            f"{paths.shown(file)}: model_type is {config.get('model_type')!r}; this workshop converts the Llama family ('llama')."
        )
    scaling = config.get("rope_scaling") or {}
    for field, value in LLAMA31_ROPE.items():
        if scaling.get(field, value) != value:
            raise UnsupportedCheckpoint(
                f"{paths.shown(file)}: rope_scaling.{field} is {scaling[field]}. NeMo's importer keeps only the factor and takes {value}, "
                "as Llama 3.1 and 3.2 have it: the converted model would compute something else."
            )
