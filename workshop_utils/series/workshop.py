"""What a notebook starts with: the chosen model, device and data, and each artifact of the series,
made when it is missing.

    ws = open_workshop()        # prints what was chosen and why
    ws.nemo2_checkpoint()       # a path; fetched and converted first, if no earlier notebook has

Every step records its artifact for the report of ``make workshop``.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from workshop_utils.checkpoints import sources
from workshop_utils.checkpoints.sources.catalogue import Model, chosen_model
from workshop_utils.core import paths
from workshop_utils.core.chat_data import make_tickets
from workshop_utils.core.settings import SEED, Settings, load_settings
from workshop_utils.runtime.device import Device, choose_device, quiet_environment
from workshop_utils.runtime.processes import run_quietly
from workshop_utils.series.report import record_artifact, record_metric


@dataclass(frozen=True)
class Workshop:
    """The choices, and the artifacts that follow from them."""

    settings: Settings
    model: Model
    device: Device

    def hf_model(self) -> Path:
        """Hugging Face directory; of a model that comes as NeMo 2.0, exported by NeMo."""
        target = paths.huggingface_model(self.model.name)
        if self.model.format == "huggingface":
            sources.fetch(self.model.name)
        elif not target.exists():
            source = str(self.nemo2_checkpoint())
            run_quietly("import", "--to-huggingface", source, "--out", str(target))
        return record_artifact("hf_model", target)

    def nemo2_checkpoint(self) -> Path:
        """NeMo 2.0 checkpoint of the model."""
        target = paths.nemo2_checkpoint(self.model.name)
        if self.model.format == "nemo2":
            sources.fetch(self.model.name)
        elif not target.exists():
            run_quietly("import", str(self.hf_model()), "--out", str(target))
        return record_artifact("nemo2_checkpoint", target)

    def bridged_checkpoint(self) -> Path:
        """The view of the NeMo 2.0 checkpoint that the script path loads."""
        from workshop_utils.checkpoints.convert.bridge import bridge

        return record_artifact("bridged_checkpoint", bridge(self.nemo2_checkpoint()))

    def data_files(self) -> dict[str, Path]:
        """``train``, ``validation`` and ``test``: the tickets, or what the settings name."""
        if self.settings.data:
            train = Path(self.settings.data).resolve()
            beside = {name: train.with_name(f"{name}.jsonl") for name in ("validation", "test")}
            files = {name: file if file.exists() else train for name, file in beside.items()}
            return {"train": train, **files}
        folder = make_tickets()
        record_artifact("test_set", folder / "test.jsonl")
        return {name: folder / f"{name}.jsonl" for name in ("train", "validation", "test")}

    def plan(self, *overrides: str):
        """The training run of the series, with ``overrides`` on top."""
        from workshop_utils.training.script import make_plan

        files = self.data_files() if self.settings.data else {}
        base = f"model.restore_from_path={self.bridged_checkpoint()}"
        data, validation = files.get("train"), files.get("validation")
        return make_plan([base, *overrides], data=data, validation=validation)

    def script_overrides(self, base: Path, run_dir: Path, *overrides: str) -> list[str]:
        """The run's overrides for any ``base``, another run directory, and a fresh start."""
        from workshop_utils.training.script.configuration import word

        place = f"exp_manager.exp_dir={run_dir.parent}", f"exp_manager.name={run_dir.name}"
        plan = self.plan(*place, "exp_manager.resume_if_exists=false", *overrides)
        plan.write_rows()
        settings = plan.overrides | {"model.restore_from_path": str(base)}
        return [word(key, value) for key, value in settings.items()]

    def adapter(self, *overrides: str) -> Path:
        """The ``.nemo`` that NeMo wrote; trained now unless an identical run has finished."""
        from workshop_utils.training import script
        from workshop_utils.training.runs import run_record

        plan = self.plan(*overrides)
        adapter = plan.adapter if run_record.has_finished(plan) else script.finetune(plan)
        record_metric("train_seconds", script.train_seconds(plan))
        return adapter

    def exports(self) -> dict[str, Path]:
        """``nemo``, the adapter as NeMo wrote it, and what is made of it: ``hf-peft``, and
        ``trtllm``, the ``.nemo`` in TensorRT-LLM's form."""
        from workshop_utils.adapters.export import export

        adapter = self.adapter()
        options = {"base_model": self.model.name, "overwrite": True}
        exports = {
            "nemo": adapter,
            "hf-peft": export(adapter, "hf-peft", **options),
            "trtllm": export(adapter, "nemo", reader="trtllm", **options),
        }
        for form, artifact in zip(exports, ("nemo", "peft", "trtllm"), strict=True):
            record_artifact(f"{artifact}_adapter", exports[form])
        return exports


def open_workshop(show: bool = True) -> Workshop:
    """Read the settings, prepare this process for NeMo, and print model, device and seed."""
    from workshop_utils.runtime import nemo_cpu

    settings = load_settings()
    quiet_environment(os.environ)
    warnings.filterwarnings(
        "ignore", message="The pynvml package is deprecated", category=FutureWarning
    )
    nemo_cpu.apply(settings.device)
    workshop = Workshop(settings, chosen_model(), choose_device())
    if show:
        print(f"model:  {workshop.model.name}\ndevice: {workshop.device}\nseed:   {SEED}")
    return workshop
