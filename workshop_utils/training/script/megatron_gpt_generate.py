"""The entry script for predictions by the script path: the rows of the test set, answered by NeMo's
model with or without an adapter, which is a ``.nemo`` or a Lightning checkpoint of its training.

It takes the same Hydra overrides as
``examples/nlp/language_modeling/tuning/megatron_gpt_generate.py`` of a NeMo clone, the web server
aside, and writes the same file: ``PREFIX_test_NAME_inputs_preds_labels.jsonl``, one ``{"input",
"pred", "label"}`` a line.
"""

import os

import torch.multiprocessing

from workshop_utils.runtime import nemo_cpu

nemo_cpu.apply()

from nemo.core.config import hydra_runner  # noqa: E402


@hydra_runner(config_path="conf", config_name="megatron_gpt_generate_config")
def main(cfg) -> None:
    """Build trainer and model from ``cfg``, load the adapter if there is one, and answer the test
    set."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
    from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP
    from omegaconf import OmegaConf

    OmegaConf.resolve(cfg)  # NeMo takes parts of it out of their place
    trainer = MegatronLMPPTrainerBuilder(cfg).create_trainer()
    peft, test = cfg.model.peft, cfg.model.data.test_ds
    adapter = peft.restore_from_path
    if adapter:
        model_cfg = MegatronGPTSFTModel.merge_inference_cfg(adapter, cfg)
    else:
        # merge_inference_cfg wants a fine-tuned model, which has a section `data`; a base has none.
        model_cfg = MegatronGPTSFTModel.merge_cfg_with(cfg.model.restore_from_path, cfg)
    inference = OmegaConf.to_container(cfg.inference) | {
        "add_BOS": test.add_bos,
        "tokens_to_generate": test.tokens_to_generate,
    }
    model = MegatronGPTSFTModel.restore_from(
        cfg.model.restore_from_path, model_cfg, trainer=trainer
    )
    if adapter:
        model.load_adapters(adapter)
    elif peft.restore_from_ckpt.checkpoint_dir:
        checkpoint = os.path.join(
            peft.restore_from_ckpt.checkpoint_dir, peft.restore_from_ckpt.checkpoint_name
        )
        model.load_adapters(checkpoint, PEFT_CONFIG_MAP[peft.peft_scheme](model_cfg))
    model.freeze()
    model.set_inference_config(inference)
    trainer.test(model)


if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn", force=True)
    main()
