"""What can load a model: for each reader yes with the call, after with what has to be done first,
or no with the reason. Of adapters :mod:`workshop_utils.adapters.loads_in` knows.

Where the facts come from: NeMo 2.4.1 and transformers 4.51 as installed; Megatron-Bridge's
``AutoBridge`` (0.5); the documentation pages of vLLM, TensorRT-LLM and NIM 1.15 and 2.0. NIM was
not tried.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workshop_utils.checkpoints.formats import huggingface_config
from workshop_utils.checkpoints.formats.findings import Severity
from workshop_utils.checkpoints.formats.gpt_classes import FAMILIES
from workshop_utils.checkpoints.formats.summary import Checkpoint, Kind
from workshop_utils.core import paths
from workshop_utils.core.paths import shown

Answer = Literal["yes", "after", "not known", "no"]
Answers = dict[str, tuple[Answer, str]]

SCRIPT, NEMO2, TRANSFORMERS, PEFT = "script path", "NeMo 2.0 API", "transformers", "PEFT"
TRTLLM, NIM1, NIM2, VLLM, BRIDGE = "TensorRT-LLM", "NIM 1.x", "NIM 2.x", "vLLM", "Megatron-Bridge"
READERS = (SCRIPT, NEMO2, TRANSFORMERS, PEFT, TRTLLM, NIM1, NIM2, VLLM, BRIDGE)
BY_ITS_PAGES = "(by NVIDIA's pages, not tried here)"
#: Architectures that transformers reads from GGUF.
GGUF = (
    "llama", "mistral", "qwen2", "qwen2moe", "falcon", "phi3", "bloom", "t5", "stablelm", "gpt2",
    "starcoder2", "mamba", "nemotron", "gemma2",
)  # fmt: skip
_KNOWN = ", ".join(FAMILIES)


@dataclass(frozen=True)
class Reader:
    """Whether the program ``name`` can load the checkpoint, and ``how``: the command or call, or
    the reason and the way out."""

    name: str
    answer: Answer
    how: str


def loads_in(checkpoint: Checkpoint) -> list[Reader]:
    """One answer for each of :data:`READERS`, in that order."""
    answers = _BY_KIND[checkpoint.kind](checkpoint)
    return [Reader(name, *answers[name]) for name in READERS]


def quoted(path: Path | str) -> str:
    """``path`` as a word for a shell."""
    return shlex.quote(shown(path))


def name_of(checkpoint: Checkpoint) -> str:
    """What the checkpoint's conversions are called."""
    path = checkpoint.path.resolve()
    return path.stem if path.is_file() else path.name


def finetune(path: str, checkpoint: Checkpoint | None = None) -> str:
    """The command that trains ``path``, on as many ranks as ``checkpoint`` has parts."""
    tensor, pipeline = checkpoint.parallel if checkpoint else (1, 1)
    if tensor * pipeline == 1:
        return f"workshop finetune model.restore_from_path={path}"
    return (
        f"workshop finetune --nproc-per-node {tensor * pipeline} model.restore_from_path={path} "
        f"model.tensor_model_parallel_size={tensor} model.pipeline_model_parallel_size={pipeline}"
    )


def for_all(answer: Answer, how: str) -> Answers:
    """The same for every reader."""
    return dict.fromkeys(READERS, (answer, how))


def _after_huggingface(command: str) -> Answers:
    """All that read a Hugging Face model, which ``command`` makes."""
    return dict.fromkeys(READERS[2:], ("after", command))


def _is_convertible(checkpoint: Checkpoint) -> bool:
    """Whether our commands know the family; a format that does not name one is tried."""
    family = checkpoint.architecture.family if checkpoint.architecture else None
    return family is not None and family.lower() in FAMILIES


def _nemo2(checkpoint: Checkpoint) -> Answers:
    path, text, name = quoted(checkpoint.path), shown(checkpoint.path), name_of(checkpoint)
    call = f'llm.generate(path="{text}", ...), llm.finetune with RestoreConfig(path="{text}")'
    if not _is_convertible(checkpoint):
        export = (
            f'llm.export_ckpt(path="{text}", target="hf", output_path=NEW), if NeMo has an '
            "exporter for the family"
        )
        script = f"workshop bridge knows the families {_KNOWN}; train it with the NeMo 2.0 API"
        return _after_huggingface(export) | {SCRIPT: ("no", script), NEMO2: ("yes", call)}
    script = f"workshop bridge {path} && {finetune(quoted(paths.bridged_checkpoint(name)))}"
    after = _after_huggingface(f"workshop import --to-huggingface {path}")
    return after | {SCRIPT: ("after", script), NEMO2: ("yes", call)}


def _nemo1(checkpoint: Checkpoint) -> Answers:
    path = quoted(checkpoint.path)
    script = {SCRIPT: ("yes", finetune(path, checkpoint))}
    if checkpoint.architecture and not _is_convertible(checkpoint):
        why = (
            f"workshop convert knows the families {_KNOWN}, and its configuration is of none of "
            "them"
        )
        return for_all("no", why) | script
    nemo2 = quoted(paths.nemo2_checkpoint(name_of(checkpoint)))
    convert = f"workshop convert {path} {nemo2} --to nemo2"
    after = _after_huggingface(f"{convert} && workshop import --to-huggingface {nemo2}")
    return after | script | {NEMO2: ("after", convert)}


def _view(checkpoint: Checkpoint) -> Answers:
    of = f"inspect {checkpoint.view_of}, which it is a view of"
    return for_all("after", of) | {SCRIPT: ("yes", finetune(quoted(checkpoint.path)))}


def _lightning(checkpoint: Checkpoint) -> Answers:
    if not (checkpoint.detail or checkpoint.adapter):
        why = (
            "only the LightningModule that wrote it knows its weights: "
            f'CLASS.load_from_checkpoint("{shown(checkpoint.path)}"), and save the model'
        )
        return for_all("no", why)
    out = (
        "a .ckpt is for going on with a training; give the .nemo that it wrote at its end, or "
        "make one with NeMo's examples/nlp/language_modeling/megatron_ckpt_to_nemo.py"
    )
    on = "to go on: the command of its training again, with exp_manager.resume_if_exists=true"
    return for_all("no", out) | {SCRIPT: ("yes", on)}


def _megatron(checkpoint: Checkpoint) -> Answers:
    path, text = quoted(checkpoint.path), shown(checkpoint.path)
    name = f"{checkpoint.path.resolve().parent.name}-{name_of(checkpoint)}"
    if checkpoint.storage == "torch":
        again = (
            "load it with Megatron-LM and save it with --ckpt-format torch_dist; then inspect "
            "the new iter_ directory"
        )
        return for_all("after", again)
    nemo2 = quoted(paths.nemo2_checkpoint(name))
    convert = f"workshop convert {path} {nemo2} --to nemo2"
    known = _is_convertible(checkpoint) or not checkpoint.architecture
    why = f"workshop convert knows the families {_KNOWN}, and this is none of them"
    train = finetune(quoted(paths.bridged_checkpoint(name)))
    nemo = {
        SCRIPT: ("after", f"{convert} && workshop bridge {nemo2} && {train}"),
        NEMO2: ("after", convert),
    }
    nemo = nemo if known else dict.fromkeys((SCRIPT, NEMO2), ("no", why))
    if checkpoint.variant == "Megatron-Bridge":
        bridge = "AutoBridge.from_hf_pretrained(HF_ID)"
        export = f'{bridge}.export_ckpt("{text}", "{shown(paths.huggingface_model(name))}")'
        loads = {BRIDGE: ("yes", f'{bridge}.load_megatron_model("{text}")')}
        return _after_huggingface(export) | nemo | loads
    if not known:
        return for_all("no", why)
    return _after_huggingface(f"{convert} && workshop import --to-huggingface {nemo2}") | nemo


def _huggingface(checkpoint: Checkpoint) -> Answers:
    path, text, name = quoted(checkpoint.path), shown(checkpoint.path), name_of(checkpoint)
    load = f'AutoModelForCausalLM.from_pretrained("{text}")'
    mounted = f"with {text} mounted and NIM_MODEL_"
    answers: Answers = {
        TRANSFORMERS: ("yes", load),
        PEFT: ("yes", f"as the base of an adapter: PeftModel.from_pretrained({load}, ADAPTER)"),
        TRTLLM: ("yes", f"trtllm-serve {path}"),
        NIM1: (
            "yes",
            f"the container llm-nim {mounted}NAME naming its place there {BY_ITS_PAGES}",
        ),
        NIM2: (
            "yes",
            f"the container model-free-nim {mounted}PATH naming its place there {BY_ITS_PAGES}",
        ),
        VLLM: ("yes", f"vllm serve {path}"),
        BRIDGE: ("yes", f'AutoBridge.from_hf_pretrained("{text}")'),
    }
    found = huggingface_config.findings(checkpoint.path, checkpoint.dtype)
    why = next((item.message for item in found if item.severity is Severity.REFUSED), None)
    if not _is_convertible(checkpoint):
        why = (
            f"workshop import knows the families {_KNOWN}; NeMo's own llm.import_ckpt has a few "
            "more"
        )
    if why:
        return answers | dict.fromkeys((SCRIPT, NEMO2), ("no", why))
    ours = text == shown(paths.huggingface_model(name))
    first = f"workshop import {shlex.quote(name) if ours else path}"
    view = paths.bridged_checkpoint(name)
    train = f"{first} && workshop bridge {quoted(paths.nemo2_checkpoint(name))} && " + (
        finetune(quoted(view))
    )
    return answers | {SCRIPT: ("after", train), NEMO2: ("after", first)}


def _gguf(checkpoint: Checkpoint) -> Answers:
    path = quoted(checkpoint.path)
    vllm = {VLLM: ("yes", f"vllm serve {path} --tokenizer BASE (experimental in vLLM)")}
    kind = checkpoint.variant
    if kind not in GGUF:
        why = (
            f"transformers 4.51 reads no GGUF of {kind}; give the Hugging Face model that it was "
            "made from"
        )
        return for_all("no", why) | vllm
    load = (
        f'AutoModelForCausalLM.from_pretrained("{shown(checkpoint.path.parent)}", '
        f'gguf_file="{checkpoint.path.name}")'
    )
    new = paths.huggingface_model(name_of(checkpoint))
    save = f'{load}.save_pretrained("{shown(new)}"), and the tokenizer likewise'
    nemo = ("after", f"{save}; then workshop import {shlex.quote(new.name)}")
    if not _is_convertible(checkpoint):
        nemo = ("no", f"workshop import knows the families {_KNOWN}")
    transformers = {TRANSFORMERS: ("yes", f"{load}, which turns it into float32")}
    return _after_huggingface(save) | dict.fromkeys((SCRIPT, NEMO2), nemo) | transformers | vllm


_BY_KIND: dict[Kind, Callable[[Checkpoint], Answers]] = {
    Kind.NEMO2: _nemo2,
    Kind.NEMO1_ARCHIVE: _nemo1,
    Kind.NEMO1_DIRECTORY: _nemo1,
    Kind.BRIDGED_VIEW: _view,
    Kind.LIGHTNING: _lightning,
    Kind.MEGATRON: _megatron,
    Kind.HUGGINGFACE: _huggingface,
    Kind.GGUF: _gguf,
}
