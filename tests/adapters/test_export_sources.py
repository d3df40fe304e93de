"""Adapters of PEFT and of Lightning checkpoints as sources, merged models, and the proof: judged by
PEFT and transformers themselves."""

import json
from pathlib import Path

import export_memory
import pytest
import torch
from export_samples import (
    ALL,
    GQA,
    GQA_HEAD_DIM,
    MHA,
    Shape,
    add_like_nemo,
    config_of,
    logits,
    tensors_of,
    tiny_llama,
    write_adapter,
)
from safetensors.torch import load_file, save_file

from workshop_utils import cli
from workshop_utils.adapters import merge
from workshop_utils.adapters.export import export, export_adapter
from workshop_utils.adapters.proof import prove
from workshop_utils.adapters.read import read_adapter
from workshop_utils.core.errors import (
    ConformanceFailed,
    DamagedCheckpoint,
    OutputExists,
    UnsupportedAdapter,
    WorkshopError,
)
from workshop_utils.series import plots

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return tmp_path


def base_of(root: Path, shape=GQA, **options) -> Path:
    tiny_llama(shape).save_pretrained(root / "base", **options)
    return root / "base"


def trained_by_peft(root: Path, modules=EVERY, base=None, **fields) -> Path:
    """A PEFT adapter that PEFT itself saves; B is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": list(modules)}
        | fields
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base or root / "base"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.rand_like(parameter))
    model.save_pretrained(root / "peft")
    return root / "peft"


def answers(root: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return logits(
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(root / "base"), str(adapter)
        ).eval()
    )


def model_answers(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).eval())


KINDS = {
    "all": {},
    "q and v": {"modules": ["q_proj", "v_proj"]},
    "gate": {"modules": ["gate_proj"]},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"k_proj": 3},
    },
    "dora": {"use_dora": True},
    "layers": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [GQA, GQA_HEAD_DIM], ids=["gqa", "gqa-head-dim"])
def test_what_peft_trained_is_exported_to_every_form(root, kind, shape):
    base = base_of(root, shape)
    source = trained_by_peft(root, **KINDS[kind])
    wanted = answers(root, source)
    assert (wanted - model_answers(base)).abs().max() > 0.01
    again = export(source, "hf-peft", root / "again")
    torch.testing.assert_close(answers(root, again), wanted, atol=3e-4, rtol=1e-4)
    merged = export(source, "hf-merged", root / "merged", base_model=str(base))
    torch.testing.assert_close(model_answers(merged), wanted, atol=3e-4, rtol=1e-4)
    if kind == "dora":
        with pytest.raises(UnsupportedAdapter, match="DoRA.*--to hf-merged"):
            export(source, "nemo", reader="nemo", base_model=str(base))
        return
    nemo = export(source, "nemo", root / "nemo", reader="nemo", base_model=str(base))
    back = export(nemo, "hf-peft", root / "back")
    torch.testing.assert_close(answers(root, back), wanted, atol=3e-4, rtol=1e-4)


def test_separate_matrices_are_fused_exactly(root):
    base = base_of(root)
    made = export_adapter(
        trained_by_peft(root, ["q_proj", "k_proj", "v_proj"]), "nemo", base_model=str(base)
    )
    assert (made.record.rank, made.record.qkv_order, made.record.base) == (12, "qkv", "base")
    assert any("rank 12 in place of 4" in note for note in made.notes)
    # One A for q, k and v, as NeMo trains it: the rank stays.
    nemo = write_adapter(root / "n.nemo", config_of(GQA), tensors_of(GQA))
    peft = export(nemo, "hf-peft", root / "p")
    assert export_adapter(peft, "nemo", root / "m", base_model=str(base)).record.rank == 4


def test_a_nemo_of_a_peft_adapter_needs_the_heads_of_its_base(root):
    base_of(root)
    source = trained_by_peft(root)
    with pytest.raises(UnsupportedAdapter, match="attention_qkv only"):
        export(source, "nemo")
    config = json.loads((source / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": "org/base"
    }
    (source / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedAdapter, match="--base DIR"):
        export(source, "nemo", reader="nemo")


def qwen3(root: Path) -> Path:
    from tiny_families import make_tiny_family

    return make_tiny_family(root / "base", "qwen3")


def test_qwen_3_for_which_nemo_has_no_exporter(root):
    base = qwen3(root)
    source = trained_by_peft(root, base=base)
    wanted = answers(root, source)
    nemo = export(source, "nemo", root / "n", reader="nemo", base_model=str(base))
    torch.testing.assert_close(
        answers(root, export(nemo, "hf-peft", root / "b")), wanted, atol=5e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        model_answers(export(nemo, "hf-merged", root / "m", base_model=str(base))),
        wanted,
        atol=5e-4,
        rtol=1e-4,
    )


NEMOTRON = Shape(hidden=64, channels=16, ffn=96, gated=False)


def test_nemotron_whose_mlp_has_no_gate(root):
    from tiny_families import make_tiny_family
    from transformers import AutoModelForCausalLM

    base = make_tiny_family(root / "base", "nemotron")
    source = write_adapter(root / "n.nemo", config_of(NEMOTRON, ALL), tensors_of(NEMOTRON, ALL))
    reference = add_like_nemo(
        AutoModelForCausalLM.from_pretrained(base).eval(), NEMOTRON, tensors_of(NEMOTRON, ALL), 2.0
    )
    wanted = logits(reference)
    assert (wanted - model_answers(base)).abs().max() > 0.1
    peft = export(source, "hf-peft", root / "p")
    assert json.loads((peft / "adapter_config.json").read_text())["target_modules"] == sorted(
        set(EVERY) - {"gate_proj"}
    )
    merged = export(source, "hf-merged", root / "m", base_model=str(base))
    back = export(peft, "nemo", root / "b", reader="nemo", base_model=str(base))
    for got in (
        answers(root, peft),
        model_answers(merged),
        answers(root, export(back, "hf-peft", root / "p2")),
    ):
        torch.testing.assert_close(got, wanted, atol=5e-3, rtol=1e-3)
    proof = prove(source, {"hf-peft": peft, "hf-merged": merged, "nemo": back}, base)
    assert proof.proven and [form.proven for form in proof.forms] == [True, True, None], (
        proof.table()
    )
    assert "has no gate" in proof.forms[2].untold


def test_what_peft_trained_for_a_base_without_a_gate(root):
    from tiny_families import make_tiny_family

    base = make_tiny_family(root / "base", "nemotron")
    source = trained_by_peft(root, ["q_proj", "up_proj"], base)
    nemo = export(source, "nemo", root / "n", reader="nemo", base_model=str(base))
    assert read_adapter(nemo).weights[1, "mlp_fc1"].linear_out.shape == (96, 4)
    torch.testing.assert_close(
        answers(root, export(nemo, "hf-peft", root / "b")),
        answers(root, source),
        atol=5e-4,
        rtol=1e-4,
    )
    base_of(root, Shape(hidden=64, channels=16, ffn=96))
    gated = trained_by_peft(root, ["gate_proj"])
    make_tiny_family(base, "nemotron")
    with pytest.raises(DamagedCheckpoint, match="mlp.gate_proj: the MLP of its base has no gate"):
        read_adapter(gated, base)


REFUSED = {
    "kind": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "bias": ({"bias": "all"}, "bias = 'all'"),
    "pattern": ({"rank_pattern": {".*q_proj": 4}}, "is a pattern"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_peft_adapter_that_no_form_can_hold(root, fault):
    fields, words = REFUSED[fault]
    base_of(root)
    source = trained_by_peft(root)
    file = source / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(UnsupportedAdapter, match=words):
        read_adapter(source)


def test_a_peft_adapter_of_another_base(root):
    base_of(root)
    source = trained_by_peft(root)
    tiny_llama(MHA).save_pretrained(root / "other")
    with pytest.raises(DamagedCheckpoint, match="its base has"):
        export(source, "hf-merged", base_model=str(root / "other"))
    nemo = write_adapter(root / "n.nemo", config_of(MHA), tensors_of(MHA))
    with pytest.raises(UnsupportedAdapter, match="is not the base of"):
        export(nemo, "hf-merged", base_model=str(root / "base"))
    for wrong, words in ((None, "--base DIR"), ("nowhere", "is not here"), (str(root), "is none")):
        with pytest.raises(UnsupportedAdapter, match=words):
            export(nemo, "hf-merged", base_model=wrong)
        with pytest.raises(UnsupportedAdapter, match="NeMo 2.0"):
            export(nemo, "nemo2-merged", base_model=wrong)


def test_prefixes_that_peft_would_skip_are_mended_when_trusted(root):
    base_of(root)
    source = trained_by_peft(root)
    wanted = answers(root, source)
    state = load_file(source / "adapter_model.safetensors")
    save_file(
        {key.removeprefix("base_model.model."): value for key, value in state.items()},
        source / "adapter_model.safetensors",
    )
    with pytest.raises(DamagedCheckpoint, match="base_model.model"):
        export(source, "hf-peft", root / "again")
    torch.testing.assert_close(
        answers(root, export(source, "hf-peft", root / "again", trust=True)),
        wanted,
        atol=2e-4,
        rtol=1e-4,
    )


def test_a_bin_file_is_read_without_torch_load(root):
    base_of(root)
    source = trained_by_peft(root)
    wanted = answers(root, source)
    state = load_file(source / "adapter_model.safetensors")
    (source / "adapter_model.safetensors").unlink()
    torch.save(state, source / "adapter_model.bin")
    torch.testing.assert_close(answers(root, export(source, "hf-peft", root / "again")), wanted)


def ckpt(root: Path, config: dict | None, state: dict) -> Path:
    """What Lightning saves for NeMo 1; the configuration as plain values, or as the hparams.yaml
    beside it."""
    import yaml

    folder = root / "run" / "checkpoints"
    folder.mkdir(parents=True)
    if config is None:
        (root / "run" / "version_0").mkdir()
        (root / "run" / "version_0" / "hparams.yaml").write_text(
            yaml.safe_dump({"cfg": config_of(GQA, ALL)})
        )
    content = {
        "state_dict": state,
        "epoch": 0,
        "global_step": 5,
        "pytorch-lightning_version": "2.4.0",
        "optimizer_states": [],
        "callbacks": {"NeMoModelCheckpoint{}": {}},
        "hyper_parameters": {"cfg": config} if config else {},
    }
    torch.save(content, folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.mark.parametrize("config", [config_of(GQA, ALL), None], ids=["in it", "beside it"])
def test_a_lightning_checkpoint_is_exported_as_the_nemo_of_its_run(root, config):
    state = tensors_of(GQA, ALL)
    found = load_file(
        export(ckpt(root, config, state), "hf-peft", root / "c") / "adapter_model.safetensors"
    )
    wanted = load_file(
        export(write_adapter(root / "n.nemo", config_of(GQA, ALL), state), "hf-peft", root / "n")
        / "adapter_model.safetensors"
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_lightning_checkpoint_without_a_configuration(root):
    path = ckpt(root, None, tensors_of(GQA, ALL))
    (root / "run" / "version_0" / "hparams.yaml").unlink()
    with pytest.raises(DamagedCheckpoint, match="hparams.yaml"):
        export(path, "hf-peft")


@pytest.mark.parametrize("to", ["nemo", "hf-peft", "hf-merged"])
def test_a_chosen_dtype(root, to):
    base = base_of(root)
    source = write_adapter(root / "n.nemo", config_of(GQA), tensors_of(GQA))
    path = export(source, to, base_model=str(base), dtype="bfloat16")
    from workshop_utils.checkpoints.formats.identify import identify

    assert identify(path).dtype == "bfloat16"
    if to == "hf-merged":
        assert json.loads((path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(OutputExists, match="another adapter, or for another reader, base or dtype"):
        export(source, to, base_model=str(base))


def test_a_merged_model_keeps_the_dtype_and_the_files_of_its_base(root):
    model = tiny_llama(GQA).bfloat16()
    model.save_pretrained(root / "base", max_shard_size="20KB")
    source = write_adapter(root / "n.nemo", config_of(GQA, ALL), tensors_of(GQA, ALL))
    merged = export(source, "hf-merged", base_model=str(root / "base"))
    assert len(list(merged.glob("model-*.safetensors"))) == 2
    wanted = {file.name for file in (root / "base").iterdir()} | {
        "README.md",
        "workshop_export.json",
    }
    assert {file.name for file in merged.iterdir()} == wanted
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(merged, torch_dtype="auto")
    assert found.dtype == torch.bfloat16
    before, after = model.state_dict(), found.state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    a, b = read_adapter(source).weights[1, "mlp_fc2"]
    assert torch.equal(after[name], (before[name].float() + 2 * b @ a).bfloat16())
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_a_wrong_merge_never_leaves_the_exporter(root, monkeypatch):
    base = base_of(root)
    source = write_adapter(root / "n.nemo", config_of(GQA, ALL), tensors_of(GQA, ALL))
    monkeypatch.setattr(merge, "updated", lambda weight, *_: weight)
    with pytest.raises(ConformanceFailed, match="update equals the trained one.*off by"):
        export(source, "hf-merged", base_model=str(base))
    assert not list((root / "runs").rglob("*.safetensors"))
    made = export_adapter(source, "hf-merged", base_model=str(base), check=False)
    assert made.rules == ()


def test_somebody_s_model_is_not_replaced_by_a_merged_one(root):
    base = base_of(root)
    source = write_adapter(root / "n.nemo", config_of(GQA), tensors_of(GQA))
    with pytest.raises(OutputExists, match="which no export wrote|is the base itself"):
        export(source, "hf-merged", base, base_model=str(base), overwrite=True)
    merged = export(source, "hf-merged", base_model=str(base))
    (merged / "thesis.pdf").write_text("x")
    with pytest.raises(OutputExists, match=r"thesis\.pdf"):
        export(source, "hf-merged", base_model=str(base), overwrite=True)


def test_arguments(root):
    source = write_adapter(root / "n.nemo", config_of(GQA), tensors_of(GQA))
    with pytest.raises(WorkshopError, match="dtype"):
        export(source, "hf-peft", dtype="int8")
    with pytest.raises(WorkshopError, match="workshop convert"):
        export(source, "nemo2-merged", dtype="bfloat16")


def test_the_command_prints_the_rules(root, capsys):
    base = base_of(root)
    source = write_adapter(root / "n.nemo", config_of(GQA), tensors_of(GQA))
    assert cli.main(["export", str(source), "--to", "hf-merged", "--base", str(base)]) == 0
    printed = capsys.readouterr().out
    assert "✓ OK    each module's update equals the trained one" in printed
    assert (
        cli.main(["export", str(source), "--to", "hf-peft", "--no-check", "--dtype", "float16"])
        == 0
    )
    assert "none, as you asked" in capsys.readouterr().out


def test_the_proof(root):
    base = base_of(root)
    source = write_adapter(root / "n.nemo", config_of(GQA), tensors_of(GQA))
    forms = {
        "hf-peft": export(source, "hf-peft"),
        "trtllm": export(source, "nemo"),
        "nemo": export(source, "nemo", reader="nemo"),
        "hf-merged": export(source, "hf-merged", base_model=str(base)),
        "half": export(
            source,
            "hf-merged",
            root / "runs" / "exports" / "n" / "half",
            base_model=str(base),
            dtype="bfloat16",
        ),
    }
    found = prove(source, forms, base)
    assert found.proven, found.table()
    assert [form.proven for form in found.forms] == [True] * 5
    assert found.effect > 0.1
    assert all(len(form.by_layer) == GQA.layers for form in found.forms)
    saved = json.loads(found.save().read_text())
    assert (root / "runs" / "exports" / "n" / "proof.json").is_file()
    assert saved["proven"] is True
    assert saved["forms"][0]["path"] == "runs/exports/n/hf-peft"
    assert "read by" in found.table()
    assert plots.save(plots.plot_proof(found), root / "proof.png").stat().st_size > 5000
    assert plots.proof_finding(found).startswith("5 of 5 exports compute what was trained")


def test_the_proof_of_dora(root):
    base = base_of(root)
    source = trained_by_peft(root, use_dora=True)
    forms = {
        "hf-peft": export(source, "hf-peft", root / "d"),
        "hf-merged": export(source, "hf-merged", root / "m", base_model=str(base)),
    }
    assert prove(source, forms, base).proven


def test_the_proof_sees_wrong_rows_and_a_missing_scale(root, monkeypatch):
    base = base_of(root)
    source = write_adapter(root / "n.nemo", config_of(GQA), tensors_of(GQA))
    right = export(source, "hf-peft")
    config = root / "half" / "adapter_config.json"
    wrong = write_adapter(
        root / "w.nemo", config_of(GQA) | {"workshop": {"qkv_order": "qkv"}}, tensors_of(GQA)
    )
    swapped = export(wrong, "hf-peft", root / "swapped")
    export(source, "hf-peft", root / "half")
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))
    found = prove(source, {"right": right, "swapped": swapped, "half": root / "half"}, base)
    assert [form.proven for form in found.forms] == [True, False, False]
    assert not found.proven
    assert "DIFFERS" in found.table()


def rewritten(directory: Path, change) -> Path:
    """The merged model in ``directory`` with every tensor that ``change`` gives back in place of
    its own."""
    file = directory / "model.safetensors"
    save_file(
        {name: change(name, tensor) for name, tensor in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    return directory


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_hides_no_wrong_scale(root, dtype, monkeypatch):
    """An update far smaller than the weights, at 1.3 times its size."""
    base = base_of(root)
    small = {
        name: tensor * (0.02 if "linear_out" in name else 1)
        for name, tensor in tensors_of(GQA, ALL).items()
    }
    source = write_adapter(root / "n.nemo", config_of(GQA, ALL), small)
    more = write_adapter(root / "m.nemo", config_of(GQA, ALL, alpha=8 * 1.3), small)
    right = {
        to: export(source, to, root / f"right-{to}", base_model=str(base), dtype=dtype)
        for to in ("hf-merged", "hf-peft")
    }
    wrong = {
        f"wrong {to}": export(more, to, root / f"wrong-{to}", base_model=str(base), dtype=dtype)
        for to in right
    }
    found = prove(source, right | wrong, base)
    assert [form.proven for form in found.forms] == [True, True, False, False], found.table()
    monkeypatch.setattr(merge, "updated", lambda weight, *_: weight)
    with pytest.raises(ConformanceFailed, match="a weight is off by"):
        export(source, "hf-merged", root / "base-again", base_model=str(base), dtype=dtype)


def test_the_proof_of_numbers_that_are_none_and_of_no_effect(root):
    base = base_of(root)
    source = write_adapter(root / "n.nemo", config_of(GQA), tensors_of(GQA))
    merged = export(source, "hf-merged", base_model=str(base))
    assert prove(source, {"merged": merged}, base).proven
    rewritten(
        merged,
        lambda name, tensor: (
            tensor.index_fill(0, torch.arange(1, 63), float("nan")) if "embed" in name else tensor
        ),
    )
    found = prove(source, {"merged": merged}, base, trust=True)
    assert (found.proven, found.forms[0].untold) == (False, "its logits are no numbers")
    assert plots.proof_finding(found).startswith("0 of 1 exports")
    plots.plot_proof(found)
    none = {name: tensor * ("linear_in" in name) for name, tensor in tensors_of(GQA).items()}
    idle = write_adapter(root / "i.nemo", config_of(GQA), none)
    found = prove(
        idle, {"peft": export(idle, "hf-peft", root / "idle", check=False)}, base, trust=True
    )
    assert (found.effect, found.proven, found.forms[0].proven) == (0, False, None)
    assert "nothing to prove" in found.table()


def test_the_proof_says_what_it_cannot_load(root):
    base = base_of(root, GQA_HEAD_DIM)
    source = write_adapter(root / "n.nemo", config_of(GQA_HEAD_DIM), tensors_of(GQA_HEAD_DIM))
    found = prove(
        source,
        {"nemo": export(source, "nemo", reader="nemo"), "hf-peft": export(source, "hf-peft")},
        base,
    )
    assert [form.proven for form in found.forms] == [None, True]
    assert "head size" in found.forms[0].untold
    assert found.proven


@pytest.mark.slow
@pytest.mark.parametrize("to", export_memory.FORMS)
def test_memory_is_a_small_multiple_of_the_adapter(root, to):
    found = export_memory.measure(export_memory.adapter(root), to, root / "out")
    assert found["times_the_adapter"] < 4
