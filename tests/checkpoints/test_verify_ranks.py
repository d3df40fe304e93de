"""Checkpoints of Megatron: parts of four ranks that were not merged, and torch_dist directories
that four ranks wrote."""

import shutil
from pathlib import Path

import parallel_samples
import pytest
import torch
import yaml

from workshop_utils.checkpoints.verify.verify import verify


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    directory = tmp_path_factory.mktemp("megatron")
    parallel_samples.make(directory)
    (directory / "ranks" / "model_config.yaml").write_text(yaml.safe_dump(parallel_samples.CONFIG))
    return directory


@pytest.fixture
def ranks(samples, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    return Path(shutil.copytree(samples / "ranks", tmp_path / "ranks"))


@pytest.mark.parametrize("name", ["ranks", "lm", "iter"])
def test_what_megatron_wrote_is_sound(samples, name):
    assert verify(samples / name, deep=True).findings == []


QKV = "model.decoder.layers.1.self_attention.linear_qkv.weight"


def rewrite(ranks: Path, names: list[str], change) -> None:
    for name in names:
        file = ranks / name / "model_weights.ckpt"
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)


def found(report, tensor: str, *words: str) -> bool:
    return any(
        finding.tensor == tensor and all(word in str(finding) for word in words)
        for finding in report.findings
    )


STAGE_1 = ["tp_rank_00_pp_rank_001", "tp_rank_01_pp_rank_001"]


def test_a_tensor_that_one_rank_lacks(ranks):
    rewrite(ranks, STAGE_1[1:], lambda state: state.pop(QKV))
    assert found(verify(ranks), QKV, "tp_rank_01_pp_rank_001/model_weights.ckpt has no")


def test_slices_of_different_shapes(ranks):
    rewrite(ranks, STAGE_1[1:], lambda state: state.update({QKV: state[QKV][:-1].clone()}))
    assert found(
        verify(ranks),
        QKV,
        "is [47, 32]",
        "in tp_rank_01_pp_rank_001/model_weights.ckpt, but [48, 32]",
    )


def test_slices_that_the_configuration_contradicts(ranks):
    rewrite(ranks, STAGE_1, lambda state: state.update({QKV: state[QKV].repeat(2, 1)}))
    assert found(verify(ranks), QKV, "is [96, 32] in stage 1, but has to be [48, 32]")


def test_a_layer_that_a_stage_lacks(ranks):
    rewrite(
        ranks,
        STAGE_1,
        lambda state: [state.pop(name) for name in list(state) if ".layers.1." in name],
    )
    assert found(verify(ranks), "decoder.layers.mlp.linear_fc2.weight", "layer 1 of stage 1")


def test_a_stage_without_the_final_norm(ranks):
    rewrite(ranks, STAGE_1, lambda state: state.pop("model.decoder.final_layernorm.weight"))
    report = verify(ranks)
    assert [finding.tensor for finding in report.findings] == ["decoder.final_layernorm.weight"]


def test_a_part_that_is_missing(ranks):
    shutil.rmtree(ranks / STAGE_1[0])
    assert any(
        "tensor-parallel rank 0, pipeline-parallel rank 1" in str(finding)
        for finding in verify(ranks).findings
    )
