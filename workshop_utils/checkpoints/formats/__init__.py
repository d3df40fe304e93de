"""Readers of the checkpoint formats of this world. None imports torch or NeMo, none runs anything
that a file contains."""
