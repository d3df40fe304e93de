"""The shard map, the tree and the two figures, on genuine checkpoints."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import checkpoint_samples as samples
import numpy
import pytest
from safetensors.numpy import save_file

from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.summary import Checkpoint, Kind
from workshop_utils.checkpoints.formats.tensor import whole
from workshop_utils.checkpoints.verify import tree
from workshop_utils.checkpoints.verify.shard_map import shard_map
from workshop_utils.series import plots


@pytest.fixture
def numbered(tmp_path):
    """Two files; the layers are numbered in the names."""
    parts = {
        "a.safetensors": {
            "model.layers.0.mlp.up.weight": (4, 2),
            "model.layers.1.mlp.up.weight": (4, 2),
            "model.norm.weight": (2,),
        },
        "b.safetensors": {"model.layers.1.mlp.down.weight": (2, 4), "<b>.weight": (1,)},
    }
    for file, shapes in parts.items():
        save_file(
            {name: numpy.zeros(shape, "float32") for name, shape in shapes.items()}, tmp_path / file
        )
    names = {name: file for file, shapes in parts.items() for name in shapes}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / "config.json").write_text("{}")
    return identify(tmp_path)


def test_layers_that_are_numbered(numbered):
    shards = shard_map(numbered)
    first, second = {0: 32, 1: 32, None: 8}, {1: 32, None: 4}
    assert shards.cells == {"a.safetensors": first, "b.safetensors": second}
    assert (shards.layers, shards.mixed) == ((0, 1), [1])
    assert shards.finding == "1 of 2 layers have weights in more than one of the 2 files."


def test_layers_that_are_stacked(originals):
    shards = shard_map(identify(originals / "plain"))
    of_a_layer = sum(4 * math.prod(shape) for shape in samples.LAYER_SHAPES.values())
    assert shards.layers == tuple(range(samples.LAYERS))
    for layer in shards.layers:
        assert sum(cells.get(layer, 0) for cells in shards.cells.values()) == of_a_layer


def test_the_tree_adds_up(numbered):
    text = tree.as_text(numbered).splitlines()
    assert text[0].endswith(": 27 elements, 0.0 MB")
    assert "      mlp/: 24 elements, 0.0 MB" in text
    assert "          weight: 2 x [4, 2] float32, 16 elements, 0.0 MB" in text
    assert next(iter(tree.by_module(numbered).items())) == ("mlp.up", 16)


def test_the_html_is_whole_and_escapes_names(numbered):
    open_tags, closed = [], []
    checker = HTMLParser()
    checker.handle_starttag = lambda tag, attrs: open_tags.append(tag)
    checker.handle_endtag = lambda tag: closed.append((open_tags.pop(), tag))
    checker.feed(tree.Tree(numbered)._repr_html_())
    assert open_tags == []
    assert closed and all(opened == tag for opened, tag in closed)
    assert "&lt;b&gt;" in tree.as_html(numbered)
    assert "<b>" not in tree.as_html(numbered)


def test_a_very_deep_name_is_cut():
    deep = whole(".".join(["a"] * 50_000), (1,), "float32", "f", 0, 4)
    checkpoint = Checkpoint(Path("x"), Kind.HUGGINGFACE, None, None, 4, (deep,), None, None)
    assert len(tree.as_text(checkpoint).splitlines()) == tree.MAX_DEPTH + 2


def test_the_figures(numbered, originals, capsys):
    for found in (numbered, identify(originals / "gpu")):
        plots.plot_shards(found).savefig("/dev/null", format="png")
        plots.plot_parameters(found).savefig("/dev/null", format="png")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "1 of 2 layers have weights in more than one of the 2 files."
    assert printed[1] == "27 parameters; mlp.up holds 59% of them."
