"""NeMo itself loads what ``workshop convert`` wrote, and computes what transformers computes, for
every family."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nemo_loads
import numpy as np
import pytest
from checkpoint_samples import run
from tiny_families import FAMILIES, make_tiny_family

from workshop_utils.checkpoints.convert import convert
from workshop_utils.checkpoints.formats import nemo_archive, values
from workshop_utils.checkpoints.formats.identify import identify

pytestmark = pytest.mark.slow

IMPORT_ALL = """
import sys
from pathlib import Path
from workshop_utils.checkpoints.convert.huggingface import import_checkpoint
if __name__ == "__main__":
    for source in sys.argv[2:]:
        import_checkpoint(Path(source), Path(sys.argv[1]) / Path(source).name)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders ``hf``, ``nemo2`` (imported by NeMo), ``nemo1`` (converted), ``back`` (and back),
    with a folder for each family."""
    root = tmp_path_factory.mktemp("families")
    sources = [make_tiny_family(root / "hf" / name, name) for name in FAMILIES]
    # All in one process: loading NeMo takes longer than all the imports.
    (root / "import_all.py").write_text(IMPORT_ALL)
    run(root / "import_all.py", root / "nemo2", *sources)
    for name in FAMILIES:
        archive = root / "archive" / f"{name}.nemo"
        convert(root / "nemo2" / name, root / "nemo1" / name, "nemo1")
        convert(root / "nemo1" / name, root / "back" / name, "nemo2")
        convert(root / "back" / name, archive, "nemo1")
        convert(archive, root / "from_archive" / name, "nemo2")
    return root


TOKENS = np.random.default_rng(0).integers(3, 250, size=(1, 40))


@pytest.fixture(scope="module")
def expected(models):
    """Family -> logits of transformers, fp32 ``[1, 40, vocabulary]``."""
    import torch
    from transformers import AutoModelForCausalLM

    logits = {}
    for name in FAMILIES:
        model = AutoModelForCausalLM.from_pretrained(models / "hf" / name).eval()
        with torch.inference_mode():
            logits[name] = model(torch.from_numpy(TOKENS)).logits.numpy()
    return logits


def weights(path: Path) -> dict[str, bytes]:
    held = identify(path)
    named = {tensor.name.partition(".")[2]: tensor for tensor in held.tensors}
    return {name: values.read_tensor(held, named[name]).tobytes() for name in named}


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trips_are_bit_equal(models, family):
    original = weights(models / "nemo2" / family)
    assert original
    for folder in ("nemo1", "back", "from_archive"):
        assert weights(models / folder / family) == original, folder
    assert weights(models / "archive" / f"{family}.nemo") == original
    # The converted configuration says what NeMo's own said, apart from padding and NeMo's notes.
    sizes = [identify(models / folder / family).architecture for folder in ("nemo2", "back")]
    assert sizes[0] == sizes[1]


@pytest.fixture(scope="module")
def nemo2_logits(models, tmp_path_factory):
    folders = ("nemo2", "back", "from_archive")
    places = [(folder, name) for folder in folders for name in FAMILIES]
    paths = [models / folder / name for folder, name in places]
    logits = nemo_loads.logits("nemo2", paths, TOKENS, tmp_path_factory.mktemp("nemo2"))
    return dict(zip(places, logits, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_nemo_2(nemo2_logits, expected, family):
    own = expected[family]
    assert np.abs(own).max() > 1
    for folder in ("nemo2", "back", "from_archive"):
        logits = nemo2_logits[folder, family][..., : own.shape[-1]]
        assert np.abs(logits - own).max() < 2e-5, folder


@pytest.fixture(scope="module")
def nemo1_logits(models, tmp_path_factory):
    paths = [models / "nemo1" / name for name in FAMILIES] + [models / "archive" / "llama31.nemo"]
    logits = nemo_loads.logits("nemo1", paths, TOKENS, tmp_path_factory.mktemp("nemo1"))
    return {path.name: own for path, own in zip(paths, logits, strict=True)}


@pytest.mark.parametrize("name", [*FAMILIES, "llama31.nemo"])
def test_logits_in_nemo_1(nemo1_logits, expected, name):
    assert np.abs(nemo1_logits[name] - expected[name.removesuffix(".nemo")]).max() < 2e-5


def test_hugging_face_to_nemo_1_in_one_step(models, tmp_path):
    done = convert(models / "hf" / "qwen3", tmp_path / "made", "nemo1")
    assert "imported by NeMo" in done.notes[0]
    assert weights(tmp_path / "made") == weights(models / "nemo2" / "qwen3")
    shards = list((tmp_path / "made" / "model_weights").glob("*.distcp"))
    assert shards
    assert not any(shard.is_symlink() for shard in shards), "the checkpoint between is gone"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    convert(models / "hf" / "qwen3", tmp_path / "made.nemo", "nemo1")
    assert weights(tmp_path / "made.nemo") == weights(models / "nemo2" / "qwen3")
    named = nemo_archive.read_config(tmp_path / "made.nemo")["tokenizer"]["type"]
    assert Path(named) == models / "hf" / "qwen3", "not the checkpoint between, which is gone"


EXPORT_ALL = """
import sys
from pathlib import Path
from workshop_utils.runtime import nemo_cpu
nemo_cpu.apply()
if __name__ == "__main__":
    from nemo.collections import llm
    from workshop_utils.checkpoints.convert.huggingface import export_huggingface
    for source in sys.argv[2:]:
        export_huggingface(Path(source), Path(sys.argv[1]) / Path(source).name)
"""


def test_nemo_exports_what_was_converted(models, tmp_path):
    """From Hugging Face to NeMo 2.0, NeMo 1, NeMo 2.0 and back to Hugging Face: the same weights
    and sizes."""
    import torch
    from transformers import AutoModelForCausalLM

    # NeMo's exporter writes 8192 for the original length of any rope.
    families = [name for name in FAMILIES if name != "llama31"]
    (tmp_path / "export_all.py").write_text(EXPORT_ALL)
    run(tmp_path / "export_all.py", tmp_path, *(models / "back" / name for name in families))
    for name in families:
        before, after = (
            AutoModelForCausalLM.from_pretrained(path / name) for path in (models / "hf", tmp_path)
        )
        assert type(before) is type(after)
        state, exported = before.state_dict(), after.state_dict()
        assert state.keys() == exported.keys()
        # The exporters write as many rows of the embedding as the tokenizer has tokens.
        for key, value in exported.items():
            assert torch.equal(value, state[key][: len(value)]), (name, key)


def test_nemo_generates_and_trains(models, tmp_path):
    """``llm.generate`` gives the tokens of transformers, and ``llm.finetune`` starts from the
    checkpoint and saves."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [{"input": f"number {i}?", "output": f"it is {i}"} for i in range(16)]
    for name in ("training", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trains = Path(nemo_loads.__file__).with_name("nemo_trains.py")
    run(trains, models / "from_archive" / "llama2", tmp_path, cwd=tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(models / "hf" / "llama2").eval()
    tokenizer = AutoTokenizer.from_pretrained(models / "hf" / "llama2")
    ids = tokenizer("number 1?", return_tensors="pt")["input_ids"]
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert result["texts"] == [tokenizer.decode(tokens)]
    assert result["step"] == 3
    assert 0 < result["metrics"]["reduced_train_loss"] < 20
    assert list((tmp_path / "log").rglob("*.distcp")), "the trained model was saved"


READ_GRAPH = """
import json, sys
from pathlib import Path
from workshop_utils.runtime import nemo_cpu
nemo_cpu.apply()
from nemo.collections import llm
from nemo.lightning.io.api import load_context
context = load_context(Path(sys.argv[1]), build=False)
config, strategy = context.model.config, context.trainer.strategy
names = [context.model.__fn_or_cls__.__name__, strategy.__fn_or_cls__.__name__]
more = [config.activation_func.__name__, str(config.params_dtype), context.extra]
print("READ", json.dumps([*names, config.num_moe_experts, *more]))
"""


@pytest.mark.parametrize("folder", ["nemo2", "back"])
def test_fiddle_reads_our_graph_as_it_reads_nemos(models, folder, tmp_path):
    """``io.json`` has what fiddle's own reader wants, so that a later NeMo reads it, too."""
    shutil.copy(models / folder / "mixtral" / "context" / "io.json", tmp_path / "io.json")
    command = [sys.executable, "-c", READ_GRAPH, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("READ ")), None)
    assert line, done.stderr[-3000:]
    names = ["MixtralModel", "MegatronStrategy"]
    assert json.loads(line.removeprefix("READ ")) == [*names, 4, "silu", "torch.float32", {}]
