"""The zarr form of a distributed checkpoint, which Megatron-Core wrote before torch_dist: it is
named, and not read."""

from workshop_utils.core.errors import UnsupportedCheckpoint

WAY_OUT = (
    "zarr is deprecated, and cannot be read here: load and save the checkpoint once with NeMo 2.0 "
    "on Megatron-Core 0.13, the last that reads it, to turn it into torch_dist"
)


def unsupported(where: str) -> UnsupportedCheckpoint:
    """The error for the weights ``where``."""
    return UnsupportedCheckpoint(f"{where} is a directory of zarr: {WAY_OUT}.")
