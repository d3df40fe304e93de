"""The tensors of a checkpoint as a tree: names split at their dots, the layers of one kind
together, sizes added up."""

import html
from collections.abc import Iterator, Mapping

from workshop_utils.checkpoints.formats.summary import Checkpoint
from workshop_utils.checkpoints.formats.tensor import Tensor
from workshop_utils.checkpoints.verify import layers
from workshop_utils.core import terminal

MAX_DEPTH = 20
"""Longer names are not split further."""


def by_module(checkpoint: Checkpoint) -> dict[str, int]:
    """Elements of each module, all layers together, the largest first: ``{"mlp.linear_fc1":
    106168320, ...}``."""
    counts: dict[str, int] = {}
    for tensor in checkpoint.tensors:
        module = layers.without_number(tensor.name).rpartition(".")[0] or tensor.name
        name = ".".join(module.split(".")[-2:])
        counts[name] = counts.get(name, 0) + tensor.elements
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def as_html(checkpoint: Checkpoint) -> str:
    """A collapsible tree (``<details>``), with elements and bytes at every branch."""
    branches = _branch(checkpoint.path.name, _tree(checkpoint), open_to=3)
    return f"<div style='font-family: monospace'>{''.join(branches)}</div>"


def as_text(checkpoint: Checkpoint) -> str:
    """The same tree, indented."""
    return "\n".join(_lines(checkpoint.path.name, _tree(checkpoint), 0))


class Tree:
    """Notebook display of :func:`as_html`, with :func:`as_text` where there is no browser."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def _repr_html_(self) -> str:
        return as_html(self._checkpoint)

    def __repr__(self) -> str:
        return as_text(self._checkpoint)


def _tree(checkpoint: Checkpoint) -> dict:
    """Nested dictionaries; a leaf is the list of the tensors that have this name but for the
    layer's number."""
    top: dict = {}
    for tensor in checkpoint.tensors:
        *branches, leaf = layers.without_number(tensor.name).split(".", MAX_DEPTH)
        here = top
        for branch in branches:
            # The slash keeps a module apart from a tensor of the same name.
            here = here.setdefault(f"{branch}/", {})
        here.setdefault(leaf, []).append(tensor)
    return top


def _tensors(node: Mapping | list) -> list[Tensor]:
    if isinstance(node, list):
        return node
    return [tensor for child in node.values() for tensor in _tensors(child)]


def _label(name: str, node: Mapping | list) -> str:
    elements = sum(tensor.elements for tensor in _tensors(node))
    megabytes = sum(tensor.nbytes for tensor in _tensors(node)) / 1e6
    what = ""
    if isinstance(node, list):
        times = f"{len(node)} x " if len(node) > 1 else ""
        what = f"{times}{list(node[0].shape)} {node[0].dtype}, "
    return f"{terminal.one_line(name)}: {what}{elements:,} elements, {megabytes:,.1f} MB"


def _branch(name: str, node: Mapping | list, open_to: int) -> Iterator[str]:
    label = html.escape(_label(name, node))
    if isinstance(node, list):
        yield f"<div style='margin-left: 2.2em'>{label}</div>"
        return
    is_open = " open" if open_to > 0 else ""
    yield f"<details style='margin-left: 1em'{is_open}><summary>{label}</summary>"
    for child, below in node.items():
        yield from _branch(child, below, open_to - 1)
    yield "</details>"


def _lines(name: str, node: Mapping | list, depth: int) -> Iterator[str]:
    yield "  " * depth + _label(name, node)
    if not isinstance(node, list):
        for child, below in node.items():
            yield from _lines(child, below, depth + 1)
