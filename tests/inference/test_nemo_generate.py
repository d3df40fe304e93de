"""NeMo's own answers against transformers and PEFT, on the tiny model; and what is refused before
NeMo starts."""

import subprocess
import sys

import pytest
from export_samples import Shape, config_of, tensors_of, write_adapter
from tiny_model import SHAPE, make_tiny_model

from workshop_utils.core.errors import GenerationFailed, NotACheckpoint, UnsupportedAdapter
from workshop_utils.inference import generate, nemo1_engine
from workshop_utils.runtime import processes

TINY = Shape(
    hidden=SHAPE["hidden_size"],
    heads=SHAPE["num_attention_heads"],
    groups=SHAPE["num_key_value_heads"],
    channels=SHAPE["head_dim"],
    ffn=SHAPE["intermediate_size"],
    layers=SHAPE["num_hidden_layers"],
)
CONVERSATIONS = [
    [{"role": "user", "content": text}]
    for text in ("number 3?", "a longer question, number 12345?", "x")
]


@pytest.fixture
def view(tmp_path):
    (tmp_path / "view" / "model_weights").mkdir(parents=True)
    (tmp_path / "view" / "model_config.yaml").write_text("broken: [")
    return tmp_path / "view"


def test_refuses_what_is_not_bridged(tmp_path):
    with pytest.raises(NotACheckpoint, match="workshop bridge"):
        nemo1_engine.ask_nemo(tmp_path)


def test_refuses_an_adapter_for_another_reader(tmp_path, view):
    from workshop_utils.adapters.export import export

    trained = write_adapter(tmp_path / "tiny.nemo", config_of(TINY), tensors_of(TINY))
    exported = export(trained, "nemo", tmp_path / "out", reader="trtllm")
    with pytest.raises(UnsupportedAdapter, match="--reader nemo"):
        nemo1_engine.ask_nemo(view, exported)


def test_a_failure_shows_its_cause(view, monkeypatch):
    code = "print('chatter'); raise SystemExit('the cause')"
    real = processes.run
    monkeypatch.setattr(processes, "run", lambda _, log: real([sys.executable, "-c", code], log))
    with pytest.raises(GenerationFailed, match="(?s)exit status 1.*the cause"):
        nemo1_engine.ask_nemo(view, trust=True)


@pytest.mark.slow
def test_nemo_agrees_with_transformers_and_peft(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    from workshop_utils.checkpoints.convert.bridge import bridge

    # No more rows than tokens: NeMo never answers with an id that the tokenizer lacks, transformers
    # would.
    hf = make_tiny_model(tmp_path / "hf", vocab_size=259, initializer_range=0.4)
    # A process of its own: NeMo's importer leaves a parallel state behind.
    command = [sys.executable, "-m", "workshop_utils", "import", str(hf)]
    subprocess.run([*command, "--out", str(tmp_path / "nemo2")], check=True)
    bridged = bridge(tmp_path / "nemo2")
    tensors = {key: 0.3 * value for key, value in tensors_of(TINY).items()}
    adapter = write_adapter(tmp_path / "tiny.nemo", config_of(TINY), tensors)
    ids = [[5, 60, 7, 200, 11], [9, 8, 30, 40, 50]]
    model, tokenizer = generate.load(hf, adapter)
    how = {"tokenize": False, "add_generation_prompt": True}
    prompts = [tokenizer.apply_chat_template(turns, **how) for turns in CONVERSATIONS]
    found = nemo1_engine.ask_nemo(bridged, adapter, prompts, ids, max_new_tokens=10)
    logits = generate.logits(model, ids)
    assert abs(found.logits - logits).max() < 1e-4
    expected = generate.generate(model, tokenizer, CONVERSATIONS, 10, progress=False)
    assert found.texts == expected
    moved = abs(logits - generate.logits(hf, ids)).max()
    assert moved > 0.1, "the adapter has to matter for this test to say anything"
