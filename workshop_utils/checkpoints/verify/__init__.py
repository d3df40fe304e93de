"""Is a checkpoint whole, is it safe, what can load it? Nothing here imports torch or NeMo."""
