"""What can load a checkpoint: the answers fit the installed readers, and the commands exist."""

import contextlib
import dataclasses
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from export_samples import ALL, GQA, config_of, saved, tensors_of, write_adapter, write_tar

from workshop_utils.adapters.export import export
from workshop_utils.adapters.loads_in import loads_in
from workshop_utils.checkpoints.formats.architecture import Architecture
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.summary import Adapter, Checkpoint, Kind
from workshop_utils.checkpoints.formats.tensor import whole
from workshop_utils.checkpoints.verify.loads_in import GGUF, READERS
from workshop_utils.cli import build_parser
from workshop_utils.core.errors import DamagedCheckpoint, UnsupportedAdapter

LLAMA = Architecture(2, 32, 4, 2, 8, 48, 64, False, 10000.0, family="Llama")
OTHER = {"architecture": dataclasses.replace(LLAMA, family="gemma")}
LORA = Adapter(8, 16, ("attention_qkv",), "/models/base", True)


def adapter(**changes):
    return {"adapter": dataclasses.replace(LORA, **changes)}


#: Kind and fields of a description such as the readers give.
MODELS = {
    "nemo2": (Kind.NEMO2, {"detail": "torch_dist"}),
    "nemo2 of another family": (Kind.NEMO2, OTHER),
    "nemo2 adapter": (Kind.NEMO2_ADAPTER, adapter()),
    "nemo2 adapter without base": (Kind.NEMO2_ADAPTER, adapter(base_is_here=False)),
    "nemo2 dora": (Kind.NEMO2_ADAPTER, adapter(variant="DoRA")),
    "nemo1": (Kind.NEMO1_ARCHIVE, {}),
    "nemo1 directory": (Kind.NEMO1_DIRECTORY, {}),
    "nemo1 parts": (Kind.NEMO1_ARCHIVE, {"parallel": (2, 1)}),
    "nemo1 of another family": (Kind.NEMO1_ARCHIVE, OTHER),
    "nemo1 adapter directory": (Kind.NEMO1_DIRECTORY, adapter(targets=("mlp_fc1",))),
    "nemo1 p-tuning": (Kind.NEMO1_ARCHIVE_ADAPTER, adapter(variant="not LoRA")),
    "view": (Kind.BRIDGED_VIEW, {"view_of": "models/nemo2/a"}),
    "lightning": (Kind.LIGHTNING, {}),
    "lightning of nemo": (Kind.LIGHTNING, {"detail": "of NeMo 1"}),
    "megatron-lm": (Kind.MEGATRON, {"variant": "Megatron-LM"}),
    "megatron-lm old": (Kind.MEGATRON, {"storage": "torch", "parallel": (2, 1)}),
    "megatron-lm of another family": (Kind.MEGATRON, {"variant": "Megatron-LM"} | OTHER),
    "megatron-bridge": (Kind.MEGATRON, {"variant": "Megatron-Bridge"}),
    "megatron-bridge of another family": (
        Kind.MEGATRON, {"variant": "Megatron-Bridge"} | OTHER),
    "megatron-bridge adapter": (
        Kind.MEGATRON, {"variant": "Megatron-Bridge"} | adapter()),
    "hugging face": (Kind.HUGGINGFACE, {"detail": "llama"}),
    "hugging face of another family": (Kind.HUGGINGFACE, {"detail": "gemma"} | OTHER),
    "hugging face quantised": (
        Kind.HUGGINGFACE, {"tensors": (whole("a", (2,), "uint8", "f", 0, 2),)}),
    "hugging face without architecture": (Kind.HUGGINGFACE, {"architecture": None}),
    "gguf": (Kind.GGUF, {"variant": "llama"}),
    "gguf of another family": (Kind.GGUF, {"variant": "gemma2"} | OTHER),
    "gguf of an architecture that transformers lacks": (Kind.GGUF, {"variant": "mamba2"} | OTHER),
}  # fmt: skip
FILES = (
    "peft", "peft dora", "peft of a large rank", "peft without base", "nemo1 adapter",
    "nemo1 adapter parts", "export",
)  # fmt: skip


def described(case: str, root: Path) -> Checkpoint:
    """The description of ``case``: in the fields of :data:`MODELS`, or of files."""
    if case in MODELS:
        kind, changes = MODELS[case]
        tensors = (whole("a", (2,), "float32", "f", 0, 8),)
        given = {"architecture": LLAMA, "adapter": None, "detail": None, "tensors": tensors}
        path = Path("a b/model.nemo")
        return Checkpoint(path=path, kind=kind, nbytes=8, tokenizer=None, **given | changes)
    rank = 600 if "rank" in case else 8
    config, state = config_of(GQA, rank=rank), tensors_of(GQA, rank=rank)
    if case == "nemo1 adapter parts":
        import yaml

        config["tensor_model_parallel_size"] = 2
        halves = {key: each.chunk(2)[0].clone() for key, each in state.items()}
        parts = {f"mp_rank_0{part}/model_weights.ckpt": saved(halves) for part in (0, 1)}
        members = {"model_config.yaml": yaml.safe_dump(config).encode()} | parts
        return identify(write_tar(root / "a.nemo", members))
    source = write_adapter(root / "a.nemo", config, state)
    if case == "nemo1 adapter":
        return identify(source)
    if case == "export":
        return identify(export(source, "nemo", root / "export", reader="trtllm"))
    base = "meta-llama/Llama-3.2-1B"
    directory = export(source, "hf-peft", root / "peft", base_model=base)
    fields = json.loads((directory / "adapter_config.json").read_text())
    if case == "peft without base":
        fields["base_model_name_or_path"] = None
    if case == "peft dora":
        from safetensors.torch import load_file, save_file

        fields["use_dora"], file = True, directory / "adapter_model.safetensors"
        weights = load_file(file)
        for key in [key for key in weights if "lora_B" in key]:
            name = key.replace("lora_B.weight", "lora_magnitude_vector")
            weights[name] = torch.ones(weights[key].shape[0])
        save_file(weights, file)
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return identify(directory)


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """case -> name of the reader -> (answer, how)."""
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def of(case: str) -> dict[str, tuple[str, str]]:
        readers = loads_in(described(case, tmp_path))
        return {reader.name: (reader.answer, reader.how) for reader in readers}

    return of


def test_every_kind_is_tried():
    kinds = {kind for kind, _ in MODELS.values()} | {Kind.PEFT, Kind.BRIDGED_VIEW}
    assert kinds == set(Kind)


@pytest.mark.parametrize("case", [*MODELS, *FILES])
def test_every_reader_is_answered_and_every_command_exists(case, answers):
    found = answers(case)
    assert tuple(found) == READERS
    parser = build_parser()
    for answer, how in found.values():
        assert answer in ("yes", "after", "not known", "no") and how
        for command in re.findall(
            r"\bworkshop ((?:models|import|bridge|finetune|export|convert|inspect|verify) [^;&]*)",
            how,
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


SERVERS = {"TensorRT-LLM", "NIM 1.x", "NIM 2.x", "vLLM"}


@pytest.mark.parametrize(
    "case, readers",
    [
        ("nemo2", {"NeMo 2.0 API"}),
        ("nemo2 adapter", {"NeMo 2.0 API"}),
        ("nemo2 adapter without base", set()),
        ("nemo1", {"script path"}),
        ("nemo1 adapter", {"script path", "NIM 1.x"}),
        ("view", {"script path"}),
        ("nemo1 parts", {"script path"}),
        ("export", {"TensorRT-LLM"}),
        ("hugging face", {"transformers", "PEFT", "Megatron-Bridge"} | SERVERS),
        ("peft", {"transformers", "PEFT"} | SERVERS),
        ("peft without base", {"transformers", "PEFT"} | SERVERS),
        ("peft dora", {"transformers", "PEFT"}),
        ("peft of a large rank", {"transformers", "PEFT", "TensorRT-LLM", "NIM 1.x"}),
        ("gguf", {"transformers", "vLLM"}),
        ("megatron-bridge", {"Megatron-Bridge"}),
        ("megatron-bridge adapter", {"Megatron-Bridge"}),
        ("lightning", set()),
    ],
)
def test_who_can_load_it_as_it_is(case, readers, answers):
    assert {name for name, (answer, _) in answers(case).items() if answer == "yes"} == readers


def test_the_commands(answers, tmp_path):
    train = "workshop finetune model.restore_from_path"
    assert answers("nemo1")["script path"][1] == f"{train}='a b/model.nemo'"
    serve = "vllm serve meta-llama/Llama-3.2-1B --enable-lora --max-lora-rank 8 --lora-modules"
    assert serve in answers("peft")["vLLM"][1]
    assert "--nproc-per-node 2" in answers("nemo1 adapter parts")["script path"][1]
    trtllm = "after", "workshop export a.nemo --to nemo --reader trtllm"
    assert answers("nemo1 adapter")["TensorRT-LLM"] == trtllm
    assert answers("export")["NIM 1.x"][0] == "not known"
    mlp = write_adapter(tmp_path / "mlp.nemo", config_of(GQA, ALL), tensors_of(GQA, ALL))
    how = {reader.name: reader.how for reader in loads_in(identify(mlp))}
    assert how["TensorRT-LLM"] == "workshop export mlp.nemo --to hf-peft"


@pytest.mark.parametrize(
    "fields, taken",
    [
        ({}, "after"),
        ({"task_type": None}, "after"),
        ({"init_lora_weights": "pissa"}, "no"),
        ({"alora_invocation_tokens": [1]}, "no"),
        ({"bias": "all"}, "no"),
        ({"r": 3}, "no"),
    ],
)
def test_what_export_refuses_is_not_offered(fields, taken, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    path = described("peft", tmp_path).path
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | fields))
    answers = {reader.name: reader.answer for reader in loads_in(identify(path))}
    assert answers["script path"] == taken
    if taken == "no":
        with pytest.raises((UnsupportedAdapter, DamagedCheckpoint)):
            export(path, "hf-peft", tmp_path / "again")
    else:
        assert export(path, "hf-peft", tmp_path / "again").is_dir()


def test_the_architectures_are_those_of_the_installed_transformers():
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    assert set(GGUF) == set(GGUF_CONFIG_MAPPING) - {"general", "tokenizer"}
