"""Adapters, sound and broken in every way that users have reported, judged by the rules of their
readers."""

import gzip
import io
import json
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from export_samples import ALL, GQA, NAMES, config_of, saved, tensors_of, write_adapter, write_tar
from safetensors.torch import load_file, save_file

from workshop_utils import cli
from workshop_utils.adapters.export import export
from workshop_utils.adapters.rules.judge import judge
from workshop_utils.core.errors import NotACheckpoint, WorkshopError

FIRST = f"model.decoder.layers.0.{NAMES['attention_qkv']}"
IN, OUT = f"{FIRST}.linear_in.weight", f"{FIRST}.linear_out.weight"
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
OURS = {"reader": "TensorRT-LLM", "qkv_order": "qkv"}


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One adapter of four targets and one of attention_qkv, in every form."""
    folder = tmp_path_factory.mktemp("conform")
    source = write_adapter(folder / "a.nemo", config_of(GQA, ALL), tensors_of(GQA, ALL))
    qkv = write_adapter(folder / "q.nemo", config_of(GQA), tensors_of(GQA))
    return {
        "hf-peft": export(source, "hf-peft", folder / "hf"),
        "trtllm": export(qkv, "nemo", folder / "trtllm"),
        "nemo": export(source, "nemo", folder / "nemo", reader="nemo"),
    }


def broken(found) -> str:
    """Every broken rule with its fault and fix, in one text."""
    assert all(rule.fix for rule in found.broken)
    return "\n".join(f"{rule.rule}: {rule.fault} -> {rule.fix}" for rule in found.broken)


@pytest.mark.parametrize(
    "form, reader",
    [
        ("hf-peft", "peft"),
        ("hf-peft", "vllm"),
        ("hf-peft", "nim1"),
        ("hf-peft", "nim2"),
        ("hf-peft", "trtllm"),
        ("trtllm", "trtllm"),
        ("trtllm", "nim1"),
        ("nemo", "nemo"),
    ],
)
def test_an_export_conforms_to_its_readers(exported, form, reader):
    found = judge(exported[form], reader)
    assert found.conforms, broken(found)
    assert len(found.rules) >= 15


@pytest.mark.parametrize(
    "form, reader, words",
    [
        ("trtllm", "nim2", "--to hf-peft"),
        ("trtllm", "vllm", "--to hf-peft"),
        ("trtllm", "nemo", "one after the other, for TensorRT-LLM"),
        ("nemo", "trtllm", "attention_qkv only"),
        ("nemo", "nim1", "attention_qkv only"),
        ("hf-peft", "nemo", "--to nemo --reader nemo"),
    ],
)
def test_an_export_for_somebody_else_is_refused_with_a_way_out(exported, form, reader, words):
    assert words in broken(judge(exported[form], reader))


def trtllm_config(**changes):
    return config_of(GQA, alpha=4) | {"workshop": OURS} | changes


def nemo_of(root: Path, config=None, state=None, members=None) -> Path:
    content = {
        "model_config.yaml": yaml.safe_dump(config or trtllm_config()).encode(),
        "model_weights.ckpt": saved(state or tensors_of(GQA)),
    }
    return write_tar(root / "a.nemo", members or content)


def changed(**tensors):
    return tensors_of(GQA) | tensors


def lora(**fields):
    config = trtllm_config()
    config["peft"]["lora_tuning"].update(fields)
    return config


VIEWED = torch.randn(64, 8)
#: What is wrong, (configuration, tensors), words of the rule, fault and fix.
NEMO_FAULTS = {
    "alpha not baked in": (lora(alpha=32), None, "alpha is 32 and adapter_dim 4"),
    "order not stated": (
        config_of(GQA, alpha=4),
        None,
        "not stated, and NeMo writes them interleaved",
    ),
    "order of NeMo": (
        trtllm_config(workshop=OURS | {"qkv_order": "interleaved"}),
        None,
        "they are interleaved",
    ),
    "o_proj": (
        trtllm_config(),
        tensors_of(GQA, ("attention_qkv", "attention_dense")),
        (
            "attention_qkv only: the key "
            "'model.decoder.layers.0.self_attention.adapter_layer.lora_dense"
        ),
    ),
    "no layer in the key": (
        None,
        {key.replace("layers.", "blocks."): value for key, value in tensors_of(GQA).items()},
        "the layer's number is in every key",
    ),
    "wrong ending": (
        None,
        changed(**{f"{FIRST}.scale.weight": torch.ones(1, 1)}),
        "keys end in linear_in.weight or linear_out.weight",
    ),
    "missing half": (
        None,
        {key: value for key, value in tensors_of(GQA).items() if key != OUT},
        "layer 0, attention_qkv has no linear_out",
    ),
    "missing layer": (
        None,
        {key: value for key, value in tensors_of(GQA).items() if "layers.0." not in key},
        "layer 0 has no adapter",
    ),
    "local layers": (trtllm_config(num_layers=4), None, "layer 2 has no adapter"),
    "transposed": (
        None,
        changed(**{OUT: tensors_of(GQA)[OUT].T.contiguous()}),
        r"linear_out.weight is [4, 64]",
    ),
    "three dimensions": (
        None,
        changed(**{OUT: torch.ones(1, 64, 4)}),
        "flat dictionary of two-dimensional tensors",
    ),
    "wrong rank": (lora(adapter_dim=8, alpha=8), None, "adapter_dim 8"),
    "no heads": (
        {key: value for key, value in trtllm_config().items() if key != "num_query_groups"},
        None,
        "num_query_groups is missing",
    ),
    "parallel": (
        trtllm_config(pipeline_model_parallel_size=2),
        None,
        "one tensor-parallel and one pipeline-parallel rank",
    ),
    "canonical": (lora(variant="canonical"), None, "variant is 'canonical'"),
    "whole model": (
        {key: value for key, value in trtllm_config().items() if key != "peft"},
        None,
        "whole model",
    ),
    "nan": (None, changed(**{IN: torch.full((4, 32), float("nan"))}), "holds NaN or infinity"),
    "untrained": (
        None,
        {key: value * ("linear_in" in key) for key, value in tensors_of(GQA).items()},
        "every B is zero",
    ),
    "mixed dtypes": (
        None,
        changed(**{OUT: tensors_of(GQA)[OUT].bfloat16()}),
        "it has float32, bfloat16",
    ),
    "integers": (
        None,
        {key: value.to(torch.int8) for key, value in tensors_of(GQA).items()},
        "it has int8",
    ),
    "shared": (
        None,
        changed(**dict.fromkeys((IN, IN.replace("layers.0", "layers.1")), torch.ones(4, 32))),
        "share their bytes",
    ),
    "views": (
        None,
        {
            key: torch.randn(512, 512)[: value.shape[0], : value.shape[1]]
            for key, value in tensors_of(GQA).items()
        },
        "storage of its own",
    ),
}


@pytest.mark.parametrize("fault", NEMO_FAULTS)
def test_a_broken_nemo(root, fault):
    config, state, words = NEMO_FAULTS[fault]
    text = broken(judge(nemo_of(root, config, state), "trtllm"))
    assert words in text, text


def members(**more):
    return {
        "model_config.yaml": yaml.safe_dump(trtllm_config()).encode(),
        "model_weights.ckpt": saved(tensors_of(GQA)),
    } | more


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


#: Members of the tar -> words.
ARCHIVES = {
    "several ranks": (
        {
            "model_config.yaml": members()["model_config.yaml"],
            "mp_rank_00/model_weights.ckpt": saved(tensors_of(GQA)),
            "mp_rank_01/model_weights.ckpt": saved(tensors_of(GQA)),
        },
        "parts of 2 model-parallel ranks: mp_rank_00/",
    ),
    "more files": (
        members(**{"notes.txt": b"x"}),
        "exactly model_config.yaml and model_weights.ckpt",
    ),
    "no configuration": (
        {"model_weights.ckpt": saved(tensors_of(GQA))},
        "has no model_config.yaml",
    ),
    "cut off": (members(**{"model_weights.ckpt": saved(tensors_of(GQA))[:900]}), "cut off"),
    "code": (members(**{"model_weights.ckpt": saved({IN: Evil()})}), "nothing in it runs code"),
    "code in the configuration": (
        members(**{"model_config.yaml": b"a: !!python/object/apply:os.system [ls]\n"}),
        "nothing in it runs code",
    ),
}


@pytest.mark.parametrize("fault", ARCHIVES)
def test_a_broken_archive(root, fault, monkeypatch):
    monkeypatch.chdir(root)
    content, words = ARCHIVES[fault]
    text = broken(judge(write_tar(root / "a.nemo", content), "trtllm"))
    assert words in text, text
    assert not (root / "executed").exists()


def tar_of(path: Path, entries: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:") as archive:
        for entry, content in entries:
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def test_mixed_prefixes_duplicates_links_and_gzip(root):
    config, weights = members().values()
    mixed = tar_of(
        root / "m.nemo",
        [
            (tarfile.TarInfo("./model_config.yaml"), config),
            (tarfile.TarInfo("model_weights.ckpt"), weights),
        ],
    )
    assert "the prefixes differ" in broken(judge(mixed, "trtllm"))
    twice = [
        (tarfile.TarInfo(name), content)
        for name, content in [*members().items(), ("./model_weights.ckpt", weights)]
    ]
    assert "twice" in broken(judge(tar_of(root / "d.nemo", twice), "trtllm"))
    link = tarfile.TarInfo("model_weights.ckpt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    assert "is a link" in broken(
        judge(
            tar_of(root / "l.nemo", [(tarfile.TarInfo("model_config.yaml"), config), (link, b"")]),
            "trtllm",
        )
    )
    out = tarfile.TarInfo("../model_weights.ckpt")
    assert "leads out" in broken(
        judge(
            tar_of(
                root / "o.nemo", [(tarfile.TarInfo("model_config.yaml"), config), (out, weights)]
            ),
            "trtllm",
        )
    )
    packed = root / "g.nemo"
    packed.write_bytes(gzip.compress(nemo_of(root).read_bytes()))
    assert "compressed with gzip" in broken(judge(packed, "trtllm"))


def test_a_rank_over_the_maximum(root, exported):
    assert "NIM_MAX_LORA_RANK" in broken(judge(exported["trtllm"], "nim1", max_rank=2))
    assert "it is 4" in broken(judge(exported["hf-peft"], "vllm", max_rank=2))
    large = export(
        write_adapter(root / "a.nemo", config_of(GQA, rank=17), tensors_of(GQA, rank=17)), "hf-peft"
    )
    assert "at most 16" in broken(judge(large, "vllm"))
    assert judge(large, "nim2").conforms
    assert judge(large, "peft").conforms


def peft_copy(root: Path, exported, config=None, tensors=None) -> Path:
    """A copy of the exported PEFT directory with other fields (None: taken out) and tensors."""
    target = root / "adapter"
    target.mkdir()
    fields = json.loads((exported["hf-peft"] / "adapter_config.json").read_text()) | (config or {})
    (target / "adapter_config.json").write_text(
        json.dumps({name: value for name, value in fields.items() if value != "absent"})
    )
    state = load_file(exported["hf-peft"] / "adapter_model.safetensors")
    save_file(tensors(state) if tensors else state, target / "adapter_model.safetensors")
    return target


def without(ending: str):
    return lambda state: {key: value for key, value in state.items() if ending not in key}


def renamed(old: str, new: str):
    return lambda state: {key.replace(old, new): value for key, value in state.items()}


PEFT_FAULTS = {
    "no prefix": ({}, renamed("base_model.model.", ""), "B stays zero"),
    "half a prefix": (
        {},
        renamed("base_model.model.model.", "base_model.model."),
        "keys are base_model.model.model.layers.N",
    ),
    "the adapter's name": (
        {},
        renamed(".weight", ".default.weight"),
        "keys are base_model.model.model.layers.N",
    ),
    "unknown module": (
        {"target_modules": ["qkv_proj"]},
        lambda s: {"base_model.model.model.embed_tokens.lora_A.weight": torch.ones(4, 8)},
        "embed_tokens",
    ),
    "missing half": (
        {},
        without("layers.0.self_attn.q_proj.lora_B"),
        "q_proj.lora_B.weight is missing",
    ),
    "missing layer": (
        {},
        without("layers.0.mlp.down_proj"),
        "layer 0 has no adapter for mlp.down_proj",
    ),
    "wrong layers": (
        {},
        lambda s: {key.replace("layers.0", "layers.7"): value for key, value in s.items()},
        "has no adapter for",
    ),
    "wrong rank": ({"r": 8}, None, "r = 8"),
    "another module": ({"target_modules": ["q_proj"]}, None, "does not name in target_modules"),
    "module without tensors": (
        {
            "target_modules": [
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
                "lm_head",
            ]
        },
        None,
        "lm_head",
    ),
    "nan": (
        {},
        lambda s: s | {f"{PREFIX}.lora_A.weight": torch.full((4, 32), float("inf"))},
        "holds NaN or infinity",
    ),
    "untrained": (
        {},
        lambda s: {key: value * ("lora_A" in key) for key, value in s.items()},
        "every B is zero",
    ),
    "mixed dtypes": (
        {},
        lambda s: {key: value.half() if "q_proj" in key else value for key, value in s.items()},
        "float32, float16",
    ),
    "double": ({}, lambda s: {key: value.double() for key, value in s.items()}, "it has float64"),
    "kind": ({"peft_type": "LOHA"}, None, "peft_type is 'LORA': it is 'LOHA'"),
    "task": ({"task_type": None}, None, "NeMo's exporter leaves it out"),
    "no rank": ({"r": "absent"}, None, "r is a positive whole number"),
    "no alpha": ({"lora_alpha": "absent"}, None, "lora_alpha is a positive number"),
    "no base": ({"base_model_name_or_path": None}, None, "--base ID"),
    "absolute base": (
        {"base_model_name_or_path": "/home/somebody/llama"},
        None,
        "a place on the machine of the training",
    ),
    "relative base": (
        {"base_model_name_or_path": "../models/llama"},
        None,
        "a place on the machine",
    ),
    "base in folders": ({"base_model_name_or_path": "models/huggingface/llama"}, None, "--base ID"),
    "base in the home": ({"base_model_name_or_path": "~/llama"}, None, "a place on the machine"),
    "base on a drive": ({"base_model_name_or_path": "C:\\llama"}, None, "a place on the machine"),
    "bias": ({"bias": "all"}, None, "bias is 'none'"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, None, "merge it into its base"),
    "dora": ({"use_dora": True}, None, "servers take no DoRA"),
    "rank pattern": ({"rank_pattern": {"q_proj": 4}}, None, "rank_pattern is set"),
    "no targets": ({"target_modules": "absent"}, None, "target_modules is None"),
    "targets that are no names": ({"target_modules": 5}, None, "target_modules is 5"),
    "other layers": (
        {"layers_to_transform": [5]},
        None,
        "layers_to_transform = [5], but the tensors are for the layers 0, 1",
    ),
    "a layer too few": (
        {"layers_to_transform": 0},
        None,
        "layers_to_transform = 0, but the tensors are",
    ),
    "a picked layer is missing": (
        {"layers_to_transform": [0, 1]},
        without("layers.0.mlp.down_proj"),
        "layer 0 has no adapter for mlp.down_proj",
    ),
    "alpha without end": ({"lora_alpha": 1e300}, None, "lora_alpha is a positive number"),
    "pattern that is none": (
        {"alpha_pattern": {"q_proj": "x"}},
        None,
        "alpha_pattern is {'q_proj': 'x'}, no table",
    ),
    "dora by a number": ({"use_dora": 1}, None, "has its lora_magnitude_vector"),
    "saved modules that are none": (
        {"modules_to_save": 5},
        lambda s: s | {"base_model.model.x": torch.ones(1)},
        "the key 'base_model.model.x'",
    ),
    "module of another": ({"megatron_core": "os"}, None, "do not load it"),
}


@pytest.mark.parametrize("fault", PEFT_FAULTS)
@pytest.mark.parametrize("reader", ["vllm", "nim2"])
def test_a_broken_peft_adapter(root, exported, fault, reader):
    config, tensors, words = PEFT_FAULTS[fault]
    text = broken(judge(peft_copy(root, exported, config, tensors), reader))
    assert words in text, text


@pytest.mark.parametrize(
    "base, notes", [("meta-llama/Llama-3.2-1B-Instruct", 0), ("tiny-llama", 1)]
)
def test_an_id_without_an_organisation_is_noted(root, exported, base, notes):
    found = judge(peft_copy(root, exported, {"base_model_name_or_path": base}), "peft")
    assert found.conforms
    assert sum("without an organisation" in note for note in found.notes) == notes


def test_the_layers_that_were_picked(root, exported):
    path = peft_copy(root, exported, {"layers_to_transform": [1]}, without("layers.0."))
    assert judge(path, "vllm").conforms, broken(judge(path, "vllm"))


def test_a_pattern_for_target_modules_is_said_to_be_unchecked(root, exported):
    found = judge(peft_copy(root, exported, {"target_modules": r".*_proj"}), "peft")
    assert found.conforms
    assert any("not compared with the keys" in note for note in found.notes)


def fixed(path: Path, reader: str, root: Path):
    """Judge ``path`` again after the command of its first fix."""
    command = (
        broken(judge(path, reader))
        .partition("-> ")[2]
        .splitlines()[0]
        .partition("workshop ")[2]
        .replace(" --base ID", " --base some/model")
    )
    words = shlex.split(command)
    assert cli.main([*words, "--out", str(root / "mended")]) == 0
    return judge(next(iter(root.glob("mended/*.nemo")), root / "mended"), reader)


@pytest.mark.parametrize(
    "fault",
    ["no prefix", "the adapter's name", "mixed dtypes", "double", "no base", "rank pattern"],
)
def test_the_command_of_a_fix_mends_the_adapter(root, exported, fault, monkeypatch):
    monkeypatch.chdir(root)
    config, tensors, _ = PEFT_FAULTS[fault]
    (root / "it's mine").mkdir()
    mended = fixed(peft_copy(root / "it's mine", exported, config, tensors), "vllm", root)
    assert mended.conforms, broken(mended)


@pytest.mark.parametrize(
    "fault", ["alpha not baked in", "order not stated", "order of NeMo", "mixed dtypes", "shared"]
)
def test_the_command_of_a_fix_mends_the_nemo(root, fault, monkeypatch):
    monkeypatch.chdir(root)
    config, state, _ = NEMO_FAULTS[fault]
    mended = fixed(nemo_of(root, config, state), "trtllm", root)
    assert mended.conforms, broken(mended)


@pytest.mark.parametrize(
    "fault", ["missing half", "missing layer", "wrong ending", "transposed", "views"]
)
def test_what_cannot_be_mended_is_not_exported_from_itself(root, fault):
    config, state, _ = NEMO_FAULTS[fault]
    text = broken(judge(nemo_of(root, config, state), "trtllm"))
    assert "TRAINED_ADAPTER" in text
    assert "alpha is 4" not in text
    assert "lower rate" not in text


def test_what_peft_takes_and_servers_do_not(root, exported):
    path = peft_copy(
        root, exported, {"modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 4}}
    )
    assert judge(path, "peft").conforms
    assert not judge(path, "vllm").conforms
    state = load_file(path / "adapter_model.safetensors")
    (path / "adapter_model.safetensors").unlink()
    torch.save(state, path / "adapter_model.bin")
    assert judge(path, "peft").conforms
    assert "adapter_model.bin" in broken(judge(path, "nim2"))


def test_weights_that_are_none(root, exported):
    path = peft_copy(root, exported)
    (path / "adapter_model.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\n"
    )
    assert "it can be read" in broken(judge(path, "vllm"))
    (path / "adapter_model.safetensors").unlink()
    assert "has no weights" in broken(judge(path, "vllm"))


def nemo2(root: Path, adapter: bool) -> Path:
    path = root / "ckpt"
    (path / "weights").mkdir(parents=True)
    (path / "weights" / ".metadata").touch()
    (path / "context").mkdir()
    if adapter:
        (path / "weights" / "adapter_metadata.json").write_text("{}")
    return path


@pytest.mark.parametrize("reader", ["nim1", "nim2", "vllm", "trtllm"])
def test_a_distributed_checkpoint_given_to_a_server(root, reader):
    text = broken(judge(nemo2(root, adapter=True), reader))
    assert "*.distcp" in text
    assert "workshop export ckpt --to hf-peft" in text


def test_a_whole_model(root):
    assert "a whole model of NeMo 2.0" in broken(judge(nemo2(root, adapter=False), "nim2"))


def test_a_store(root, exported):
    store = root / "support"
    store.mkdir()
    data = exported["trtllm"].read_bytes()
    (store / "a.nemo").write_bytes(data)
    assert judge(store, "nim1").conforms
    (store / "b.nemo").write_bytes(data)
    assert "it holds a.nemo, b.nemo" in broken(judge(store, "nim1"))
    (store / "b.nemo").unlink()
    (store / "a.nemo").unlink()
    (store / "a.nemo").symlink_to(exported["trtllm"])
    assert "is a link to" in broken(judge(store, "nim1"))
    path = peft_copy(root, exported)
    (path / "old.nemo").write_bytes(data)
    assert "one adapter in a directory" in broken(judge(path, "nim2"))


def test_nothing_that_could_be_judged(root):
    for make, words in (
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "is empty"),
        (lambda p: p.write_text("x"), "no .nemo archive|is not a .nemo"),
    ):
        path = root / words[:6].replace(" ", "-")
        make(path)
        with pytest.raises(NotACheckpoint, match=words):
            judge(path, "peft")
    with pytest.raises(NotACheckpoint, match="which is gone"):
        (root / "link").symlink_to(root / "gone")
        judge(root / "link", "peft")
    with pytest.raises(WorkshopError, match="Unknown reader"):
        judge(root, "gguf")
    with pytest.raises(WorkshopError, match="must be 1 or more"):
        judge(root, "peft", 0)


def test_the_command(root, exported, capsys):
    assert cli.main(["conform", str(exported["hf-peft"]), "--reader", "nim2"]) == 0
    printed = capsys.readouterr().out
    assert "✓ OK    " in printed
    assert "loader is closed" in printed
    assert (
        cli.main(["conform", str(exported["hf-peft"]), "--reader", "vllm", "--max-rank", "1"]) == 1
    )
    assert "✗ FAIL  the rank is at most 1" in capsys.readouterr().out
    assert cli.main(["conform", str(exported["trtllm"]), "--reader", "trtllm", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["conforms"] is True
    assert all(rule["ok"] for rule in found["rules"])
    assert cli.main(["conform", str(root / "nothing"), "--reader", "peft"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_names_cannot_speak_to_the_terminal(root, exported, capsys):
    path = peft_copy(root, exported, {}, lambda s: s | {"\x1b[2Jevil": torch.ones(1)})
    assert cli.main(["conform", str(path), "--reader", "peft"]) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_no_torch_is_needed(exported):
    code = (
        "import sys; from workshop_utils.adapters.rules.judge import judge; "
        f"judge({str(exported['hf-peft'])!r}, 'vllm'); judge({str(exported['trtllm'])!r}, "
        "'trtllm'); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
