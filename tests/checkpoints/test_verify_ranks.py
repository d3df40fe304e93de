"""Checkpoints of Megatron: parts of four ranks that were not merged, and torch_dist directories
that four ranks wrote."""

import shutil
from pathlib import Path

import parallel_samples
import pytest
import yaml
from damage import has, rewrite

from workshop_utils.checkpoints.formats.findings import Code
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
    assert verify(samples / name, deep=True).sound


QKV = "model.decoder.layers.1.self_attention.linear_qkv.weight"
FC2, NORM = "decoder.layers.mlp.linear_fc2.weight", "decoder.final_layernorm.weight"
STAGE_1 = [f"tp_rank_{rank:02}_pp_rank_001/model_weights.ckpt" for rank in (0, 1)]


def layer_1(state):
    for name in [name for name in state if ".layers.1." in name]:
        state.pop(name)


#: the ranks of stage 1 that are damaged, the damage -> code, tensor, words
DAMAGE = {
    "a tensor of one rank": (
        STAGE_1[1:],
        lambda state: state.pop(QKV),
        (Code.RANKS, QKV, f"{STAGE_1[1]} has no"),
    ),
    "a shape of one rank": (
        STAGE_1[1:],
        lambda state: state.update({QKV: state[QKV][:-1].clone()}),
        (Code.RANKS, QKV, "is [47, 32]", f"in {STAGE_1[1]}, but [48, 32]"),
    ),
    "slices against the configuration": (
        STAGE_1,
        lambda state: state.update({QKV: state[QKV].repeat(2, 1)}),
        (Code.SHAPE, QKV, "is [96, 32]", "for stage 1 it has to be [48, 32]"),
    ),
    "a layer": (STAGE_1, layer_1, (Code.MISSING_TENSOR, FC2, "missing in layer 1", "for stage 1")),
    "the final norm": (
        STAGE_1,
        lambda state: state.pop(f"model.{NORM}"),
        (Code.MISSING_TENSOR, NORM, "is missing; model_config.yaml for stage 1"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_parts(ranks, damage):
    files, change, finding = DAMAGE[damage]
    for file in files:
        rewrite(ranks / file, change)
    report = verify(ranks)
    assert has(report, *finding), report.findings
    assert len(report.refused) == 1 or damage == "a layer"


def test_a_part_that_is_missing(ranks):
    shutil.rmtree((ranks / STAGE_1[0]).parent)
    words = "tensor-parallel rank 0, pipeline-parallel rank 1"
    assert has(verify(ranks), Code.DAMAGED, None, words)
