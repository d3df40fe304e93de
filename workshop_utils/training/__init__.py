"""Fine-tuning: NeMo's script path, the NeMo 2.0 recipe path, what both share, and the way from the
one to the other."""
