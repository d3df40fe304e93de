"""docs/adding-a-model-family.md: what it names exists, and its example works."""

import re
import subprocess
import sys

import nemo_loads
import numpy as np
import pytest
import tiny_families
from places import ROOT

from workshop_utils.checkpoints.convert import huggingface
from workshop_utils.checkpoints.formats import gpt_classes

GUIDE = (ROOT / "docs" / "adding-a-model-family.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", GUIDE, re.DOTALL))

IMPORT = """
import sys
from pathlib import Path
from workshop_utils.checkpoints.convert import huggingface
if __name__ == "__main__":
    exec(Path(sys.argv[1]).read_text(), vars(huggingface))
    huggingface.import_checkpoint(Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_every_file_and_name_exists():
    for name in re.findall(r"`((?:workshop_utils|tests)/[\w/]+\.py)`", GUIDE) + list(BLOCKS):
        assert (ROOT / name).is_file(), name
    sources = "".join(
        path.read_text()
        for path in [*ROOT.glob("workshop_utils/**/*.py"), *ROOT.glob("tests/**/*.py")]
    )
    for name in (
        "FAMILIES",
        "FEATURES",
        "corrections",
        "unused",
        "layout",
        "ACTIVATIONS",
        "family_of_features",
    ):
        assert f"`{name}`" in GUIDE
        assert re.search(rf"(^|def |\s){name}\b(:| =|\()", sources), name


def test_every_family_is_in_every_table():
    tiny = {fields[0].lower() for fields in tiny_families.FAMILIES.values()}
    assert set(gpt_classes.FAMILIES) == set(huggingface.FAMILIES) == tiny


@pytest.fixture
def phi3(monkeypatch):
    """The family of the guide, added for one test as the guide says."""
    names: dict = dict(vars(gpt_classes))
    exec(BLOCKS["workshop_utils/checkpoints/formats/gpt_classes.py"], names)
    monkeypatch.setitem(gpt_classes.FAMILIES, "phi3", names["family"])
    for module, file in (
        (huggingface, "workshop_utils/checkpoints/convert/huggingface.py"),
        (tiny_families, "tests/samples/tiny_families.py"),
    ):
        monkeypatch.setattr(module, "FAMILIES", dict(module.FAMILIES))
        exec(BLOCKS[file], dict(vars(module)))
    return names["family"]


@pytest.mark.slow
def test_the_example_of_the_guide_works(phi3, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from workshop_utils.checkpoints.convert import convert
    from workshop_utils.checkpoints.formats.safe_text import read_yaml

    tiny_families.make_tiny_family(tmp_path / "hf", "phi3")
    (tmp_path / "import.py").write_text(IMPORT)
    (tmp_path / "block.py").write_text(BLOCKS["workshop_utils/checkpoints/convert/huggingface.py"])
    command = [
        sys.executable,
        tmp_path / "import.py",
        tmp_path / "block.py",
        tmp_path / "hf",
        tmp_path / "nemo2",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    convert(tmp_path / "nemo2", tmp_path / "nemo1", "nemo1")
    convert(tmp_path / "nemo1", tmp_path / "back", "nemo2")
    assert read_yaml(tmp_path / "back" / "context" / "model.yaml")["_target_"].endswith("Phi3Model")
    tokens = np.random.default_rng(0).integers(3, 250, size=(1, 40))
    with torch.inference_mode():
        expected = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
            .eval()(torch.from_numpy(tokens))
            .logits.numpy()
        )
    (found,) = nemo_loads.logits("nemo2", [tmp_path / "back"], tokens, tmp_path)
    assert np.abs(found - expected).max() < 2e-5
