"""What the import refuses before NeMo is loaded."""

import json

import pytest

from workshop_utils.errors import NotACheckpoint, UnsupportedCheckpoint
from workshop_utils.import_checkpoint import import_checkpoint


@pytest.mark.parametrize("config, error, said", [
    (None, NotACheckpoint, "has no config.json"),
    ({"model_type": "gpt2"}, NotACheckpoint, "model_type is 'gpt2'"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 64}},
     UnsupportedCheckpoint, "original_max_position_embeddings is 64"),
])  # fmt: skip
def test_refused_at_once(tmp_path, config, error, said):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=said):
        import_checkpoint(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
