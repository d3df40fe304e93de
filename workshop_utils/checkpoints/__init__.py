"""Checkpoints as files: formats, verification, conversion, sources."""
