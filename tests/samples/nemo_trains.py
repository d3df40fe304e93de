"""A few steps of full training (for its adapters see nemo2_trains.py), and a few greedy tokens, by
the NeMo 2.0 API on one checkpoint: ``nemo_trains.py CHECKPOINT FOLDER``.

FOLDER gets ``training.jsonl`` from the caller, and ``result.json``: the generated text of base, the
training loss, the step.
"""

import json
import sys
from pathlib import Path


def main(checkpoint: Path, folder: Path) -> None:
    import torch
    from megatron.core.inference.common_inference_params import CommonInferenceParams
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.llm.gpt.data import FineTuningDataModule
    from nemo.lightning import io

    def strategy(**settings):
        return nl.MegatronStrategy(process_group_backend="gloo", **settings)

    trainer = nl.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=1,
        strategy=strategy(setup_optimizers=False),
        logger=False,
        enable_checkpointing=False,
    )
    parameters = CommonInferenceParams(temperature=1.0, top_k=1, num_tokens_to_generate=4)
    texts = llm.generate(
        path=checkpoint,
        prompts=["number 1?"],
        trainer=trainer,
        inference_params=parameters,
        text_only=True,
        params_dtype=torch.float32,
        add_BOS=False,
    )

    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    model = io.load_context(checkpoint, subpath="model")
    data = FineTuningDataModule(
        folder,
        seq_length=64,
        tokenizer=model.tokenizer,
        micro_batch_size=2,
        global_batch_size=4,
        num_workers=0,
        memmap_workers=1,
        pin_memory=False,
        dataset_kwargs={"get_attention_mask_from_fusion": False},
    )
    trainer = nl.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=1,
        strategy=strategy(ckpt_async_save=False),
        max_steps=3,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    llm.finetune(
        model=model,
        data=data,
        trainer=trainer,
        optim=nl.MegatronOptimizerModule(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-3,
                bf16=False,
                use_distributed_optimizer=False,
                clip_grad=0.0,
            )
        ),
        log=nl.NeMoLogger(log_dir=str(folder / "log"), name="run", use_datetime_version=False),
        resume=nl.AutoResume(restore_config=nl.RestoreConfig(path=str(checkpoint))),
    )
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    result = {"texts": list(map(str, texts)), "step": trainer.global_step, "metrics": metrics}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    from workshop_utils.runtime import nemo_cpu

    nemo_cpu.apply()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
