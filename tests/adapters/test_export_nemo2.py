"""Adapters that NeMo 2.0 itself trains and saves, exported, against the logits that NeMo itself
computes with them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from export_samples import ALL, Shape, config_of, tensors_of, write_adapter
from places import TESTS

from workshop_utils.adapters.export import export
from workshop_utils.adapters.proof import prove
from workshop_utils.adapters.read import read_adapter
from workshop_utils.adapters.rules import check
from workshop_utils.core.errors import DamagedCheckpoint, UnsupportedAdapter

pytestmark = pytest.mark.slow

HERE = TESTS / "samples"
SCHEMES = ("lora", "dora", "canonical_lora")
VOCABULARY = 384


def nemo(script: str, *words: object) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, words)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def trained(bridged_tiny, tmp_path_factory):
    """Scheme -> (adapter directory of NeMo 2.0, NeMo's logits), and ``tokens``; also merged into
    NeMo 2.0, with NeMo's logits."""
    from nemo2_trains import write_data

    folder = tmp_path_factory.mktemp("nemo2-adapters")
    write_data(folder / "data")
    base = bridged_tiny / "nemo2" / "tiny"
    nemo("nemo2_trains.py", base, folder, *SCHEMES)
    adapters = [next((folder / scheme / "checkpoints").glob("*-last")) for scheme in SCHEMES]
    merged = [
        export(path, "nemo2-merged", folder / f"{path.parts[-3]}-merged", base_model=base)
        for path in adapters
    ]
    nemo("nemo2_logits.py", folder / "logits.npz", base, *adapters, *merged)
    return (
        folder,
        dict(zip(SCHEMES, adapters, strict=True)),
        dict(zip(SCHEMES, merged, strict=True)),
        numpy.load(folder / "logits.npz"),
    )


def answers(model, tokens) -> numpy.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def load(path: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_form_computes_what_nemo_computes(trained, bridged_tiny, tmp_path, scheme):
    from peft import PeftModel

    _, adapters, merged, found = trained
    at, hf = 1 + SCHEMES.index(scheme), bridged_tiny / "hf" / "tiny"
    wanted, tokens = found[str(at)][..., :VOCABULARY], found["tokens"]
    effect = numpy.abs(wanted - found["0"][..., :VOCABULARY]).max()
    assert effect > 0.05
    forms = {
        "hf-peft": export(adapters[scheme], "hf-peft", tmp_path / "p"),
        "nemo2-merged": merged[scheme],
    }
    forms["hf-merged"] = export(adapters[scheme], "hf-merged", tmp_path / "m", base_model=hf)
    with_peft = PeftModel.from_pretrained(load(hf), str(forms["hf-peft"])).eval()
    for got in (
        answers(with_peft, tokens),
        answers(load(forms["hf-merged"]), tokens),
        found[str(at + 3)][..., :VOCABULARY],
    ):
        assert numpy.abs(got - wanted).max() < 1e-3 * effect
    if scheme == "dora":
        with pytest.raises(UnsupportedAdapter, match="DoRA"):
            export(adapters[scheme], "nemo", tmp_path / "n", reader="nemo")
    else:
        forms["nemo"] = export(adapters[scheme], "nemo", tmp_path / "n", reader="nemo")
    proof = prove(adapters[scheme], forms, hf)
    assert proof.proven, proof.table()


def test_a_nemotron_whose_mlp_has_no_gate(tmp_path):
    from nemo2_trains import write_data
    from peft import PeftModel
    from tiny_families import make_tiny_family

    hf, base = make_tiny_family(tmp_path / "tiny", "nemotron"), tmp_path / "nemo2"
    subprocess.run(
        [sys.executable, "-m", "workshop_utils", "import", hf, "--out", base],
        check=True,
        capture_output=True,
    )
    write_data(tmp_path / "data")
    schemes = ("lora", "dora")
    nemo("nemo2_trains.py", base, tmp_path, *schemes)
    adapters = [next((tmp_path / scheme / "checkpoints").glob("*-last")) for scheme in schemes]
    merged = [
        export(path, "nemo2-merged", tmp_path / f"merged{at}", base_model=base)
        for at, path in enumerate(adapters)
    ]
    nemo("nemo2_logits.py", tmp_path / "logits.npz", base, *adapters, *merged)
    found = numpy.load(tmp_path / "logits.npz")
    for at, adapter in enumerate(adapters):
        wanted, tokens = found[str(at + 1)][..., :VOCABULARY], found["tokens"]
        effect = numpy.abs(wanted - found["0"][..., :VOCABULARY]).max()
        assert effect > 0.05
        made = export(adapter, "hf-peft", tmp_path / f"peft{at}")
        assert "gate_proj" not in (made / "adapter_config.json").read_text()
        with_peft = PeftModel.from_pretrained(load(hf), str(made)).eval()
        for got in (answers(with_peft, tokens), found[str(at + 3)][..., :VOCABULARY]):
            assert numpy.abs(got - wanted).max() < 2e-3 * effect
        proof = prove(adapter, {"hf-peft": made, "nemo2-merged": merged[at]}, hf)
        assert proof.proven, proof.table()
    for wrong in (
        Shape(hidden=64, channels=16, ffn=96),
        Shape(hidden=64, channels=16, ffn=96, groups=4, gated=False),
    ):
        other = write_adapter(tmp_path / "o.nemo", config_of(wrong, ALL), tensors_of(wrong, ALL))
        with pytest.raises(UnsupportedAdapter, match="is not the base of"):
            export(other, "nemo2-merged", tmp_path / "no", base_model=base)


def test_canonical_lora_says_why_its_rank_grew(trained, tmp_path):
    _, adapters, _, _ = trained
    adapter = read_adapter(adapters["canonical_lora"])
    assert (adapter.rank, adapter.alpha) == (12, 24)
    assert "Megatron-Bridge, #1818" in adapter.notes[0]
    assert (
        "Megatron-Bridge, #1818"
        in (export(adapters["canonical_lora"], "hf-peft", tmp_path / "p") / "README.md").read_text()
    )


def test_no_server_reads_it_as_it_is(trained):
    _, adapters, _, _ = trained
    for reader in ("nim1", "nim2", "vllm", "trtllm"):
        assert "distcp" in check(adapters["lora"], reader).broken[0].fault


FAULTS = {
    "alpha": ("alpha: 8", "alpha: 0", DamagedCheckpoint, "alpha"),
    "rank": ("\n  dim: 4", "\n  dim: 8", DamagedCheckpoint, "dim"),
    "kind": ("peft.lora.LoRA", "peft.lora.QLoRA", UnsupportedAdapter, "QLoRA"),
    "layers": ("num_layers: 2", "num_layers: 3", DamagedCheckpoint, "3 layers"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_context_that_does_not_fit(trained, tmp_path, fault):
    _, adapters, _, _ = trained
    old, new, error, words = FAULTS[fault]
    copy = Path(shutil.copytree(adapters["lora"], tmp_path / "copy"))
    file = copy / "context" / "model.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(error, match=words):
        read_adapter(copy)


def test_the_base_is_not_needed(trained, tmp_path):
    _, adapters, _, _ = trained
    copy = Path(shutil.copytree(adapters["lora"], tmp_path / "copy"))
    (copy / "weights" / "adapter_metadata.json").write_text(
        json.dumps({"model_ckpt_path": "/gone/llama/weights"})
    )
    config = json.loads(
        (export(copy, "hf-peft", tmp_path / "p", name="a") / "adapter_config.json").read_text()
    )
    assert config["base_model_name_or_path"] == "llama"
