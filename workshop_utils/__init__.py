"""Helpers of the NeMo LoRA workshop. Importing this package loads neither torch nor NeMo."""

__version__ = "0.1.0"
