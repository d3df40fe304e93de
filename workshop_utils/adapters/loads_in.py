"""What can load a checkpoint, a model or an adapter: for each reader yes with the call, after with
what has to be done first, or no with the reason.

What a reader takes of an adapter is asked of :mod:`workshop_utils.adapters.rules`, by names, shapes
and configuration: no values are read.
"""

import shlex
from collections.abc import Iterator

from workshop_utils.adapters.rules import ANY_RANK, READERS, Facts, Severity, check
from workshop_utils.checkpoints.formats.lora_layout import peft_only
from workshop_utils.checkpoints.formats.summary import Checkpoint, Kind
from workshop_utils.checkpoints.verify import loads_in as models
from workshop_utils.checkpoints.verify.loads_in import (
    BRIDGE,
    BY_ITS_PAGES,
    NEMO2,
    NIM1,
    NIM2,
    PEFT,
    SCRIPT,
    TRANSFORMERS,
    TRTLLM,
    VLLM,
    Answer,
    Answers,
    Reader,
    finetune,
    for_all,
    name_of,
    quoted,
)
from workshop_utils.core import paths
from workshop_utils.core.paths import shown

_CODES = {
    SCRIPT: "nemo", PEFT: "peft", TRTLLM: "trtllm", VLLM: "vllm", NIM1: "nim1", NIM2: "nim2",
    BRIDGE: "bridge",
}  # fmt: skip
_OWN = "it reads only adapters of its own"
_NO_IMPORTER = "NeMo 2.0 has no importer of other adapters"


def loads_in(checkpoint: Checkpoint) -> list[Reader]:
    """One answer for each of :data:`.models.READERS`, in that order."""
    answers = None
    if checkpoint.kind is Kind.PEFT:
        answers = _peft(checkpoint)
    elif checkpoint.kind is Kind.NEMO2_ADAPTER:
        answers = _nemo2(checkpoint)
    elif checkpoint.adapter and checkpoint.kind is Kind.MEGATRON:
        answers = _bridge(checkpoint)
    elif checkpoint.adapter and checkpoint.kind in (
        Kind.NEMO1_ARCHIVE,
        Kind.NEMO1_ARCHIVE_ADAPTER,
        Kind.NEMO1_DIRECTORY,
    ):
        answers = _nemo1(checkpoint)
    if answers is None:
        return models.loads_in(checkpoint)
    return [Reader(name, *answers[name]) for name in models.READERS]


def reader_lines(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """What can load it, as it is and after a command, and what cannot; readers with the same answer
    share a line."""
    shared: dict[tuple[str, str], list[str]] = {}
    for reader in loads_in(checkpoint):
        shared.setdefault((reader.answer, reader.how), []).append(reader.name)
    titles = {"yes": "loads in", "after": "loads after", "not known": "not known", "no": "not in"}
    for answer, title in titles.items():
        for (its_answer, how), names in shared.items():
            if its_answer == answer:
                who = ", ".join(names)
                yield title, f"{how}  [{who}]" if answer == "after" else f"{who}: {how}"
                title = ""


def _asked(facts: Facts, calls: dict[str, str]) -> Answers:
    """The ``calls`` of those readers whose rules ``facts`` keep, and the first rule of the others
    that is broken, or of which nobody knows."""
    answers: dict[str, tuple[Answer, str]] = {}
    for name, call in calls.items():
        result = check(facts, _CODES[name], ANY_RANK, copied=True, values=False)
        answers[name] = "yes", call
        if result.broken:
            first = result.broken[0]
            why = _OWN if name == BRIDGE else f"{first.rule}: {first.fault}"
            answers[name] = "no", f"{why}; {first.fix}"
        elif unknown := result.of(Severity.NOT_KNOWN):
            answers[name] = "not known", f"{unknown[0].fault}; {unknown[0].fix}"
    return answers


def _peft(checkpoint: Checkpoint) -> Answers:
    path, text, adapter = quoted(checkpoint.path), shown(checkpoint.path), checkpoint.adapter
    name, base, export = name_of(checkpoint), adapter.base or "BASE", f"workshop export {path}"
    largest = READERS["vllm"].enough_for(adapter.rank or 0) if adapter.rank else "RANK"
    load = f'AutoModelForCausalLM.from_pretrained("{base}")'
    store = f"cp -r {path} $NIM_PEFT_SOURCE/"
    request = f'LoRARequest("{name}", 1, "{text}")'
    facts = Facts.of(checkpoint.path)
    answers = _asked(
        facts,
        {
            PEFT: f'PeftModel.from_pretrained({load}, "{text}")',
            TRTLLM: f'LLM("{base}", enable_lora=True).generate(..., lora_request={request})',
            NIM1: f"{store}, with a rank of at most NIM_MAX_LORA_RANK {BY_ITS_PAGES}",
            NIM2: f"{store}, with --max-lora-rank {largest} {BY_ITS_PAGES}",
            VLLM: f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {largest} "
            f"--lora-modules {name}={path}",
            BRIDGE: "",
        },
    )
    # transformers loads adapters with PEFT.
    transformers = answers[PEFT]
    if transformers[0] == "yes":
        transformers = "yes", f'{load}.load_adapter("{text}"), with PEFT installed'
    # Here `workshop export` decides, which takes what PEFT takes but the fields of PEFT's own.
    script: tuple[Answer, str] = "after", f"{export} --to nemo --base DIR"
    nemo2: tuple[Answer, str] = (
        "no",
        (f"{_NO_IMPORTER}; merge it: {export} --to nemo2-merged --base DIR"),
    )
    if answers[PEFT][0] == "no":
        script = nemo2 = answers[PEFT]
    elif only := peft_only(facts.config):
        why = f"{_NO_IMPORTER}, and no other form holds {', '.join(only)}"
        script = nemo2 = "no", f"{why}; merge it with PEFT (merge_and_unload), then workshop import"
    elif adapter.variant != "LoRA":
        script = "no", f"a .nemo holds plain LoRA; merge it: {export} --to hf-merged --base DIR"
    return answers | {TRANSFORMERS: transformers, SCRIPT: script, NEMO2: nemo2}


def _nemo1(checkpoint: Checkpoint) -> Answers:
    path, text, adapter = quoted(checkpoint.path), shown(checkpoint.path), checkpoint.adapter
    base = shlex.quote(shown(adapter.base)) if adapter.base and adapter.base_is_here else "BASE"
    train = f"{finetune(base, checkpoint)} model.peft.restore_from_path={path}"
    nemo = {
        SCRIPT: ("yes", train),
        NEMO2: (
            "no",
            f"{_NO_IMPORTER}; use the script path, or train with the NeMo 2.0 API",
        ),
        BRIDGE: ("no", f"{_OWN}; serve it as PEFT with another reader"),
    }
    if adapter.variant != "LoRA":
        why = "workshop export takes LoRA; merge it with NeMo's own script of that kind of adapter"
        return for_all("no", why) | nemo
    export = f"workshop export {path}"
    if checkpoint.kind is Kind.NEMO1_DIRECTORY:
        packed = quoted(checkpoint.path.resolve().with_name(f"{name_of(checkpoint)}.nemo"))
        export = f"tar -cf {packed} -C {path} . && workshop export {packed}"
        return for_all("after", f"{export} --to hf-peft") | nemo
    store = f"$NIM_PEFT_SOURCE/{shlex.quote(name_of(checkpoint))}"
    asked = _asked(
        Facts.of(checkpoint.path),
        {
            SCRIPT: train,
            TRTLLM: f'LoraConfig(lora_dir=["{text}"], lora_ckpt_source="nemo")',
            NIM1: f"mkdir {store} && cp {path} {store}/ {BY_ITS_PAGES}",
        },
    )
    if checkpoint.parallel != (1, 1):
        asked[SCRIPT] = "yes", train  # NeMo itself loads the parts, on as many ranks
    others = for_all("after", f"{export} --to hf-peft")
    if asked[TRTLLM][0] != "yes" and set(adapter.targets) == {"attention_qkv"}:
        others[TRTLLM] = "after", f"{export} --to nemo --reader trtllm"
    return (
        others
        | nemo
        | {
            name: answer
            for name, answer in asked.items()
            if answer[0] in ("yes", "not known") or name == SCRIPT
        }
    )


def _nemo2(checkpoint: Checkpoint) -> Answers:
    path, text, adapter = quoted(checkpoint.path), shown(checkpoint.path), checkpoint.adapter
    export = f"workshop export {path}"
    answers = for_all("after", f"{export} --to hf-peft")
    answers[SCRIPT] = "after", f"{export} --to nemo"
    if adapter.variant == "DoRA":
        merge = f"it takes plain LoRA, not DoRA; merge it: {export} --to hf-merged --base DIR"
        answers |= dict.fromkeys((SCRIPT, TRTLLM, NIM1, NIM2, VLLM), ("no", merge))
    answers[BRIDGE] = "no", f"{_OWN}; merge it: {export} --to nemo2-merged --base DIR"
    answers[NEMO2] = "yes", f'llm.generate(path="{text}", ...), which finds the base by itself'
    if not adapter.base_is_here:
        missing = (
            f"its base is not at {adapter.base}: put it there, or write its place into "
            'weights/adapter_metadata.json ("model_ckpt_path")'
        )
        answers[NEMO2] = "after", missing
    return answers


def _bridge(checkpoint: Checkpoint) -> Answers:
    folder = checkpoint.path.resolve().parent
    out = paths.runs_dir() / "exports" / f"{folder.name}-{name_of(checkpoint)}"
    export = (
        f'AutoBridge.from_hf_pretrained(BASE).export_adapter_ckpt("{shown(checkpoint.path)}", '
        f'"{shown(out)}")'
    )
    nemo = "no", f"it has no importer of Megatron-Bridge's adapters; serve it as PEFT: {export}"
    load = f'checkpoint.load="{shown(folder)}", with checkpoint.pretrained_checkpoint=BASE'
    answers = for_all("after", export) | dict.fromkeys((SCRIPT, NEMO2), nemo)
    return answers | {BRIDGE: ("yes", load)}
