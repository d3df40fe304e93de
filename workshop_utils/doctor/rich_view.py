"""A checkpoint in a notebook: a tree that folds, the shard map and a treemap, each with its finding in one line."""

from workshop_utils import plots
from workshop_utils.doctor.shard_map import shard_map
from workshop_utils.doctor.tree import Tree, by_module
from workshop_utils.formats.summary import Checkpoint


def show(checkpoint: Checkpoint) -> None:
    """Display all three of ``checkpoint`` (see :func:`workshop_utils.formats.identify.identify`) in the notebook that runs."""
    from IPython.display import display

    print(f"{checkpoint.format}: {len(checkpoint.tensors)} tensors, {checkpoint.nbytes / 1e6:,.0f} MB.")
    display(Tree(checkpoint))
    if not checkpoint.tensors:
        return
    plots.show(plots.plot_shards(checkpoint), alt=f"Shard map. {shard_map(checkpoint).finding}")
    largest = next(iter(by_module(checkpoint)))
    plots.show(plots.plot_parameters(checkpoint), alt=f"Treemap of the parameters; the largest tile is {largest}.")
