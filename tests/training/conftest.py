"""What the tests of the script path share."""

import pytest
import yaml
from tiny_model import make_tiny_model, write_rows, write_sharded

from workshop_utils.training.script import make_plan

SIZES = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 128,
    "override_vocab_size": 512,
}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """What `workshop bridge` leaves of a model of SIZES, as far as planning looks at it."""
    directory = tmp_path_factory.mktemp("bridged") / "tiny"
    tokenizer = make_tiny_model(directory.parent / "hf")
    write_sharded(directory / "model_weights")
    described = SIZES | {"tokenizer": {"type": str(tokenizer)}}
    (directory / "model_config.yaml").write_text(yaml.safe_dump(described))
    return directory


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty workshop on a CPU."""
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    monkeypatch.setenv("WORKSHOP_DEVICE", "cpu")
    monkeypatch.delenv("NEMO_PATH", raising=False)
    return tmp_path


@pytest.fixture
def plan(base, root):
    """``make_plan`` for that base."""

    def make(*overrides: str, **options):
        return make_plan([f"model.restore_from_path={base}", *overrides], **options)

    return make


@pytest.fixture(scope="module")
def tiny(bridged_tiny, tmp_path_factory):
    """A workshop with ``bridged/tiny``, which NeMo can train, and rows; the runs of a module end up
    in it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "bridged").symlink_to(bridged_tiny / "bridged")
    write_rows(folder / "rows.jsonl", 32)
    return folder
