"""docs/adding-a-model-family.md: what it names exists, and its example works."""

import re

import nemo_loads
import numpy as np
import pytest
import tiny_families
from checkpoint_samples import run
from places import ROOT

from workshop_utils.checkpoints.formats import gpt_classes

GUIDE = (ROOT / "docs" / "adding-a-model-family.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", GUIDE, re.DOTALL))
CLASSES = "workshop_utils/checkpoints/formats/gpt_classes.py"

IMPORT = """
import sys
from pathlib import Path
from workshop_utils.checkpoints.convert.huggingface import import_checkpoint
from workshop_utils.checkpoints.formats import gpt_classes
if __name__ == "__main__":
    exec(Path(sys.argv[1]).read_text(), vars(gpt_classes))
    gpt_classes.FAMILIES["phi3"] = gpt_classes.family
    import_checkpoint(Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_every_file_and_name_exists():
    for name in re.findall(r"`((?:workshop_utils|tests)/[\w/]+\.py)`", GUIDE) + list(BLOCKS):
        assert (ROOT / name).is_file(), name
    folders = (ROOT / "workshop_utils" / "checkpoints", ROOT / "tests")
    sources = "".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    for name in ("FAMILIES", "FEATURES", "copied", "fixed", "layout", "ACTIVATIONS"):
        assert f"`{name}`" in GUIDE
        assert re.search(rf"(^|def |\s){name}\b(:| =|\()", sources), name
    assert "`family_of_features`" in GUIDE and "def family_of_features(" in sources


def test_every_family_has_a_tiny_model():
    titles = {title for title, _ in tiny_families.FAMILIES.values()}
    assert titles == {family.title for family in gpt_classes.FAMILIES.values()}


@pytest.fixture
def phi3(monkeypatch):
    """The family of the guide, added for one test as the guide says."""
    names: dict = dict(vars(gpt_classes))
    exec(BLOCKS[CLASSES], names)
    monkeypatch.setitem(gpt_classes.FAMILIES, "phi3", names["family"])
    monkeypatch.setattr(tiny_families, "FAMILIES", dict(tiny_families.FAMILIES))
    exec(BLOCKS["tests/samples/tiny_families.py"], dict(vars(tiny_families)))
    return names["family"]


def test_the_example_is_complete(phi3):
    assert phi3.models[0].endswith(".phi3mini.Phi3Model")
    for fields in phi3.configs.values():
        assert fields.keys() == gpt_classes.BASE.keys()
    assert tiny_families.FAMILIES["phi3"][0] == phi3.title


@pytest.mark.slow
def test_the_example_of_the_guide_works(phi3, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from workshop_utils.checkpoints.convert import convert
    from workshop_utils.checkpoints.formats.safe_text import read_yaml

    tiny_families.make_tiny_family(tmp_path / "hf", "phi3")
    (tmp_path / "import.py").write_text(IMPORT)
    (tmp_path / "block.py").write_text(BLOCKS[CLASSES])
    run(*(tmp_path / name for name in ("import.py", "block.py", "hf", "nemo2")))
    convert(tmp_path / "nemo2", tmp_path / "nemo1", "nemo1")
    convert(tmp_path / "nemo1", tmp_path / "back", "nemo2")
    assert read_yaml(tmp_path / "back" / "context" / "model.yaml")["_target_"].endswith("Phi3Model")
    tokens = np.random.default_rng(0).integers(3, 250, size=(1, 40))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    (logits,) = nemo_loads.logits("nemo2", [tmp_path / "back"], tokens, tmp_path)
    assert np.abs(logits - expected).max() < 2e-5
