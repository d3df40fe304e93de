"""What can load a checkpoint: for each reader yes with the call, after with what has to be done
first, or no with the reason.

Where the facts come from: NeMo 2.4.1 and transformers 4.51 as installed; TensorRT-LLM's
``lora_manager.py``; vLLM's ``lora_model.py`` and ``peft_helper.py``; Megatron-Bridge's
``AutoBridge`` (0.5); the documentation pages of NIM 1.15 and 2.0. NIM's own loader is closed: what
is said of it is what its pages say, and was not tried.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workshop_utils.checkpoints.formats.gpt_classes import FAMILIES
from workshop_utils.checkpoints.formats.summary import Checkpoint, Kind
from workshop_utils.core import paths
from workshop_utils.core.paths import shown

Answer = Literal["yes", "after", "no"]
Answers = dict[str, tuple[Answer, str]]

SCRIPT, NEMO2, TRANSFORMERS, PEFT = "script path", "NeMo 2.0 API", "transformers", "PEFT"
TRTLLM, NIM1, NIM2, VLLM, BRIDGE = "TensorRT-LLM", "NIM 1.x", "NIM 2.x", "vLLM", "Megatron-Bridge"
READERS = (SCRIPT, NEMO2, TRANSFORMERS, PEFT, TRTLLM, NIM1, NIM2, VLLM, BRIDGE)

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank."""

_GGUF_IN_TRANSFORMERS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen2moe",
    "falcon",
    "phi3",
    "bloom",
    "t5",
    "stablelm",
    "gpt2",
    "starcoder2",
    "mamba",
    "nemotron",
    "gemma2",
)
_BY_ITS_PAGES = "(by NVIDIA's pages, not tried here)"
_OWN_ADAPTERS = "it reads only adapters of its own"


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


def _quoted(path: Path | str) -> str:
    return shlex.quote(shown(path))


def _name(checkpoint: Checkpoint) -> str:
    """What the checkpoint's conversions are called."""
    path = checkpoint.path.resolve()
    return path.stem if path.is_file() else path.name


def _finetune(path: str, checkpoint: Checkpoint | None = None) -> str:
    tensor, pipeline = checkpoint.parallel if checkpoint else (1, 1)
    sizes = (
        f" model.tensor_model_parallel_size={tensor} model.pipeline_model_parallel_size={pipeline}"
        if tensor * pipeline > 1
        else ""
    )
    processes = f" --nproc-per-node {tensor * pipeline}" if sizes else ""
    return f"workshop finetune{processes} model.restore_from_path={path}{sizes}"


def _nemo2_call(path: str) -> str:
    return f'llm.generate(path="{path}", ...), llm.finetune with RestoreConfig(path="{path}")'


def _from_huggingface(directory: Path) -> Answers:
    """The readers of a Hugging Face model ``directory``."""
    path, text = _quoted(directory), shown(directory)
    load = f'AutoModelForCausalLM.from_pretrained("{text}")'
    return {
        TRANSFORMERS: ("yes", load),
        PEFT: ("yes", f"as the base of an adapter: PeftModel.from_pretrained({load}, ADAPTER)"),
        TRTLLM: ("yes", f"trtllm-serve {path}"),
        NIM1: (
            "yes",
            (
                f"the container llm-nim with {text} mounted and NIM_MODEL_NAME naming its place "
                f"there {_BY_ITS_PAGES}"
            ),
        ),
        NIM2: (
            "yes",
            (
                f"the container model-free-nim with {text} mounted and NIM_MODEL_PATH naming its "
                f"place there {_BY_ITS_PAGES}"
            ),
        ),
        VLLM: ("yes", f"vllm serve {path}"),
        BRIDGE: ("yes", f'AutoBridge.from_hf_pretrained("{text}")'),
    }


def _after_huggingface(command: str) -> Answers:
    """All that read a Hugging Face model, which ``command`` makes."""
    return dict.fromkeys((TRANSFORMERS, PEFT, TRTLLM, NIM1, NIM2, VLLM, BRIDGE), ("after", command))


def _all(answer: Answer, how: str) -> Answers:
    return dict.fromkeys(READERS, (answer, how))


def _is_convertible(checkpoint: Checkpoint) -> bool:
    """Whether our commands know the family; a format that does not name one is tried."""
    family = checkpoint.architecture.family if checkpoint.architecture else None
    return family is not None and family.lower() in FAMILIES


def _families() -> str:
    return ", ".join(FAMILIES)


def _nemo2(checkpoint: Checkpoint) -> Answers:
    path, name = _quoted(checkpoint.path), _name(checkpoint)
    call = _nemo2_call(shown(checkpoint.path))
    if not _is_convertible(checkpoint):
        export = (
            f'llm.export_ckpt(path="{shown(checkpoint.path)}", target="hf", output_path=NEW), if '
            "NeMo has an exporter for the family"
        )
        return _after_huggingface(export) | {
            SCRIPT: (
                "no",
                f"workshop bridge knows the families {_families()}; train it with the NeMo 2.0 API",
            ),
            NEMO2: ("yes", call),
        }
    return _after_huggingface(f"workshop import --to-huggingface {path}") | {
        SCRIPT: (
            "after",
            f"workshop bridge {path} && {_finetune(_quoted(paths.bridged_checkpoint(name)))}",
        ),
        NEMO2: ("yes", call),
    }


def _nemo2_adapter(checkpoint: Checkpoint) -> Answers:
    text, adapter = shown(checkpoint.path), checkpoint.adapter
    merge = (
        f'merge it: peft.merge_lora(lora_checkpoint_path="{text}", output_path=MERGED), and use '
        "MERGED"
    )
    missing = (
        f"its base is not at {adapter.base}: put it there, or write its place into "
        'weights/adapter_metadata.json ("model_ckpt_path")'
    )
    export = (
        f'peft.export_lora(lora_checkpoint_path="{text}", '
        f'output_path="{shown(paths.runs_dir() / "exports" / _name(checkpoint))}")'
    )
    if adapter.variant == "LoRA":
        answers = _all("after", export if adapter.base_is_here else f"{missing}; then {export}")
    else:
        answers = _all("no", f"NeMo 2.4 exports LoRA to PEFT but not {adapter.variant}; {merge}")
    return answers | {
        SCRIPT: ("no", f"it reads adapters only as .nemo, and nothing makes one of this; {merge}"),
        NEMO2: ("yes", f'llm.generate(path="{text}", ...), which finds the base by itself')
        if adapter.base_is_here
        else ("after", missing),
        BRIDGE: ("no", f"{_OWN_ADAPTERS}; {merge}"),
    }


def _peft(checkpoint: Checkpoint) -> Answers:
    path, text, name, adapter = (
        _quoted(checkpoint.path),
        shown(checkpoint.path),
        _name(checkpoint),
        checkpoint.adapter,
    )
    merge = "merge it: PeftModel.from_pretrained(base, ...).merge_and_unload().save_pretrained(NEW)"
    base = adapter.base or "BASE"
    largest = next((size for size in VLLM_RANKS if adapter.rank and adapter.rank <= size), "RANK")
    store = f"cp -r {path} $NIM_PEFT_SOURCE/"
    answers = {
        SCRIPT: ("no", f"NeMo has no importer of PEFT adapters; {merge}, then workshop import NEW"),
        NEMO2: ("no", f"NeMo has no importer of PEFT adapters; {merge}, then workshop import NEW"),
        TRANSFORMERS: (
            "yes",
            (
                f'AutoModelForCausalLM.from_pretrained("{base}").load_adapter("{text}"), with PEFT '
                "installed"
            ),
        ),
        PEFT: (
            "yes",
            f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{text}")',
        ),
        TRTLLM: (
            "yes",
            (
                f'LLM("{base}", enable_lora=True).generate(..., lora_request=LoRARequest("{name}", '
                f'1, "{text}"))'
            ),
        ),
        NIM1: ("yes", f"{store}, with a rank of at most NIM_MAX_LORA_RANK {_BY_ITS_PAGES}"),
        NIM2: ("yes", f"{store}, with --max-lora-rank {largest} {_BY_ITS_PAGES}"),
        VLLM: (
            "yes",
            (
                f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {largest} "
                f"--lora-modules {name}={path}"
            ),
        ),
        BRIDGE: ("no", f"{_OWN_ADAPTERS}; {merge}"),
    }
    if adapter.variant != "LoRA":
        answers |= dict.fromkeys(
            (TRTLLM, NIM1, NIM2, VLLM),
            ("no", f"servers of adapters take plain LoRA, not {adapter.variant}; {merge}"),
        )
    elif adapter.rank and adapter.rank > VLLM_RANKS[-1]:
        answers |= dict.fromkeys(
            (NIM2, VLLM),
            (
                "no",
                (
                    f"its rank {adapter.rank} is over {VLLM_RANKS[-1]}, the most that vLLM takes; "
                    f"{merge}"
                ),
            ),
        )
    return answers


def _nemo1(checkpoint: Checkpoint) -> Answers:
    if checkpoint.adapter:
        return _nemo1_adapter(checkpoint)
    path, name = _quoted(checkpoint.path), _name(checkpoint)
    script = {SCRIPT: ("yes", _finetune(path, checkpoint))}
    if checkpoint.architecture and not _is_convertible(checkpoint):
        return (
            _all(
                "no",
                f"workshop convert knows the families {_families()}, and its configuration is of "
                "none of them",
            )
            | script
        )
    nemo2 = _quoted(paths.nemo2_checkpoint(name))
    convert = f"workshop convert {path} {nemo2} --to nemo2"
    return (
        _after_huggingface(f"{convert} && workshop import --to-huggingface {nemo2}")
        | script
        | {NEMO2: ("after", convert)}
    )


def _nemo1_adapter(checkpoint: Checkpoint) -> Answers:
    path, text, name, adapter = (
        _quoted(checkpoint.path),
        shown(checkpoint.path),
        _name(checkpoint),
        checkpoint.adapter,
    )
    if str(checkpoint.made_for).startswith("TensorRT-LLM"):
        again = (
            "this export is made for TensorRT-LLM: its q, k, v rows are in another order and "
            "alpha is multiplied in. Take the .nemo that the training wrote; for PEFT and "
            "servers: workshop export TRAINED.nemo --to hf-peft"
        )
        store = f"$NIM_PEFT_SOURCE/{shlex.quote(name)}"
        return _all("no", again) | {
            TRTLLM: ("yes", f'LoraConfig(lora_dir=["{text}"], lora_ckpt_source="nemo")'),
            NIM1: ("yes", f"mkdir {store} && cp {path} {store}/ {_BY_ITS_PAGES}"),
        }
    base = shlex.quote(shown(adapter.base)) if adapter.base and adapter.base_is_here else "BASE"
    nemo = {
        SCRIPT: ("yes", f"{_finetune(base, checkpoint)} model.peft.restore_from_path={path}"),
        NEMO2: (
            "no",
            (
                "NeMo 2.0 has no importer of NeMo 1 adapters; use the script path, or train with "
                "the NeMo 2.0 API"
            ),
        ),
        BRIDGE: ("no", f"{_OWN_ADAPTERS}; serve it as PEFT with another reader"),
    }
    if adapter.variant != "LoRA":
        return (
            _all(
                "no",
                "workshop export takes LoRA; merge it with NeMo's own script of that kind of "
                "adapter",
            )
            | nemo
        )
    export = f"workshop export {path}"
    if checkpoint.kind is Kind.NEMO1_DIRECTORY:
        packed = _quoted(checkpoint.path.resolve().with_name(f"{name}.nemo"))
        export = f"tar -cf {packed} -C {path} . && workshop export {packed}"
    answers = _all("after", f"{export} --to hf-peft") | nemo
    if set(adapter.targets) == {"attention_qkv"}:
        answers[TRTLLM] = ("after", f"{export} --to nemo")
    return answers


def _view(checkpoint: Checkpoint) -> Answers:
    shows = next(note for note in checkpoint.notes if note.startswith("a view of ")).rpartition(
        " "
    )[2]
    return _all("after", f"inspect {shows}, which it is a view of") | {
        SCRIPT: ("yes", _finetune(_quoted(checkpoint.path)))
    }


def _lightning(checkpoint: Checkpoint) -> Answers:
    if not (checkpoint.detail or checkpoint.adapter):
        text = shown(checkpoint.path)
        return _all(
            "no",
            "only the LightningModule that wrote it knows its weights: "
            f'CLASS.load_from_checkpoint("{text}"), and save the model',
        )
    tool = "examples/nlp/language_modeling/megatron_ckpt_to_nemo.py"
    out = (
        "a .ckpt is for going on with a training; give the .nemo that it wrote at its end, or "
        f"make one with NeMo's {tool}"
    )
    return _all("no", out) | {
        SCRIPT: (
            "yes",
            "to go on: the command of its training again, with exp_manager.resume_if_exists=true",
        ),
    }


def _megatron(checkpoint: Checkpoint) -> Answers:
    path, text, detail = _quoted(checkpoint.path), shown(checkpoint.path), str(checkpoint.detail)
    name = f"{checkpoint.path.resolve().parent.name}-{_name(checkpoint)}"
    if detail.endswith(", torch"):
        return _all(
            "after",
            "load it with Megatron-LM and save it with --ckpt-format torch_dist; then inspect "
            "the new iter_ directory",
        )
    is_bridge = detail.startswith("Megatron-Bridge")
    if checkpoint.adapter:
        export = (
            f'AutoBridge.from_hf_pretrained(BASE).export_adapter_ckpt("{text}", '
            f'"{shown(paths.runs_dir() / "exports" / name)}")'
        )
        nemo = (
            "no",
            f"it has no importer of Megatron-Bridge's adapters; serve it as PEFT: {export}",
        )
        return _all("after", export) | {
            SCRIPT: nemo,
            NEMO2: nemo,
            BRIDGE: (
                "yes",
                (
                    f'checkpoint.load="{shown(checkpoint.path.resolve().parent)}", with '
                    "checkpoint.pretrained_checkpoint=BASE"
                ),
            ),
        }
    nemo2 = paths.nemo2_checkpoint(name)
    convert = f"workshop convert {path} {_quoted(nemo2)} --to nemo2"
    none_of_them = (
        "no",
        f"workshop convert knows the families {_families()}, and this is none of them",
    )
    known = _is_convertible(checkpoint) or not checkpoint.architecture
    bridged = (
        f"{convert} && workshop bridge {_quoted(nemo2)} && "
        f"{_finetune(_quoted(paths.bridged_checkpoint(name)))}"
    )
    nemo = (
        {SCRIPT: ("after", bridged), NEMO2: ("after", convert)}
        if known
        else dict.fromkeys((SCRIPT, NEMO2), none_of_them)
    )
    if is_bridge:
        export = (
            f'AutoBridge.from_hf_pretrained(HF_ID).export_ckpt("{text}", '
            f'"{shown(paths.huggingface_model(name))}")'
        )
        return (
            _after_huggingface(export)
            | nemo
            | {
                BRIDGE: (
                    "yes",
                    f'AutoBridge.from_hf_pretrained(HF_ID).load_megatron_model("{text}")',
                )
            }
        )
    if not known:
        return _all("no", none_of_them[1])
    return (
        _after_huggingface(f"{convert} && workshop import --to-huggingface {_quoted(nemo2)}") | nemo
    )


def _huggingface(checkpoint: Checkpoint) -> Answers:
    name = _name(checkpoint)
    answers = _from_huggingface(checkpoint.path)
    dtype = (checkpoint.dtype or "").partition(",")[0]
    if not _is_convertible(checkpoint):
        reason = (
            f"workshop import knows the families {_families()}; NeMo's own llm.import_ckpt has a "
            "few more"
        )
        return answers | dict.fromkeys((SCRIPT, NEMO2), ("no", reason))
    if dtype not in ("float64", "float32", "float16", "bfloat16"):
        reason = (
            f"its weights are quantised ({dtype}), which NeMo's importer does not take; give the "
            "model that it was made from"
        )
        return answers | dict.fromkeys((SCRIPT, NEMO2), ("no", reason))
    ours = shown(checkpoint.path) == shown(paths.huggingface_model(name))
    first = f"workshop import {shlex.quote(name) if ours else _quoted(checkpoint.path)}"
    view = paths.bridged_checkpoint(name)
    return answers | {
        SCRIPT: (
            "after",
            (
                f"{first} && workshop bridge {_quoted(paths.nemo2_checkpoint(name))} && "
                f"{_finetune(_quoted(view))}"
            ),
        ),
        NEMO2: ("after", first),
    }


def _gguf(checkpoint: Checkpoint) -> Answers:
    path = _quoted(checkpoint.path)
    vllm = ("yes", f"vllm serve {path} --tokenizer BASE (experimental in vLLM)")
    kind = str(checkpoint.detail).partition(",")[0]
    if kind not in _GGUF_IN_TRANSFORMERS:
        out = (
            f"transformers 4.51 reads no GGUF of {kind}; give the Hugging Face model that it was "
            "made from"
        )
        return _all("no", out) | {VLLM: vllm}
    load = (
        f'AutoModelForCausalLM.from_pretrained("{shown(checkpoint.path.parent)}", '
        f'gguf_file="{checkpoint.path.name}")'
    )
    new = paths.huggingface_model(_name(checkpoint))
    save = f'{load}.save_pretrained("{shown(new)}"), and the tokenizer likewise'
    nemo = ("after", f"{save}; then workshop import {shlex.quote(new.name)}")
    if not _is_convertible(checkpoint):
        nemo = ("no", f"workshop import knows the families {_families()}")
    return _after_huggingface(save) | {
        SCRIPT: nemo,
        NEMO2: nemo,
        TRANSFORMERS: ("yes", f"{load}, which turns it into float32"),
        VLLM: vllm,
    }


_BY_KIND: dict[Kind, Callable[[Checkpoint], Answers]] = {
    Kind.NEMO2: _nemo2,
    Kind.NEMO2_ADAPTER: _nemo2_adapter,
    Kind.NEMO1_ARCHIVE: _nemo1,
    Kind.NEMO1_ARCHIVE_ADAPTER: _nemo1,
    Kind.NEMO1_DIRECTORY: _nemo1,
    Kind.BRIDGED_VIEW: _view,
    Kind.LIGHTNING: _lightning,
    Kind.MEGATRON: _megatron,
    Kind.HUGGINGFACE: _huggingface,
    Kind.PEFT: _peft,
    Kind.GGUF: _gguf,
}
