"""Which file of a checkpoint was written by which model-parallel rank.

    model_weights.ckpt                          one rank
    mp_rank_01/model_weights.ckpt               rank 1 of tensor parallelism
    tp_rank_01_pp_rank_002/model_weights.ckpt   and stage 2 of pipeline parallelism, whose layers
    count from 0 again
    mp_rank_01_002/model_optim_rng.pt           the same in Megatron-LM's old form, which may name
    an expert-parallel rank after it

Source: ``inject_model_parallel_rank`` in ``nemo/utils/model_utils.py`` (NeMo 2.4.1) and
``get_checkpoint_name`` in ``megatron/training/checkpointing.py`` (Megatron-LM core_r0.13).
"""

import re
from collections.abc import Iterable

WEIGHTS = "model_weights.ckpt"
MEGATRON_STATE = "model_optim_rng.pt"
_NEMO = re.compile(rf"(?:mp_rank_(\d+)|tp_rank_(\d+)_pp_rank_(\d+))/{re.escape(WEIGHTS)}")
_MEGATRON = re.compile(rf"mp_rank_(\d+)(?:_(\d+))?(?:_\d+)?/{re.escape(MEGATRON_STATE)}")


def rank_files(names: Iterable[str]) -> dict[tuple[int, int], str]:
    """(tensor-parallel rank, pipeline stage) -> file, for those of ``names`` that hold NeMo 1's
    weights; empty where none does."""
    names = list(names)
    found = _found(_NEMO, names)
    return {(0, 0): WEIGHTS} | found if WEIGHTS in names else found


def megatron_rank_files(names: Iterable[str]) -> dict[tuple[int, int], str]:
    """The same for Megatron-LM's old form."""
    return _found(_MEGATRON, names)


def _found(pattern: re.Pattern, names: Iterable[str]) -> dict[tuple[int, int], str]:
    found = {}
    for name in names:
        if match := pattern.fullmatch(name):
            tensor, *stage = (int(number) for number in match.groups() if number)
            found[tensor, stage[0] if stage else 0] = name
    return found


def sizes(ranks: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(tensor-parallel size, pipeline-parallel size) that ``ranks`` come from."""
    ranks = list(ranks)
    return 1 + max(rank[0] for rank in ranks), 1 + max(rank[1] for rank in ranks)
