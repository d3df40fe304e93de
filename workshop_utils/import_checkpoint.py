"""Hugging Face model directory -> NeMo 2.0 distributed checkpoint, by NeMo's own ``llm.import_ckpt``."""

from pathlib import Path

from workshop_utils import nemo_cpu, paths
from workshop_utils.errors import NotACheckpoint


def import_checkpoint(hf_model: Path, target: Path) -> Path:
    """Convert ``hf_model`` to a NeMo 2.0 checkpoint at ``target`` and return ``target``.

    Written beside ``target`` first and renamed when complete, so a directory of that name is always whole.
    The weights keep the dtype that ``config.json`` names in ``torch_dtype``.

    Raises:
        NotACheckpoint: ``hf_model`` is no Hugging Face model of the Llama family.
    """
    hf_model, target = Path(hf_model).resolve(), Path(target)
    if not (hf_model / "config.json").is_file():
        raise NotACheckpoint(f"{paths.shown(hf_model)} has no config.json: give the directory of a Hugging Face model.")
    nemo_cpu.apply()
    from nemo.collections import llm
    from nemo.collections.llm.gpt.model.llama import HFLlamaImporter

    importer = HFLlamaImporter(str(hf_model))
    if importer.config is None or getattr(importer, "config", None) is None:
        raise NotACheckpoint(f"{paths.shown(hf_model)}: NeMo knows no Llama configuration for it.")
    with paths.new_directory(target) as part:
        llm.import_ckpt(model=llm.LlamaModel(importer.config), source=f"hf://{hf_model}", output_path=part, overwrite=True)
    return target
