"""What can load a checkpoint: the answers fit the installed readers, and the commands exist."""

import contextlib
import dataclasses
import io
import re
import shlex
from pathlib import Path

import pytest

from workshop_utils.checkpoints.formats.architecture import Architecture
from workshop_utils.checkpoints.formats.summary import Adapter, Checkpoint, Kind
from workshop_utils.checkpoints.formats.tensor import whole
from workshop_utils.checkpoints.verify import loads_in as doctor
from workshop_utils.checkpoints.verify.loads_in import READERS, loads_in
from workshop_utils.cli import build_parser

LLAMA = Architecture(2, 32, 4, 2, 8, 48, 64, False, 10000.0, family="Llama")
LORA = Adapter(8, 16, ("attention_qkv",), "/models/base", True)


def checkpoint(kind: Kind, **changes) -> Checkpoint:
    """A description such as the readers give."""
    given = {
        "architecture": LLAMA,
        "adapter": None,
        "detail": None,
        "tensors": (whole("a", (2,), "float32", "f", 0, 8),),
    } | changes
    return Checkpoint(path=Path("a b/model.nemo"), kind=kind, nbytes=8, tokenizer=None, **given)


def answers(kind: Kind, **changes) -> dict[str, tuple[str, str]]:
    return {
        reader.name: (reader.answer, reader.how) for reader in loads_in(checkpoint(kind, **changes))
    }


OTHER = dataclasses.replace(LLAMA, family="gemma")
CASES = {
    "nemo2": (Kind.NEMO2, {"detail": "torch_dist"}),
    "nemo2 of another family": (Kind.NEMO2, {"architecture": OTHER}),
    "nemo2 adapter": (Kind.NEMO2_ADAPTER, {"adapter": LORA}),
    "nemo2 adapter without base": (
        Kind.NEMO2_ADAPTER,
        {"adapter": dataclasses.replace(LORA, base_is_here=False)},
    ),
    "nemo2 dora": (Kind.NEMO2_ADAPTER, {"adapter": dataclasses.replace(LORA, variant="DoRA")}),
    "nemo1": (Kind.NEMO1_ARCHIVE, {}),
    "nemo1 directory": (Kind.NEMO1_DIRECTORY, {}),
    "nemo1 parts": (Kind.NEMO1_ARCHIVE, {"parallel": (2, 1)}),
    "nemo1 of another family": (Kind.NEMO1_ARCHIVE, {"architecture": OTHER}),
    "nemo1 adapter": (Kind.NEMO1_ARCHIVE_ADAPTER, {"adapter": LORA}),
    "nemo1 adapter parts": (Kind.NEMO1_ARCHIVE_ADAPTER, {"adapter": LORA, "parallel": (2, 1)}),
    "nemo1 adapter directory": (
        Kind.NEMO1_DIRECTORY,
        {"adapter": dataclasses.replace(LORA, targets=("mlp_fc1",))},
    ),
    "nemo1 p-tuning": (
        Kind.NEMO1_ARCHIVE_ADAPTER,
        {"adapter": Adapter(None, None, (), None, None, "not LoRA")},
    ),
    "export": (
        Kind.NEMO1_ARCHIVE_ADAPTER,
        {"adapter": LORA, "made_for": "TensorRT-LLM's .nemo reader"},
    ),
    "view": (Kind.BRIDGED_VIEW, {"notes": ("a view of the NeMo 2.0 checkpoint models/nemo2/a",)}),
    "lightning": (Kind.LIGHTNING, {}),
    "lightning of nemo": (Kind.LIGHTNING, {"detail": "of NeMo 1"}),
    "megatron-lm": (Kind.MEGATRON, {"detail": "Megatron-LM, torch_dist"}),
    "megatron-lm old": (Kind.MEGATRON, {"detail": "Megatron-LM, torch", "parallel": (2, 1)}),
    "megatron-lm of another family": (
        Kind.MEGATRON,
        {"detail": "Megatron-LM, torch_dist", "architecture": OTHER},
    ),
    "megatron-bridge": (Kind.MEGATRON, {"detail": "Megatron-Bridge, torch_dist"}),
    "megatron-bridge of another family": (
        Kind.MEGATRON,
        {"detail": "Megatron-Bridge, torch_dist", "architecture": OTHER},
    ),
    "megatron-bridge adapter": (
        Kind.MEGATRON,
        {"detail": "Megatron-Bridge, torch_dist", "adapter": LORA},
    ),
    "hugging face": (Kind.HUGGINGFACE, {"detail": "llama"}),
    "hugging face of another family": (
        Kind.HUGGINGFACE,
        {"detail": "gemma", "architecture": OTHER},
    ),
    "hugging face quantised": (
        Kind.HUGGINGFACE,
        {"tensors": (whole("a", (2,), "uint8", "f", 0, 2),)},
    ),
    "hugging face without architecture": (Kind.HUGGINGFACE, {"architecture": None}),
    "peft": (Kind.PEFT, {"architecture": None, "adapter": LORA}),
    "peft dora": (Kind.PEFT, {"adapter": dataclasses.replace(LORA, variant="DoRA")}),
    "peft of a large rank": (Kind.PEFT, {"adapter": dataclasses.replace(LORA, rank=1024)}),
    "peft without base": (Kind.PEFT, {"adapter": dataclasses.replace(LORA, base=None, rank=None)}),
    "gguf": (Kind.GGUF, {"detail": "llama, Q4_1"}),
    "gguf of another family": (Kind.GGUF, {"detail": "gemma2, Q4_1", "architecture": OTHER}),
    "gguf of an architecture that transformers lacks": (
        Kind.GGUF,
        {"detail": "mamba2, Q4_1", "architecture": OTHER},
    ),
}


def test_every_kind_is_tried():
    assert {kind for kind, _ in CASES.values()} == set(Kind)


@pytest.mark.parametrize("case", CASES)
def test_every_reader_is_answered_and_every_command_exists(case, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    kind, changes = CASES[case]
    readers = loads_in(checkpoint(kind, **changes))
    assert tuple(reader.name for reader in readers) == READERS
    parser = build_parser()
    for reader in readers:
        assert reader.answer in ("yes", "after", "no")
        assert reader.how
        for command in re.findall(
            r"\bworkshop ((?:models|import|bridge|finetune|export|convert|inspect|verify) [^;&]*)",
            reader.how,
        ):
            # In a sentence the command ends where the words of the sentence go on.
            words = shlex.split(command.partition(", ")[0].partition("...")[0])
            if words[1] in ("knows", "takes"):
                continue
            with contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    args, rest = parser.parse_known_args(words)
                except SystemExit:
                    pytest.fail(f"{command}: {said.getvalue()}")
            assert args.run
            assert all("=" in word for word in rest), command


def yes(case: str) -> set[str]:
    kind, changes = CASES[case]
    return {name for name, (answer, _) in answers(kind, **changes).items() if answer == "yes"}


def test_who_can_load_it_as_it_is():
    servers = {"TensorRT-LLM", "NIM 1.x", "NIM 2.x", "vLLM"}
    assert yes("nemo2") == {"NeMo 2.0 API"}
    assert yes("nemo2 adapter") == {"NeMo 2.0 API"}
    assert yes("nemo2 adapter without base") == set()
    assert (
        yes("nemo1") == yes("nemo1 adapter") == yes("view") == yes("nemo1 parts") == {"script path"}
    )
    assert yes("export") == {"TensorRT-LLM", "NIM 1.x"}
    assert yes("hugging face") == {"transformers", "PEFT", "Megatron-Bridge"} | servers
    assert yes("peft") == {"transformers", "PEFT"} | servers
    assert yes("peft dora") == {"transformers", "PEFT"}
    assert yes("peft of a large rank") == {"transformers", "PEFT", "TensorRT-LLM", "NIM 1.x"}
    assert yes("gguf") == {"transformers", "vLLM"}
    assert yes("megatron-bridge") == {"Megatron-Bridge"}
    assert yes("lightning") == set()


def test_paths_are_quoted():
    assert (
        answers(*CASES["nemo1"][:1])["script path"][1]
        == "workshop finetune model.restore_from_path='a b/model.nemo'"
    )


def test_the_base_of_an_adapter_is_in_the_commands():
    how = answers(
        Kind.PEFT, adapter=dataclasses.replace(LORA, base="meta-llama/Llama-3.2-1B", rank=12)
    )
    assert "vllm serve meta-llama/Llama-3.2-1B --enable-lora --max-lora-rank 16" in how["vLLM"][1]
    how = answers(Kind.NEMO1_ARCHIVE_ADAPTER, adapter=LORA)
    assert "model.restore_from_path=/models/base" in how["script path"][1]


def test_the_architectures_are_those_of_the_installed_transformers():
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    assert set(doctor._GGUF_IN_TRANSFORMERS) == set(GGUF_CONFIG_MAPPING) - {"general", "tokenizer"}
