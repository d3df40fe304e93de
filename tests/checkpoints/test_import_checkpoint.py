"""What the import refuses before NeMo is loaded."""

import json

import pytest

from workshop_utils.checkpoints.convert.huggingface import import_checkpoint
from workshop_utils.core.errors import NotACheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint


@pytest.mark.parametrize(
    "config, error, said",
    [
        (None, NotACheckpoint, "has no config.json"),
        ({"model_type": "gpt2"}, NotACheckpoint, "model_type is 'gpt2'"),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            UnsupportedCheckpoint,
            "rope_type is 'yarn'",
        ),
        (
            {"model_type": "llama", "attention_bias": True},
            UnsupportedCheckpoint,
            "attention_bias is true",
        ),
        (
            {"model_type": "qwen2", "hidden_act": "gelu"},
            UnsupportedCheckpoint,
            'hidden_act is "gelu"',
        ),
        (
            {"model_type": "qwen3", "rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
            UnsupportedCheckpoint,
            "rope_scaling",
        ),
        (
            {"model_type": "mistral", "sliding_window": 4096},
            UnsupportedCheckpoint,
            "sliding_window is 4096.*Transformer Engine",
        ),
        (
            {"model_type": "mixtral", "sliding_window": 4096},
            UnsupportedCheckpoint,
            "sliding_window is 4096",
        ),
        (
            {"model_type": "qwen2", "auto_map": {"AutoConfig": "evil.Config"}},
            UnsafeCheckpoint,
            "auto_map names Python code",
        ),
    ],
)
def test_refused_at_once(tmp_path, config, error, said):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=said):
        import_checkpoint(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
