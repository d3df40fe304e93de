"""Exports of recipe runs: names, what is refused or replaced, and, by NeMo itself, that logits
survive each form."""

import json
import shutil

import pytest

from workshop_utils.adapters import proof
from workshop_utils.adapters.export import export_adapter
from workshop_utils.checkpoints.formats import nemo2
from workshop_utils.core.errors import (
    ConformanceFailed,
    DamagedCheckpoint,
    OutputExists,
    UnsupportedAdapter,
    WorkshopError,
)
from workshop_utils.training.recipe import deliver, options, plan
from workshop_utils.training.recipe.presets import preset


def resolved(output_dir, **changes):
    given = {
        "hf_model_id": str(output_dir),
        "output_dir": str(output_dir),
        "hfdc_dataset_name": "x",
    }
    return plan.resolve(options.from_mapping(preset("cpu") | given | changes))


@pytest.fixture
def full(originals, tmp_path):
    """A run whose only checkpoint is a full NeMo 2.0 model."""
    checkpoint = tmp_path / "nemo_logs" / "checkpoints" / "qwen2.5--val_loss=0.5000-step=9"
    shutil.copytree(originals / "plain", checkpoint)
    return checkpoint


@pytest.fixture
def nemo(monkeypatch):
    """Stands in for NeMo and transformers: exports hold a number, which is what their logits are;
    the checkpoint's is 1."""
    import numpy

    class Nemo:
        exported, exports = 1.0, 0

        def to_huggingface(self, checkpoint, folder, trust):
            self.exports += 1
            (folder / "config.json").write_text(json.dumps({"number": self.exported}))

    def exported(path, ids):
        return numpy.full((2, 24, 4), json.loads((path / "config.json").read_text())["number"])

    stand_in = Nemo()
    monkeypatch.setattr(deliver, "to_huggingface", stand_in.to_huggingface)
    monkeypatch.setattr(deliver, "nemo_logits", lambda *args: numpy.full((2, 24, 4), 1.0))
    monkeypatch.setattr(deliver.proof, "logits", exported)
    return stand_in


def test_a_full_fine_tune_keeps_the_dots_of_its_name(full, nemo, tmp_path, capsys):
    made = deliver.export(resolved(tmp_path))
    assert made == tmp_path / "exports" / "qwen2.5--val_loss=0.5000-step=9.hf_model"
    assert "re-loaded; its logits differ from NeMo's by at most 0.0e+00" in capsys.readouterr().out
    assert [path.name for path in full.parent.iterdir()] == [full.name], (
        "nothing is put beside the checkpoints, where NeMo would read it"
    )


def test_other_logits_are_no_export(full, nemo, tmp_path):
    nemo.exported = 1.01
    message = "differ from those that NeMo computes from .* by up to 0.01; 0.001 is allowed for "
    with pytest.raises(ConformanceFailed, match=message + "float32 weights. It was not kept"):
        deliver.export(resolved(tmp_path))
    nemo.exported = float("nan")
    with pytest.raises(ConformanceFailed):
        deliver.export(resolved(tmp_path))
    assert not list((tmp_path / "exports").iterdir())


def test_an_export_of_the_same_is_reused_of_another_replaced_when_asked(full, nemo, tmp_path):
    made = deliver.export(resolved(tmp_path))
    assert deliver.export(resolved(tmp_path)) == made and nemo.exports == 1
    with (full / "weights" / "common.pt").open("ab") as file:
        file.write(b"trained on")
    another = "is an export of another checkpoint. It was left as it is. --overwrite replaces it"
    with pytest.raises(OutputExists, match=another):
        deliver.export(resolved(tmp_path))
    assert deliver.export(resolved(tmp_path, overwrite=True)) == made and nemo.exports == 2
    (made / deliver.RECORD).unlink()
    with pytest.raises(OutputExists, match="did not make. It was left as it is. Move it away"):
        deliver.export(resolved(tmp_path), overwrite=True)
    assert (made / "config.json").is_file()


def test_a_spoilt_export_is_noticed_and_replaced_when_asked(full, nemo, tmp_path):
    made = deliver.export(resolved(tmp_path))
    (made / "config.json").write_text('{"number": 3}')
    with pytest.raises(ConformanceFailed, match="It was left as it is; --overwrite makes it again"):
        deliver.export(resolved(tmp_path))
    assert made.is_dir()
    assert deliver.export(resolved(tmp_path), overwrite=True) == made and nemo.exports == 2


def test_what_cannot_be_exported(full, nemo, tmp_path):
    for changes in ({"no_merge": True}, {"target": "nemo2"}):
        with pytest.raises(UnsupportedAdapter, match="has no adapter, and is a whole NeMo 2.0 mod"):
            deliver.export(resolved(tmp_path, **changes))
    with pytest.raises(WorkshopError, match="it is one of hf_peft, merged, hf_model"):
        deliver.export(resolved(tmp_path), "gguf")
    assert not (tmp_path / "exports").exists()


def trained(folder, scheme, base, tmp_path, **changes):
    """The run of ``scheme`` that NeMo trained, as the recipe path finds it."""
    places = {"hf_model_id": base / "hf" / "tiny", "nemo_ckpt_dir": base / "nemo2" / "tiny"}
    places = {name: str(path) for name, path in places.items()}
    return resolved(tmp_path, nemo_logs_dir=str(folder / scheme), **places, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["lora", "dora"])
def test_an_adapter_through_every_form(nemo2_trained, bridged_tiny, tmp_path, scheme):
    settings = trained(nemo2_trained, scheme, bridged_tiny, tmp_path)
    model, peft = deliver.export(settings, "hf_model"), deliver.export(settings, "hf_peft")
    merged = model.with_name(model.name.replace(".hf_model", ".merged"))
    forms = {path.name.rpartition(".")[2] for path in (tmp_path / "exports").iterdir()}
    assert forms == set(deliver.FORMS)
    assert (merged / "weights" / ".metadata").is_file() and (peft / "adapter_config.json").is_file()
    ids, hf = [[5, 6, 7, 8, 200, 11]], bridged_tiny / "hf" / "tiny"
    (tuned,) = proof.logits(model, ids)
    rows = tuned.shape[-1]  # NeMo's exporter keeps only those that the tokenizer has
    base = proof.logits(hf, ids)[0][..., :rows]
    assert abs(tuned - base).max() > 0.05, "else the comparisons of this test say nothing"
    adapted = proof.logits((hf, peft), ids)[0][..., :rows]
    assert abs(tuned - adapted).max() < 1e-4


@pytest.fixture
def moved(nemo2_trained, bridged_tiny, tmp_path):
    """The LoRA run in a place of its own, and a copy of its base, which is no longer where the
    adapter says."""
    run, base = tmp_path / "nemo_logs", tmp_path / "base"
    shutil.copytree(nemo2_trained / "lora", run, symlinks=False)
    shutil.copytree(bridged_tiny / "nemo2" / "tiny", base)
    for file in run.glob("checkpoints/*/weights/adapter_metadata.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_ckpt_path": "/gone"}))
    record = run / "workshop" / "run.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"fingerprint": {"base": nemo2.contents_of(base)}}))
    return record


@pytest.mark.slow
def test_a_base_that_was_moved_is_found_where_the_options_say(moved, bridged_tiny, tmp_path):
    model, base = str(bridged_tiny / "hf" / "tiny"), str(tmp_path / "base")
    settings = resolved(tmp_path, hf_model_id=model, nemo_ckpt_dir=base, checkpoint="last")
    assert (deliver.export(settings, "hf_peft") / "adapter_config.json").is_file()
    other = {"context": {}, "weights": {"__0_0.distcp": "another"}}
    moved.write_text(json.dumps({"fingerprint": {"base": other}}))
    gone = "model_ckpt_path is '/gone', which holds no NeMo 2.0 checkpoint"
    with pytest.raises(DamagedCheckpoint, match=gone):
        deliver.export(settings, "hf_peft")


@pytest.mark.slow
def test_a_full_fine_tune_for_transformers(nemo2_trained, bridged_tiny, tmp_path):
    settings = trained(nemo2_trained, "full", bridged_tiny, tmp_path, peft_scheme="full_ft")
    model = deliver.export(settings)
    assert (model / "config.json").is_file() and (model / "tokenizer.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf_peft", "merged"])
def test_a_replacement_that_computes_something_else_leaves_the_earlier_export(
    nemo2_trained, bridged_tiny, tmp_path, monkeypatch, form
):
    """The exporter writes the adapter of another run: right in form, wrong in what it computes."""
    other = next((nemo2_trained / "canonical_lora" / "checkpoints").glob("*-last"))
    right, settings = export_adapter, trained(nemo2_trained, "lora", bridged_tiny, tmp_path)

    def wrong(adapter, *args, **options):
        return right(other, *args, **options)

    def contents(folder):
        if form == "merged":
            return [file.stat().st_mtime_ns for file in sorted((folder / "weights").iterdir())]
        return [path.read_bytes() for path in sorted(folder.iterdir())]

    monkeypatch.setattr(deliver, "export_adapter", wrong)
    with pytest.raises(ConformanceFailed, match="its logits differ .* It was not kept"):
        deliver.export(settings, form)
    assert not list((tmp_path / "exports").iterdir())
    monkeypatch.undo()
    exported = deliver.export(settings, form)
    before = contents(exported)
    monkeypatch.setattr(deliver, "export_adapter", wrong)
    taken = "made from another adapter.* Move it away, or replace it with --overwrite"
    with pytest.raises(OutputExists, match=taken):
        deliver.export(settings, form)
    with pytest.raises(ConformanceFailed, match="It was not kept"):
        deliver.export(settings, form, overwrite=True)
    assert contents(exported) == before and list((tmp_path / "exports").iterdir()) == [exported]
    (exported / "notes.md").write_text("somebody else's")
    foreign = "holds 'notes.md', which no export wrote: it is not replaced. Move it away.$"
    with pytest.raises(OutputExists, match=foreign):
        deliver.export(settings, form, overwrite=True)
