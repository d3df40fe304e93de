"""Adapters, sound and broken in every way that users have reported, and the rules of their
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
from workshop_utils.adapters.export import export, export_adapter
from workshop_utils.adapters.loads_in import loads_in
from workshop_utils.adapters.rules import ANY_RANK, READERS, RULES, Severity, check
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.lora_layout import PEFT_ONLY, PEFT_UNDERSTOOD, peft_only
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.core.errors import NotACheckpoint, WorkshopError
from workshop_utils.serving.nim import stage
from workshop_utils.serving.server.adapters import read as serve

FIRST = f"model.decoder.layers.0.{NAMES['attention_qkv']}"
IN, OUT = f"{FIRST}.linear_in.weight", f"{FIRST}.linear_out.weight"
DENSE = f"model.decoder.layers.0.{NAMES['attention_dense']}"
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
OURS = {"reader": "TensorRT-LLM", "qkv_order": "qkv"}
SERVERS = ("trtllm", "vllm", "nim1", "nim2")


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
        "trtllm": export(qkv, "nemo", folder / "trtllm", reader="trtllm"),
        "nemo": export(source, "nemo", folder / "nemo", reader="nemo"),
    }


def text_of(verdicts) -> str:
    """Every verdict with its fault and fix, in one text."""
    assert all(verdict.fix for verdict in verdicts)
    return "\n".join(f"{its.rule}: {its.fault} -> {its.fix}" for its in verdicts)


def broken(path, reader, *options) -> str:
    return text_of(check(path, reader, *options).broken)


def test_the_table_is_whole():
    """Every rule has a source and a day, every reader has rules, and a code is one of a reader's
    for a form."""
    for rule in RULES:
        assert rule.source.where and rule.source.date and set(rule.readers) <= READERS.keys()
    for reader in READERS:
        codes = [(its.code, its.form) for its in RULES if reader in its.readers]
        assert codes and len(codes) == len(set(codes))


@pytest.mark.parametrize(
    "form, reader",
    [("hf-peft", reader) for reader in ("peft", *SERVERS, "serve")]
    + [("trtllm", "trtllm"), ("nemo", "nim1"), ("nemo", "nemo"), ("nemo", "serve")],
)
def test_an_export_conforms_to_its_readers(exported, form, reader):
    result = check(exported[form], reader)
    assert not result.faults, text_of(result.faults)
    assert len(result.rules) >= (3 if reader == "serve" else 15)


@pytest.mark.parametrize(
    "form, reader, words",
    [
        ("trtllm", "nim2", "--to hf-peft"),
        ("trtllm", "vllm", "--to hf-peft"),
        ("trtllm", "nemo", "one after the other, for TensorRT-LLM"),
        ("nemo", "trtllm", "attention_qkv only"),
        ("hf-peft", "nemo", "--to nemo --base DIR"),
    ],
)
def test_an_export_for_somebody_else_is_refused_with_a_way_out(exported, form, reader, words):
    assert words in broken(exported[form], reader)


def test_what_no_page_says_is_not_known(exported, tmp_path):
    """NIM 1.x takes the file that NeMo wrote; TensorRT-LLM's form, and packing that NeMo never
    writes, are neither taken nor refused."""
    result = check(exported["trtllm"], "nim1")
    assert [its.code for its in result.of(Severity.NOT_KNOWN)] == ["as-nemo-wrote-it"]
    assert result.conforms and "none of" in result.lines()[-1]
    packed = tmp_path / "a.nemo"
    packed.write_bytes(gzip.compress(exported["nemo"].read_bytes()))
    assert "plain-tar" in {its.code for its in check(packed, "nim1").of(Severity.NOT_KNOWN)}
    assert "plain-tar" in {its.code for its in check(packed, "trtllm").broken}


def trtllm_config(**changes):
    return config_of(GQA, alpha=4) | {"workshop": OURS} | changes


def nemo_of(root: Path, config=None, state=None) -> Path:
    return write_adapter(root / "a.nemo", config or trtllm_config(), state or tensors_of(GQA))


def changed(**tensors):
    return tensors_of(GQA) | tensors


def lora(**fields):
    config = trtllm_config()
    config["peft"]["lora_tuning"].update(fields)
    return config


def of_all(change):
    """The tensors with ``change`` of key and tensor; None leaves one out."""
    pairs = (change(key, tensor) for key, tensor in tensors_of(GQA).items())
    return dict(pair for pair in pairs if pair)


#: What is wrong, (configuration, tensors), words of the rule, fault and fix.
NEMO_FAULTS = {
    "alpha not baked in": (lora(alpha=32), None, "alpha is 32 and adapter_dim 4"),
    "order not stated": (
        config_of(GQA, alpha=4), None, "not stated, and NeMo writes them interleaved"),
    "order of NeMo": (
        trtllm_config(workshop=OURS | {"qkv_order": "interleaved"}), None, "they are interleaved"),
    "o_proj": (None, tensors_of(GQA, ("attention_qkv", "attention_dense")),
               f"attention_qkv only: the key '{DENSE}"),
    "no layer in the key": (None, of_all(lambda k, t: (k.replace("layers.", "blocks."), t)),
                            "unknown adapter in the key 'model.decoder.blocks.0"),
    "wrong ending": (None, changed(**{f"{FIRST}.scale.weight": torch.ones(1, 1)}),
                     "lora_kqv_adapter.scale.weight'"),
    "missing half": (None, of_all(lambda k, t: (k, t) if k != OUT else None),
                     "layer 0, attention_qkv has no linear_out"),
    "missing layer": (None, of_all(lambda k, t: (k, t) if "layers.0." not in k else None),
                      "layer 0 has no adapter"),
    "local layers": (trtllm_config(num_layers=4), None, "layer 2 has no adapter"),
    "layers without end": (trtllm_config(num_layers=10**9), None, "1,000,000,000 layers"),
    "transposed": (None, changed(**{OUT: tensors_of(GQA)[OUT].T.contiguous()}),
                   "linear_out.weight is [4, 64]"),
    "three dimensions": (None, changed(**{OUT: torch.ones(1, 64, 4)}),
                         "linear_out.weight is [1, 64, 4]"),
    "wrong rank": (lora(adapter_dim=8, alpha=8), None, "adapter_dim 8"),
    "no heads": (trtllm_config(num_query_groups=None), None, "num_query_groups is missing"),
    "parallel": (trtllm_config(pipeline_model_parallel_size=2), None,
                 "one tensor-parallel and one pipeline-parallel rank"),
    "canonical": (lora(variant="canonical"), None, "variant is 'canonical'"),
    "whole model": (trtllm_config(peft=None), None, "whole model"),
    "nan": (None, changed(**{IN: torch.full((4, 32), float("nan"))}), "holds NaN or infinity"),
    "untrained": (None, of_all(lambda k, t: (k, t * ("linear_in" in k))), "every B is zero"),
    "mixed dtypes": (None, changed(**{OUT: tensors_of(GQA)[OUT].bfloat16()}),
                     "it has float32, bfloat16"),
    "integers": (None, of_all(lambda k, t: (k, t.to(torch.int8))), "it has int8"),
    "shared": (None, changed(**dict.fromkeys((IN, IN.replace("s.0", "s.1")), torch.ones(4, 32))),
               "share their bytes"),
    "views": (None, of_all(lambda k, t: (k, torch.randn(512, 512)[: t.shape[0], : t.shape[1]])),
              "storage of its own"),
}  # fmt: skip


@pytest.mark.parametrize("fault", NEMO_FAULTS)
def test_a_broken_nemo(root, fault):
    config, state, words = NEMO_FAULTS[fault]
    assert words in broken(nemo_of(root, config, state), "trtllm")


MEMBERS = {
    "model_config.yaml": yaml.safe_dump(trtllm_config()).encode(),
    "model_weights.ckpt": saved(tensors_of(GQA)),
}


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


#: Members of the tar -> words.
ARCHIVES = {
    "several ranks": (
        {"model_config.yaml": MEMBERS["model_config.yaml"]}
        | {f"mp_rank_0{rank}/model_weights.ckpt": saved(tensors_of(GQA)) for rank in (0, 1)},
        "parts of 2 model-parallel ranks: mp_rank_00/",
    ),
    "more files": (MEMBERS | {"notes.txt": b"x"}, "exactly model_config.yaml and model_weights"),
    "no configuration": ({"model_weights.ckpt": b"x"}, "has no model_config.yaml"),
    "cut off": (
        MEMBERS | {"model_weights.ckpt": MEMBERS["model_weights.ckpt"][:900]}, "cut off"
    ),
    "code": (MEMBERS | {"model_weights.ckpt": saved({IN: Evil()})}, "nothing in it runs code"),
    "code in the configuration": (
        MEMBERS | {"model_config.yaml": b"a: !!python/object/apply:os.system [ls]\n"},
        "nothing in it runs code",
    ),
    "a foreign class": (
        MEMBERS | {"model_config.yaml": b"peft: {}\nx: {_target_: os.x}\n"},
        "x._target_ names 'os.x'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", ARCHIVES)
def test_a_broken_archive(root, fault, monkeypatch):
    monkeypatch.chdir(root)
    content, words = ARCHIVES[fault]
    assert words in broken(write_tar(root / "a.nemo", content), "trtllm")
    assert not (root / "executed").exists()


def link(name: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return entry


CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"


@pytest.mark.parametrize(
    "names, words",
    [
        ([f"./{CONFIG}", WEIGHTS], "the prefixes differ"),
        ([CONFIG, WEIGHTS, f"./{WEIGHTS}"], "twice"),
        ([CONFIG, link(WEIGHTS)], "is a link"),
        ([CONFIG, f"../{WEIGHTS}"], "leads out"),
    ],
)
def test_members_that_two_readers_would_see_differently(root, names, words):
    with tarfile.open(root / "a.nemo", "w:") as archive:
        for name in names:
            entry = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            content = b"" if entry is name else MEMBERS[Path(name).name]
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    assert words in broken(root / "a.nemo", "trtllm")


def test_gzip(root):
    packed = root / "g.nemo"
    packed.write_bytes(gzip.compress(nemo_of(root).read_bytes()))
    assert "compressed with gzip" in broken(packed, "trtllm")


def test_a_rank_over_the_maximum(root, exported):
    assert "NIM_MAX_LORA_RANK" in broken(exported["trtllm"], "nim1", 2)
    assert "it is 4" in broken(exported["hf-peft"], "vllm", 2)
    assert "--max-rank of the server" in broken(exported["hf-peft"], "serve", 2)
    source = write_adapter(root / "a.nemo", config_of(GQA, rank=17), tensors_of(GQA, rank=17))
    large = export(source, "hf-peft")
    assert "at most 16" in broken(large, "vllm")
    for reader, most in (("nim2", None), ("peft", None), ("vllm", ANY_RANK)):
        assert check(large, reader, most).conforms
    # vLLM can be told no more.
    source = write_adapter(root / "a.nemo", config_of(GQA, rank=600), tensors_of(GQA, rank=600))
    huge = export_adapter(source, "hf-peft", root / "huge")
    assert not huge.record.for_servers and "no rank above 512" in huge.record.reader
    for most in (ANY_RANK, 1000):
        assert "at most 512" in broken(huge.path, "vllm", most)


def peft_copy(root: Path, exported, config=None, tensors=None, is_bin=False) -> Path:
    """A copy of the exported PEFT directory with other fields (None: taken out) and tensors."""
    target = root / "adapter"
    target.mkdir()
    fields = json.loads((exported["hf-peft"] / "adapter_config.json").read_text()) | (config or {})
    fields = {name: value for name, value in fields.items() if value != "absent"}
    (target / "adapter_config.json").write_text(json.dumps(fields))
    state = load_file(exported["hf-peft"] / "adapter_model.safetensors")
    state = tensors(state) if tensors else state
    if is_bin:
        torch.save(state, target / "adapter_model.bin")
    else:
        save_file(state, target / "adapter_model.safetensors")
    return target


def without(ending: str):
    return lambda state: {key: value for key, value in state.items() if ending not in key}


def renamed(old: str, new: str):
    return lambda state: {key.replace(old, new): value for key, value in state.items()}


def also(name: str, *shape: int):
    return lambda state: state | {name: torch.ones(*shape)}


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEYS = "keys are base_model.model.model.layers.N"
PEFT_FAULTS = {
    "no prefix": ({}, renamed("base_model.model.", ""), "B stays zero"),
    "half a prefix": ({}, renamed("base_model.model.model.", "base_model.model."), KEYS),
    "the adapter's name": ({}, renamed(".weight", ".default.weight"), KEYS),
    "unknown module": ({}, also("base_model.model.x.lora_A.weight", 4, 8), "is for a module that"),
    "missing half": ({}, without("layers.0.self_attn.q_proj.lora_B"),
                     "layer 0, self_attn.q_proj has no lora_B.weight"),
    "missing layer": ({"init_lora_weights": False}, without("s.0.mlp.down_proj"),
                      "layer 0 has no adapter for mlp.down_proj"),
    "pattern that never ends": ({"rank_pattern": {r"(.|\w)+[#!]": 4}}, None, "takes too long"),
    "pattern as large as memory": ({"target_modules": "(?:(?:a{1000}){1000}){1000}"}, None,
                                   "is too large"),
    "pattern that is broken": ({"target_modules": "("}, None, "cannot be matched"),
    "wrong rank": ({"r": 8}, None, "r = 8"),
    "a start of no type": ({"eva_config": 7}, None, "eva_config is 7; it has to be an object"),
    "a table that is none": ({"rank_pattern": "q_proj"}, None, "rank_pattern is 'q_proj'"),
    "left out": ({"exclude_modules": ["0.mlp.down_proj"]}, None, "leaves out (exclude_modules)"),
    "left out by a pattern": ({"exclude_modules": r".*\.1\.mlp\..*"}, None, "leaves out"),
    "another pattern": ({"target_modules": r".*\.[qk]_proj"}, None, "does not name in target"),
    "another module": ({"target_modules": ["q_proj"]}, None, "does not name in target_modules"),
    "module without tensors": ({}, without(".mlp.up_proj."), "names the module up_proj, which has"),
    "nan": ({}, lambda s: s | {f"{PREFIX}.lora_A.weight": torch.full((4, 32), float("inf"))},
            "holds NaN or infinity"),
    "untrained": ({}, lambda s: {key: value * ("lora_A" in key) for key, value in s.items()},
                  "every B is zero"),
    "mixed dtypes": ({}, lambda s: {key: value.half() if "q_proj" in key else value
                                    for key, value in s.items()}, "float32, float16"),
    "double": ({}, lambda s: {key: value.double() for key, value in s.items()}, "it has float64"),
    "kind": ({"peft_type": "LOHA"}, None, "peft_type is 'LORA': it is 'LOHA'"),
    "no rank": ({"r": "absent"}, None, "r is a positive whole number"),
    "no alpha": ({"lora_alpha": "absent"}, None, "lora_alpha is a positive number"),
    "alpha without end": ({"lora_alpha": 1e300}, None, "lora_alpha is a positive number"),
    "dora": ({"use_dora": True}, None, "servers take no DoRA"),
    "dora by a number": ({"use_dora": 1}, None, "has its lora_magnitude_vector"),
    "rank pattern": ({"rank_pattern": {"q_proj": 4}}, None, "rank_pattern is set"),
    "no targets": ({"target_modules": "absent"}, None, "target_modules is None"),
    "targets that are no names": ({"target_modules": 5}, None, "target_modules is 5"),
    "other layers": ({"layers_to_transform": [5]}, None,
                     "layers_to_transform = [5], but the tensors are for the layers 0, 1"),
    "a layer too few": ({"layers_to_transform": 0}, None, "layers_to_transform = 0, but the tenso"),
    "a picked layer is missing": (
        {"layers_to_transform": [0, 1]}, without("layers.0."), "are for the layers 1"),
    "pattern that is none": ({"alpha_pattern": {"q_proj": "x"}}, None,
                             "alpha_pattern is {'q_proj': 'x'}, no table"),
    "saved modules that are none": ({"modules_to_save": 5}, also("base_model.model.x", 1),
                                    "the key 'base_model.model.x'"),
    "module of another": ({"megatron_core": "os"}, None, "do not load it"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PEFT_FAULTS)
@pytest.mark.parametrize("reader", ["vllm", "nim2"])
def test_a_broken_peft_adapter(root, exported, fault, reader):
    config, tensors, words = PEFT_FAULTS[fault]
    assert words in broken(peft_copy(root, exported, config, tensors), reader)


@pytest.mark.parametrize(
    "base, words",
    [
        (None, "--base ID"),
        ("/home/somebody/llama", "a place on the machine of the training"),
        ("../models/llama", "a place on the machine"),
        ("models/huggingface/llama", "a place on the machine"),
        ("~/llama", "a place on the machine"),
        ("C:\\llama", "a place on the machine"),
        ("tiny-llama", None),
        ("meta-llama/Llama-3.2-1B-Instruct", None),
    ],
)
def test_a_base_that_others_cannot_find_is_a_warning(root, exported, base, words):
    """Every reader loads it all the same."""
    result = check(peft_copy(root, exported, {"base_model_name_or_path": base}), "vllm")
    warnings = text_of(result.of(Severity.WARNING))
    assert result.conforms and (words in warnings if words else not warnings)
    assert any("without an organisation" in note for note in result.notes) == (base == "tiny-llama")


#: Fields that change what is computed, where only PEFT takes them into account.
ONLY_PEFT = {
    "bias": "all",
    "modules_to_save": ["norm"],
    "fan_in_fan_out": True,
    "lora_bias": True,
    "trainable_token_indices": [1],
    "target_parameters": ["mlp.experts"],
    "layer_replication": [[0, 2]],
    "use_qalora": True,
    "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 2},
    "kasa_config": {"a": 1},
    "monteclora_config": {"a": 1},
    "use_bdlora": {"a": 1},
    "velora_config": {"a": 1},
    "init_lora_weights": "pissa_niter_4",
}


def test_the_fields_are_those_of_the_installed_peft():
    """So that the next release of PEFT is noticed; what only PEFT takes is off by default there."""
    from peft import LoraConfig

    config = LoraConfig().to_dict()
    assert config.keys() <= PEFT_ONLY | PEFT_UNDERSTOOD
    assert set(ONLY_PEFT) == PEFT_ONLY | {"init_lora_weights"}
    assert peft_only(config) == []


@pytest.mark.parametrize("start", ["olora", "corda", "loftq", "lora_ga", "of the next PEFT"])
def test_a_start_that_changes_the_base_is_refused(start):
    assert peft_only({"init_lora_weights": start}) == ["init_lora_weights"]
    assert peft_only({"init_lora_weights": "gaussian"}) == []


def test_a_field_that_no_peft_has_is_not_known(root, exported):
    path = peft_copy(root, exported, {"next_years_lora": {"gate": 2}})
    (verdict,) = check(path, "vllm").of(Severity.NOT_KNOWN)
    assert verdict.fault.startswith("next_years_lora is") and "no PEFT up to" in verdict.fix
    answers = {reader.name: reader.answer for reader in loads_in(identify(path))}
    assert answers["vLLM"] == "not known"
    assert any("next_years_lora" in warning for warning in stage(path, "a", root / "s").warnings)
    with pytest.raises(WorkshopError, match="next_years_lora"):
        export(path, "hf-peft", root / "again")


@pytest.mark.parametrize("name", ONLY_PEFT)
def test_a_field_that_only_peft_takes_is_refused_by_every_command(root, exported, name):
    path = peft_copy(root, exported, {name: ONLY_PEFT[name]})
    for reader in SERVERS:
        assert f"{name} is {ONLY_PEFT[name]!r}" in broken(path, reader)
    assert check(path, "peft").conforms
    assert any(name in note for note in check(path, "peft").notes)
    answers = {reader.name: reader for reader in loads_in(identify(path))}
    assert answers["PEFT"].answer == "yes"
    assert answers["vLLM"].answer == answers["NIM 1.x"].answer == "no"
    for command in (
        lambda: export(path, "hf-peft", root / "again"),
        lambda: stage(path, "a", root / "store"),
        lambda: serve(path),
    ):
        with pytest.raises(WorkshopError, match=name):
            command()


UNTOLD = ("uneven", "other layers", "a name of another family")


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"task_type": None}},
        {"is_bin": True},
        {"config": {"layers_to_transform": [1]}, "tensors": without("layers.0.")},
        {"config": {"target_modules": ".*_proj"}},
        {"config": {"target_modules": r".*(\.1\..*|self_attn\.\w+_proj)"},
         "tensors": without("s.0.mlp")},
        {"config": {"target_modules": [f"model.layers.1.self_attn.{i}_proj" for i in "qkvo"]},
         "tensors": lambda state: {k: v for k, v in state.items() if "layers.1.self_attn" in k}},
        {"config": {"exclude_modules": ["down_proj"]}, "tensors": without("down_proj")},
        {"tensors": without("s.0.mlp.down_proj")},
        {"tensors": renamed("layers.0.", "layers.7.")},
        {"config": {"target_modules": [*PROJECTIONS, "query_key_value"]}},
    ],
    ids=["no task", "bin", "picked layers", "pattern", "uneven pattern", "full names", "excluded",
         "uneven", "other layers", "a name of another family"],
)  # fmt: skip
@pytest.mark.parametrize("reader", ["peft", *SERVERS])
def test_what_every_command_takes(request, root, exported, change, reader):
    path = peft_copy(root, exported, **change)
    result = check(path, reader)
    assert not result.faults, text_of(result.faults)
    names = {"peft": "PEFT", "trtllm": "TensorRT-LLM", "vllm": "vLLM"}
    name = names.get(reader, f"NIM {reader[-1]}.x")
    assert {its.name: its.answer for its in loads_in(identify(path))}[name] == "yes"
    if reader.startswith("nim"):
        assert stage(path, "a", root / "store", reader=reader).change == "added"
    assert serve(path)[0]["r"] == 4
    require_sound(path, False)
    told = [note for note in result.notes if "cannot be told" in note]
    assert len(told) == (request.node.callspec.id.split("-")[1] in UNTOLD)


def test_ranks_that_differ(root, exported):
    """TensorRT-LLM scales each module by its own rank; it does not read alpha_pattern."""

    def wider(state):
        for name in ("A", "B"):
            key = f"{PREFIX}.lora_{name}.weight"
            state[key] = torch.cat([state[key]] * 2, dim=int(name == "B"))
        return state

    path = peft_copy(root, exported, {"rank_pattern": {"layers.0.self_attn.q_proj": 8}}, wider)
    assert check(path, "trtllm").conforms and check(path, "peft").conforms
    assert "ranks [4, 8]" in broken(path, "vllm") and "ranks [4, 8]" in broken(path, "nim2")
    (verdict,) = check(path, "nim1").of(Severity.NOT_KNOWN)  # it has both engines in it
    assert "ranks [4, 8]" in verdict.fault
    answers = {its.name: its.answer for its in loads_in(identify(path))}
    assert (answers["TensorRT-LLM"], answers["vLLM"]) == ("yes", "no")
    config = path / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"alpha_pattern": {"q_proj": 3}}
    config.write_text(json.dumps(fields))
    assert "alpha_pattern is set" in broken(path, "trtllm")


@pytest.mark.parametrize(
    "module",
    [
        "lm_head",
        "model.layers.0.mlp.experts.3.gate_proj",
        "model.language_model.layers.0.self_attn.q_proj",
        "transformer.h.0.attn.c_attn",
    ],
)
def test_modules_that_some_servers_take(root, exported, module):
    def with_module(state):
        more = {f"base_model.model.{module}.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
        return {key: value for key, value in state.items() if "layers.0" in key} | more

    head = [module] if module.endswith(("lm_head", "c_attn")) else []
    config = {"target_modules": PROJECTIONS + head}
    path = peft_copy(root, exported, config, with_module)
    assert check(path, "peft").conforms, broken(path, "peft")
    result = check(path, "vllm")
    assert result.conforms, text_of(result.broken)
    assert [its.code for its in result.of(Severity.NOT_KNOWN)] == ["keys"]


def fixed(path: Path, reader: str, root: Path):
    """The rules of ``path`` after the command of its first fix."""
    fix = text_of(check(path, reader).faults).partition("-> ")[2].splitlines()[0]
    command = fix.partition("workshop ")[2].replace(" --base ID", " --base some/model")
    assert cli.main([*shlex.split(command), "--out", str(root / "mended")]) == 0
    mended = next(iter(root.glob("mended/*.nemo")), root / "mended")
    assert not check(mended, reader).faults


@pytest.mark.parametrize(
    "fault",
    ["no prefix", "the adapter's name", "mixed dtypes", "double", "no base", "rank pattern"],
)
def test_the_command_of_a_fix_mends_the_adapter(root, exported, fault, monkeypatch):
    monkeypatch.chdir(root)
    no_base = {"base_model_name_or_path": None}, None
    config, tensors = no_base if fault == "no base" else PEFT_FAULTS[fault][:2]
    (root / "it's mine").mkdir()
    fixed(peft_copy(root / "it's mine", exported, config, tensors), "vllm", root)


@pytest.mark.parametrize(
    "fault", ["alpha not baked in", "order not stated", "order of NeMo", "mixed dtypes", "shared"]
)
def test_the_command_of_a_fix_mends_the_nemo(root, fault, monkeypatch):
    monkeypatch.chdir(root)
    config, state, _ = NEMO_FAULTS[fault]
    fixed(nemo_of(root, config, state), "trtllm", root)


@pytest.mark.parametrize(
    "fault", ["missing half", "missing layer", "wrong ending", "transposed", "views"]
)
def test_what_cannot_be_mended_is_not_exported_from_itself(root, fault):
    config, state, _ = NEMO_FAULTS[fault]
    text = broken(nemo_of(root, config, state), "trtllm")
    assert "TRAINED_ADAPTER" in text
    assert "alpha is 4" not in text and "lower rate" not in text


def test_weights_that_are_none(root, exported):
    path = peft_copy(root, exported)
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "it can be read" in broken(path, "vllm")
    weights.unlink()
    assert "has no weights" in broken(path, "vllm")


@pytest.mark.parametrize("reader", SERVERS)
def test_a_distributed_checkpoint_given_to_a_server(root, reader):
    path = root / "ckpt"
    for folder in ("weights", "context"):
        (path / folder).mkdir(parents=True)
    (path / "weights" / ".metadata").touch()
    assert "a whole model of NeMo 2.0" in broken(path, reader)
    (path / "weights" / "adapter_metadata.json").write_text("{}")
    text = broken(path, reader)
    assert "*.distcp" in text and "workshop export ckpt --to hf-peft" in text


def test_a_store(root, exported):
    store = root / "support"
    store.mkdir()
    data = exported["trtllm"].read_bytes()
    (store / "a.nemo").write_bytes(data)
    assert check(store, "nim1").conforms
    (store / "b.nemo").write_bytes(data)
    assert "it holds a.nemo, b.nemo" in broken(store, "nim1")
    for name in "ab":
        (store / f"{name}.nemo").unlink()
    (store / "a.nemo").symlink_to(exported["trtllm"])
    assert "is a link to" in text_of(check(store, "nim1").of(Severity.WARNING))
    path = peft_copy(root, exported)
    (path / "old.nemo").write_bytes(data)
    assert "one adapter in a directory" in broken(path, "nim2")


def test_nothing_that_could_be_asked(root):
    for make, words in (
        (lambda p: None, "does not exist"),
        (lambda p: p.mkdir(), "is empty"),
        (lambda p: p.write_text("x"), "no .nemo archive|is not a .nemo"),
        (lambda p: p.symlink_to(root / "gone"), "which is gone"),
    ):
        path = root / words[:6].replace(" ", "-")
        make(path)
        with pytest.raises(NotACheckpoint, match=words):
            check(path, "peft")
    for options, words in ((("gguf",), "Unknown reader"), (("peft", 0), "must be 1 or more")):
        with pytest.raises(WorkshopError, match=words):
            check(root, *options)


def test_the_command(root, exported, capsys):
    def conform(path, *options):
        status = cli.main(["conform", str(path), "--reader", *options])
        return status, capsys.readouterr()

    status, printed = conform(exported["hf-peft"], "nim2")
    assert status == 0 and "✓ OK    " in printed.out and "loader is closed" in printed.out
    status, printed = conform(exported["hf-peft"], "vllm", "--max-rank", "1")
    assert status == 1 and "✗ FAIL  the rank is at most 1" in printed.out
    status, printed = conform(exported["trtllm"], "trtllm", "--json")
    found = json.loads(printed.out)
    assert status == 0 and found["conforms"] is True
    assert all(rule["ok"] and rule["code"] and rule["source"] for rule in found["rules"])
    status, printed = conform(root / "nothing", "peft")
    assert status == 2 and "does not exist" in printed.err
    path = peft_copy(
        root, exported, {"base_model_name_or_path": None}, also("\x1b[2Jevil", 1)
    )  # names cannot speak to the terminal
    status, printed = conform(path, "peft")
    assert status == 1 and "\x1b" not in printed.out
    assert "! WARN  adapter_config.json names the base" in printed.out


def test_no_torch_is_needed(exported):
    code = (
        "import sys; from workshop_utils.adapters.rules import check; "
        f"check({str(exported['hf-peft'])!r}, 'vllm'); check({str(exported['trtllm'])!r}, "
        "'trtllm'); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern", "bias", "lora_dropout"])
def test_a_null_that_breaks_peft_alone(root, exported, name):
    path = peft_copy(root, exported, {name: None})
    assert f"{name} is null -> write {{}}, of bias" in broken(path, "peft")
    assert check(path, "vllm").conforms


def test_targets_that_peft_finds_by_the_family(root, exported):
    path = peft_copy(root, exported, {"target_modules": None})
    assert check(path, "peft").conforms
    assert any("target_modules is null" in note for note in check(path, "peft").notes)
    (root / "half").mkdir()
    half = peft_copy(
        root / "half",
        exported,
        {"target_modules": None},
        without("layers.0.self_attn.q_proj.lora_B"),
    )
    assert "has no lora_B.weight" in broken(half, "peft")  # which nothing hides
    (verdict,) = check(path, "nim1").of(Severity.NOT_KNOWN)
    assert verdict.code == "modules" and "target_modules is None" in broken(path, "trtllm")
