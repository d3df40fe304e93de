"""Adapters of PEFT and of Lightning checkpoints as sources, merged models, and the proof: compared
with PEFT and transformers themselves."""

import json
from pathlib import Path

import export_memory
import numpy
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
from tiny_families import make_tiny_family

from workshop_utils import cli
from workshop_utils.adapters import merge
from workshop_utils.adapters.export import export, export_adapter
from workshop_utils.adapters.proof import compare, load, prove
from workshop_utils.adapters.proof import logits as logits_of
from workshop_utils.adapters.read import read_adapter
from workshop_utils.checkpoints.formats.identify import identify
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


def nemo_of(root: Path, shape=GQA, targets=("attention_qkv",), name="n", **fields) -> Path:
    config = config_of(shape, targets) | fields
    return write_adapter(root / f"{name}.nemo", config, tensors_of(shape, targets))


def trained_by_peft(root: Path, modules=EVERY, base=None, **fields) -> Path:
    """A PEFT adapter that PEFT itself saves; B is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    given = {
        "r": 4,
        "lora_alpha": 8,
        "task_type": "CAUSAL_LM",
        "target_modules": modules if isinstance(modules, str) else list(modules),
    }
    config = LoraConfig(**given | fields)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base or root / "base"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.rand_like(parameter))
    model.save_pretrained(root / "peft")
    return root / "peft"


def answers(model: Path, adapter: Path | None = None) -> torch.Tensor:
    """The logits of ``model``, with a PEFT ``adapter``, as transformers and PEFT load them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32)
    return logits((PeftModel.from_pretrained(loaded, str(adapter)) if adapter else loaded).eval())


def same(found: torch.Tensor, expected: torch.Tensor, atol: float = 5e-4) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-3)


def state_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def rewrite_config(directory: Path, **fields) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


KINDS = {
    "all": {},
    "q and v": {"modules": ["q_proj", "v_proj"]},
    "gate": {"modules": ["gate_proj"]},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"k_proj": 3},
    },
    "regular expressions": {
        "rank_pattern": {r"model\.layers\.[01]\.self_attn\.(q|k)_proj": 2, "^model.*up_proj": 7},
        "alpha_pattern": {r"layers\.1\.mlp\..*": 3},
    },
    "full names": {"modules": ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
    "a pattern": {"modules": r".*\.1\.(self_attn\.\w|mlp\.down)_proj"},
    "without": {"exclude_modules": ["1.self_attn.v_proj"], "init_lora_weights": "orthogonal"},
    "dora": {"use_dora": True},
    "layers": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [GQA, GQA_HEAD_DIM], ids=["gqa", "gqa-head-dim"])
def test_what_peft_trained_is_exported_to_every_form(root, kind, shape):
    base = base_of(root, shape)
    source = trained_by_peft(root, **KINDS[kind])
    expected = answers(base, source)
    assert (expected - answers(base)).abs().max() > 0.01
    same(answers(base, export(source, "hf-peft", root / "again")), expected)
    same(answers(export(source, "hf-merged", root / "merged", base_model=str(base))), expected)
    if kind == "dora":
        with pytest.raises(UnsupportedAdapter, match="DoRA.*--to hf-merged"):
            export(source, "nemo", reader="nemo", base_model=str(base))
        return
    nemo = export(source, "nemo", root / "nemo", reader="nemo", base_model=str(base))
    same(answers(base, export(nemo, "hf-peft", root / "back")), expected)


def test_separate_matrices_are_fused_exactly(root):
    base = str(base_of(root))
    source = trained_by_peft(root, ["q_proj", "k_proj", "v_proj"])
    fused = export_adapter(source, "nemo", reader="trtllm", base_model=base)
    assert (fused.record.rank, fused.record.qkv_order, fused.record.base) == (12, "qkv", "base")
    assert any("rank 12 in place of 4" in note for note in fused.notes)
    # One A for q, k and v, as NeMo trains it: the rank stays.
    peft = export(nemo_of(root), "hf-peft", root / "p")
    assert export_adapter(peft, "nemo", root / "m", "trtllm", base).record.rank == 4


def test_a_nemo_of_a_peft_adapter_needs_the_heads_of_its_base(root):
    base_of(root)
    source = trained_by_peft(root)
    with pytest.raises(UnsupportedAdapter, match="attention_qkv only"):
        export(source, "nemo", reader="trtllm")
    rewrite_config(source, base_model_name_or_path="org/base")
    with pytest.raises(UnsupportedAdapter, match="--base DIR"):
        export(source, "nemo", reader="nemo")


def test_qwen_3_for_which_nemo_has_no_exporter(root):
    base = make_tiny_family(root / "base", "qwen3")
    source = trained_by_peft(root)
    expected = answers(base, source)
    nemo = export(source, "nemo", root / "n", reader="nemo", base_model=str(base))
    same(answers(base, export(nemo, "hf-peft", root / "b")), expected)
    same(answers(export(nemo, "hf-merged", root / "m", base_model=str(base))), expected)


NEMOTRON = Shape(hidden=64, channels=16, ffn=96, gated=False)


def test_nemotron_whose_mlp_has_no_gate(root):
    from transformers import AutoModelForCausalLM

    base = make_tiny_family(root / "base", "nemotron")
    source = nemo_of(root, NEMOTRON, ALL)
    plain, trained = AutoModelForCausalLM.from_pretrained(base), tensors_of(NEMOTRON, ALL)
    expected = logits(add_like_nemo(plain.eval(), NEMOTRON, trained, 2.0))
    assert (expected - answers(base)).abs().max() > 0.1
    peft = export(source, "hf-peft", root / "p")
    config = json.loads((peft / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(set(EVERY) - {"gate_proj"})
    merged = export(source, "hf-merged", root / "m", base_model=str(base))
    back = export(peft, "nemo", root / "b", reader="nemo", base_model=str(base))
    same(answers(base, peft), expected, 5e-3)
    same(answers(merged), expected, 5e-3)
    same(answers(base, export(back, "hf-peft", root / "p2")), expected, 5e-3)
    proof = prove(source, {"hf-peft": peft, "hf-merged": merged, "nemo": back}, base)
    assert proof.proven and [form.proven for form in proof.forms] == [True, True, None]
    assert "has no gate" in proof.forms[2].not_checked


def test_what_peft_trained_for_a_base_without_a_gate(root):
    base = make_tiny_family(root / "base", "nemotron")
    source = trained_by_peft(root, ["q_proj", "up_proj"])
    nemo = export(source, "nemo", root / "n", reader="nemo", base_model=str(base))
    assert read_adapter(nemo).weights[1, "mlp_fc1"].linear_out.shape == (96, 4)
    same(answers(base, export(nemo, "hf-peft", root / "b")), answers(base, source))
    base_of(root, Shape(hidden=64, channels=16, ffn=96))
    gated = trained_by_peft(root, ["gate_proj"])
    make_tiny_family(base, "nemotron")
    with pytest.raises(DamagedCheckpoint, match="mlp.gate_proj: the MLP of its base has no gate"):
        read_adapter(gated, base)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"rank_pattern": {"(": 4}}, "cannot be matched"),
        ({"of_tomorrow": 1}, "no PEFT up to 0.21 has"),
    ],
)
def test_a_peft_adapter_that_no_form_can_hold(root, fields, words):
    base_of(root)
    source = trained_by_peft(root)
    rewrite_config(source, **fields)
    with pytest.raises(UnsupportedAdapter, match=words):
        read_adapter(source)


def test_a_peft_adapter_of_another_base(root):
    base_of(root)
    source = trained_by_peft(root)
    tiny_llama(MHA).save_pretrained(root / "other")
    with pytest.raises(DamagedCheckpoint, match="with its base asks for"):
        export(source, "hf-merged", base_model=str(root / "other"))
    nemo = nemo_of(root, MHA)
    with pytest.raises(UnsupportedAdapter, match="is not the base of"):
        export(nemo, "hf-merged", base_model=str(root / "base"))
    for wrong, words in ((None, "--base DIR"), ("nowhere", "is not here"), (str(root), "is none")):
        for to, kind in (("hf-merged", words), ("nemo2-merged", "NeMo 2.0")):
            with pytest.raises(UnsupportedAdapter, match=kind):
                export(nemo, to, base_model=wrong)


def test_prefixes_that_peft_would_skip_are_mended_when_trusted(root):
    base = base_of(root)
    source = trained_by_peft(root)
    expected = answers(base, source)
    bare = {key.removeprefix("base_model.model."): each for key, each in state_of(source).items()}
    save_file(bare, source / "adapter_model.safetensors")
    with pytest.raises(DamagedCheckpoint, match="base_model.model"):
        export(source, "hf-peft", root / "again")
    same(answers(base, export(source, "hf-peft", root / "again", trust=True)), expected)


def test_a_bin_file_is_read_without_torch_load(root):
    base = base_of(root)
    source = trained_by_peft(root)
    expected, state = answers(base, source), state_of(source)
    (source / "adapter_model.safetensors").unlink()
    torch.save(state, source / "adapter_model.bin")
    same(answers(base, export(source, "hf-peft", root / "again")), expected)


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
    path = ckpt(root, config, tensors_of(GQA, ALL))
    found = state_of(export(path, "hf-peft", root / "c"))
    expected = state_of(export(nemo_of(root, GQA, ALL), "hf-peft", root / "p"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_lightning_checkpoint_without_a_configuration(root):
    path = ckpt(root, None, tensors_of(GQA, ALL))
    (root / "run" / "version_0" / "hparams.yaml").unlink()
    with pytest.raises(DamagedCheckpoint, match="hparams.yaml"):
        export(path, "hf-peft")


@pytest.mark.parametrize("to", ["nemo", "hf-peft", "hf-merged"])
def test_a_chosen_dtype(root, to):
    base, source = str(base_of(root)), nemo_of(root)
    path = export(source, to, base_model=base, dtype="bfloat16")
    assert identify(path).dtype == "bfloat16"
    if to == "hf-merged":
        assert json.loads((path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(OutputExists, match="another adapter, or for another reader, base or dtype"):
        export(source, to, base_model=base)


def test_a_merged_model_keeps_the_dtype_and_the_files_of_its_base(root):
    from transformers import AutoModelForCausalLM

    model = tiny_llama(GQA).bfloat16()
    model.save_pretrained(root / "base", max_shard_size="20KB")
    source = nemo_of(root, GQA, ALL)
    merged = export(source, "hf-merged", base_model=str(root / "base"))
    assert len(list(merged.glob("model-*.safetensors"))) == 2
    files = {file.name for file in (root / "base").iterdir()}
    assert {file.name for file in merged.iterdir()} == files | {"README.md", "workshop_export.json"}
    found = AutoModelForCausalLM.from_pretrained(merged, torch_dtype="auto")
    assert found.dtype == torch.bfloat16
    before, after = model.state_dict(), found.state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    a, b = read_adapter(source).weights[1, "mlp_fc2"]
    assert torch.equal(after[name], (before[name].float() + 2 * b @ a).bfloat16())
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_a_wrong_merge_never_leaves_the_exporter(root, monkeypatch):
    base, source = str(base_of(root)), nemo_of(root, GQA, ALL)
    monkeypatch.setattr(merge, "updated", lambda weight, *_: weight)
    with pytest.raises(ConformanceFailed, match="update equals the trained one.*off by"):
        export(source, "hf-merged", base_model=base)
    assert not list((root / "runs").rglob("*.safetensors"))
    assert export_adapter(source, "hf-merged", base_model=base, check=False).rules == ()


def test_somebody_s_model_is_not_replaced_by_a_merged_one(root):
    base, source = base_of(root), nemo_of(root)
    options = {"base_model": str(base), "overwrite": True}
    with pytest.raises(OutputExists, match="which no export wrote|is the base itself"):
        export(source, "hf-merged", base, **options)
    (export(source, "hf-merged", **options) / "thesis.pdf").write_text("x")
    with pytest.raises(OutputExists, match=r"thesis\.pdf"):
        export(source, "hf-merged", **options)


@pytest.mark.parametrize(
    "to, dtype, words",
    [("hf-peft", "int8", "dtype"), ("nemo2-merged", "bfloat16", "workshop convert")],
)
def test_arguments(root, to, dtype, words):
    with pytest.raises(WorkshopError, match=words):
        export(nemo_of(root), to, dtype=dtype)


def test_the_command_prints_the_rules(root, capsys):
    run = ["export", str(nemo_of(root)), "--to"]
    assert cli.main([*run, "hf-merged", "--base", str(base_of(root))]) == 0
    assert "✓ OK    each module's update equals the trained one" in capsys.readouterr().out
    assert cli.main([*run, "hf-peft", "--no-check", "--dtype", "float16"]) == 0
    assert "none, as you asked" in capsys.readouterr().out


def test_the_proof(root):
    base, source = base_of(root), nemo_of(root)
    half = root / "runs" / "exports" / "n" / "half"
    forms = {
        "hf-peft": export(source, "hf-peft"),
        "trtllm": export(source, "nemo", reader="trtllm"),
        "nemo": export(source, "nemo", reader="nemo"),
        "hf-merged": export(source, "hf-merged", base_model=str(base)),
        "half": export(source, "hf-merged", half, base_model=str(base), dtype="bfloat16"),
    }
    proof = prove(source, forms, base)
    assert proof.proven and [form.proven for form in proof.forms] == [True] * 5, proof.table()
    assert proof.effect > 0.1
    assert all(len(form.by_layer) == GQA.layers for form in proof.forms)
    file = proof.save()
    assert file == root / "runs" / "exports" / "n" / "proof.json"
    saved = json.loads(file.read_text())
    assert saved["proven"] is True and saved["forms"][0]["path"] == "runs/exports/n/hf-peft"
    assert "read by" in proof.table()
    assert plots.save(plots.plot_proof(proof), root / "proof.png").stat().st_size > 5000
    assert plots.proof_finding(proof).startswith("5 of 5 exports compute what was trained")


def test_an_export_says_how_it_was_proven(root, capsys):
    base, source = base_of(root), nemo_of(root)
    run = ["export", str(source), "--to", "hf-peft", "--out", str(root / "p")]
    assert cli.main([*run, "--base", str(base)]) == 0
    assert "proof       proven: read by PEFT, its logits differ" in capsys.readouterr().out
    assert "Proof: proven: read by PEFT" in (root / "p" / "README.md").read_text()
    assert "Proof: not proven" in (export(source, "hf-peft", root / "q") / "README.md").read_text()
    assert cli.main(["export", str(source), "--to", "hf-peft", "--out", str(root / "r")]) == 0
    assert "not proven: the base is not at hand" in capsys.readouterr().out


def test_what_our_own_code_reads_is_not_proven(root):
    base, source = base_of(root), nemo_of(root)
    options = {"base_model": str(base)}
    trtllm = export_adapter(source, "nemo", root / "t", "trtllm", **options)
    assert not trtllm.proven and "nobody else's code reads the export" in trtllm.proof
    # Of TensorRT-LLM's form, too, nobody else reads the trained side.
    again = export_adapter(trtllm.path, "hf-peft", root / "a", **options)
    assert not again.proven and "nobody else's code reads the trained adapter" in again.proof
    for done in (trtllm, again):
        assert "its logits differ" in done.proof
    assert export_adapter(source, "nemo", root / "n", **options).proven


def test_the_trained_side_is_read_by_somebody_else_where_that_is_possible(root):
    base, peft = base_of(root), trained_by_peft(root)
    nemo = nemo_of(root)
    for source, reader in ((peft, "PEFT"), (nemo, "NeMo's lora_converter.py, then PEFT")):
        proof = prove(source, {"p": export(source, "hf-peft", root / reader[:4])}, base)
        assert proof.proven and proof.trained_by == reader


def test_a_base_that_is_another_is_one_sentence(root):
    base = base_of(root)
    other = nemo_of(root, MHA, name="o")
    with pytest.raises(UnsupportedAdapter, match="does not load onto|is not the base"):
        prove(other, {"p": export(other, "hf-peft", root / "p")}, base)


def test_logits_of_two_sides(root):
    """A directory, one with an adapter, a model that is loaded, a function: compared with plain
    transformers and PEFT."""
    base = base_of(root)
    peft = trained_by_peft(root)
    tokens = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(1)).tolist()
    expected = list(answers(base, peft).numpy())
    for side in ((base, peft), load(base, peft), lambda _: expected):
        assert compare(logits_of(side, tokens), expected).largest < 1e-5
    found = compare(logits_of(base, tokens), expected)
    apart = abs(answers(base) - answers(base, peft)).max().item()
    assert found.largest == pytest.approx(apart, rel=1e-3) and found.agreement < 1
    assert found.scale == pytest.approx(abs(answers(base, peft)).max().item())
    padded = [numpy.pad(row, ((0, 0), (0, 3)), constant_values=99) for row in expected]
    assert compare(padded, expected)[::2] == (0, 1)


def test_the_proof_of_dora(root):
    base = base_of(root)
    source = trained_by_peft(root, use_dora=True)
    peft = export(source, "hf-peft", root / "d")
    merged = export(source, "hf-merged", root / "m", base_model=str(base))
    assert prove(source, {"hf-peft": peft, "hf-merged": merged}, base).proven


def test_the_proof_sees_wrong_rows_and_a_missing_scale(root):
    base, source = base_of(root), nemo_of(root)
    wrong = nemo_of(root, name="w", workshop={"qkv_order": "qkv"})
    forms = {
        "right": export(source, "hf-peft"),
        "swapped": export(wrong, "hf-peft", root / "swapped"),
        "half": export(source, "hf-peft", root / "half"),
    }
    rewrite_config(root / "half", lora_alpha=4)
    proof = prove(source, forms, base)
    assert [form.proven for form in proof.forms] == [True, False, False]
    assert not proof.proven and "DIFFERS" in proof.table()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_hides_no_wrong_scale(root, dtype, monkeypatch):
    """An update far smaller than the weights, at 1.3 times its size."""
    base = base_of(root)
    small = {
        name: tensor * (0.02 if "linear_out" in name else 1)
        for name, tensor in tensors_of(GQA, ALL).items()
    }
    sources = {
        side: write_adapter(root / f"{side}.nemo", config_of(GQA, ALL, alpha=alpha), small)
        for side, alpha in (("right", 8), ("wrong", 8 * 1.3))
    }
    options = {"base_model": str(base), "dtype": dtype}
    forms = {
        f"{side} {to}": export(source, to, root / side / to, **options)
        for side, source in sources.items()
        for to in ("hf-merged", "hf-peft")
    }
    proof = prove(sources["right"], forms, base)
    assert [form.proven for form in proof.forms] == [True, True, False, False], proof.table()
    monkeypatch.setattr(merge, "updated", lambda weight, *_: weight)
    with pytest.raises(ConformanceFailed, match="a weight is off by"):
        export(sources["right"], "hf-merged", root / "base-again", **options)


def test_the_proof_of_numbers_that_are_none_and_of_no_effect(root):
    base, source = base_of(root), nemo_of(root)
    merged = export(source, "hf-merged", base_model=str(base))
    file = merged / "model.safetensors"
    state = load_file(file)
    name = "model.embed_tokens.weight"
    state[name] = state[name].index_fill(0, torch.arange(1, 63), float("nan"))
    save_file(state, file, metadata={"format": "pt"})
    proof = prove(source, {"merged": merged}, base, trust=True)
    assert (proof.proven, proof.forms[0].not_checked) == (False, "its logits are no numbers")
    assert plots.proof_finding(proof).startswith("0 of 1 exports")
    plots.plot_proof(proof)
    none = {name: tensor * ("linear_in" in name) for name, tensor in tensors_of(GQA).items()}
    idle = write_adapter(root / "i.nemo", config_of(GQA), none)
    peft = export(idle, "hf-peft", root / "idle", check=False)
    proof = prove(idle, {"peft": peft}, base, trust=True)
    assert (proof.effect, proof.proven, proof.forms[0].proven) == (0, False, None)
    assert "nothing to prove" in proof.table()


def test_the_proof_says_what_it_cannot_load(root):
    base, source = base_of(root, GQA_HEAD_DIM), nemo_of(root, GQA_HEAD_DIM)
    forms = {
        "nemo": export(source, "nemo", reader="nemo"),
        "hf-peft": export(source, "hf-peft"),
    }
    proof = prove(source, forms, base)
    assert [form.proven for form in proof.forms] == [None, True] and proof.proven
    assert "head size" in proof.forms[0].not_checked


@pytest.mark.slow
@pytest.mark.parametrize("to", export_memory.FORMS)
def test_memory_is_a_small_multiple_of_the_adapter(root, to):
    found = export_memory.measure(export_memory.adapter(root), to, root / "out")
    assert found["times_the_adapter"] < 4


def test_what_an_export_answers_to_a_program(root, capsys):
    """And that a module is missing is said where nothing tells whether it had been trained."""
    base = base_of(root)
    source = trained_by_peft(root)
    weights = source / "adapter_model.safetensors"
    state = load_file(weights)
    save_file({name: its for name, its in state.items() if "1.mlp.up_proj" not in name}, weights)
    export = ["export", str(source), "--to", "hf-peft", "--base", str(base), "--json"]
    assert cli.main(export) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["record"]["rank"] == 4 and answer["rules"] and not answer["reused"]
    assert "layer 1 has no adapter for mlp.up_proj" in answer["notes"][0]
    assert not answer["proven"] and answer["proof"].startswith("not proven: ")
    stage = ["nim", "stage", str(source), "--name", "a", "--json", "--reader", "nim2"]
    assert cli.main(stage) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["change"], answer["rank"], answer["path"]) == ("added", 4, "runs/store/a")
    assert "dynamic" in answer["notes"][0] and "cannot be told" in answer["notes"][1]


def test_a_base_that_holds_an_adapter_proves_nothing(root):
    """transformers would load it with the base, and compare the adapter with itself."""
    base, source = base_of(root), trained_by_peft(root)
    for file in source.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    done = export_adapter(source, "hf-peft", root / "p", base_model=str(base))
    assert not done.proven and "holds an adapter, too" in done.proof
