"""What the import refuses before NeMo is loaded."""

import json

import pytest

from workshop_utils.checkpoints.convert.huggingface import import_checkpoint
from workshop_utils.core.errors import NotACheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint

YARN, LLAMA3 = ({"rope_type": kind, "factor": 2.0} for kind in ("yarn", "llama3"))
WINDOW = {"sliding_window": 4096}
CODE = {"auto_map": {"AutoConfig": "evil.Config"}}


@pytest.mark.parametrize(
    "kind, config, error, said",
    [
        (None, {}, NotACheckpoint, "has no config.json"),
        ("gpt2", {}, NotACheckpoint, "model_type is 'gpt2'"),
        ("llama", {"rope_scaling": YARN}, UnsupportedCheckpoint, 'rope_type is "yarn"'),
        ("llama", {"attention_bias": True}, UnsupportedCheckpoint, "attention_bias is true"),
        ("qwen2", {"hidden_act": "gelu"}, UnsupportedCheckpoint, 'hidden_act is "gelu"'),
        ("qwen3", {"rope_scaling": LLAMA3}, UnsupportedCheckpoint, "rope_scaling"),
        ("mistral", WINDOW, UnsupportedCheckpoint, "sliding_window is 4096.*Transformer Engine"),
        ("mixtral", WINDOW, UnsupportedCheckpoint, "sliding_window is 4096"),
        ("qwen2", CODE, UnsafeCheckpoint, "auto_map names Python code"),
    ],
)
def test_refused_at_once(tmp_path, kind, config, error, said):
    if kind:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | config))
    with pytest.raises(error, match=said):
        import_checkpoint(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
