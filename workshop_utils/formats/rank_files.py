"""Which file of a NeMo 1 checkpoint was written by which model-parallel rank.

    model_weights.ckpt                          one rank
    mp_rank_01/model_weights.ckpt               rank 1 of tensor parallelism
    tp_rank_01_pp_rank_002/model_weights.ckpt   and stage 2 of pipeline parallelism, whose layers count from 0 again

Source: ``inject_model_parallel_rank`` in ``nemo/utils/model_utils.py`` (NeMo 2.4.1).
"""

import re
from collections.abc import Iterable

WEIGHTS = "model_weights.ckpt"
_RANK = re.compile(rf"(?:mp_rank_(\d+)|tp_rank_(\d+)_pp_rank_(\d+))/{re.escape(WEIGHTS)}")


def rank_files(names: Iterable[str]) -> dict[tuple[int, int], str]:
    """(tensor-parallel rank, pipeline stage) -> file, for those of ``names`` that hold weights; empty where none does."""
    found = {}
    for name in names:
        if name == WEIGHTS:
            found[0, 0] = name
        elif match := _RANK.fullmatch(name):
            found[int(match[1] or match[2]), int(match[3] or 0)] = name
    return found


def sizes(ranks: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(tensor-parallel size, pipeline-parallel size) that ``ranks`` come from."""
    ranks = list(ranks)
    return 1 + max(rank[0] for rank in ranks), 1 + max(rank[1] for rank in ranks)
