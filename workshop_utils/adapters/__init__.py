"""LoRA adapters: read, merged, exported, proven, and the rules of who takes them. Only merging
looks at the base model."""
