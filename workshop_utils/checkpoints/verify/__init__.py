"""The checkpoint doctor: what is in a checkpoint, is it whole, is it safe, what can load it.
Nothing here imports torch or NeMo."""
