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


def rank_files(
    names: Iterable[str], pattern: re.Pattern = _NEMO, whole: str = WEIGHTS
) -> dict[tuple[int, int], str]:
    """(tensor-parallel rank, pipeline stage) -> which of ``names`` has NeMo 1's weights."""
    files = {}
    for name in names:
        if name == whole:
            files[0, 0] = name
        elif match := pattern.fullmatch(name):
            tensor, *stage = (int(number) for number in match.groups() if number)
            files[tensor, stage[0] if stage else 0] = name
    return files


def megatron_rank_files(names: Iterable[str]) -> dict[tuple[int, int], str]:
    """The same for Megatron-LM's old form."""
    return rank_files(names, _MEGATRON, "")


def sizes(ranks: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(tensor-parallel size, pipeline-parallel size) that ``ranks`` come from."""
    tensor, pipeline = zip(*ranks, strict=True)
    return 1 + max(tensor), 1 + max(pipeline)


def parts_note(ranks: int, sizes: tuple[int, int]) -> str:
    return (
        f"{ranks} model-parallel ranks (tensor-parallel size {sizes[0]}, pipeline-parallel size "
        f"{sizes[1]}) whose parts are not merged: shapes are those of the parts, and what every "
        "rank holds is listed and counted for each"
    )
