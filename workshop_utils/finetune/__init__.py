"""LoRA fine-tuning by the script path: torchrun, NeMo's ``megatron_gpt_finetuning`` interface, live progress."""
