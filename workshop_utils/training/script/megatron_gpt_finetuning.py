"""The entry script that torchrun starts: NeMo's parameter-efficient fine-tuning of a GPT-style
model, NeMo 1 style.

It takes the same Hydra overrides as
``examples/nlp/language_modeling/tuning/megatron_gpt_finetuning.py`` of a NeMo clone and composes
the same pieces of the library; that script can be used in its place (``NEMO_PATH``).
"""

import torch.multiprocessing

from workshop_utils.runtime import nemo_cpu

nemo_cpu.apply()

from nemo.core.config import hydra_runner  # noqa: E402


def train(cfg) -> None:
    """Build trainer, model and adapter from ``cfg`` and train. NeMo writes the ``.nemo`` when
    training ends."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
    from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP
    from nemo.utils.exp_manager import exp_manager

    trainer = MegatronLMPPTrainerBuilder(cfg).create_trainer()
    exp_manager(trainer, cfg.exp_manager)
    go_on_with_the_rows_that_are_left(trainer)
    model_cfg = MegatronGPTSFTModel.merge_cfg_with(cfg.model.restore_from_path, cfg)
    model = MegatronGPTSFTModel.restore_from(
        cfg.model.restore_from_path, model_cfg, trainer=trainer
    )
    scheme = PEFT_CONFIG_MAP[cfg.model.peft.peft_scheme]
    if cfg.model.peft.restore_from_path:
        model.load_adapters(cfg.model.peft.restore_from_path, scheme(model_cfg))
    elif scheme is not None:
        model.add_adapter(scheme(model_cfg))
    trainer.fit(model)


def go_on_with_the_rows_that_are_left(trainer) -> None:
    """Have a resumed run count as an uninterrupted one. NeMo's sampler deals out only the rows that
    the checkpoint has not seen; Lightning 2.4 counts the steps made before as part of that epoch,
    would end it early and begin the rows again, and wants a validation within it (``fit_loop.py``,
    ``training_epoch_loop.py``).
    """
    from lightning.pytorch import Callback

    class RowsLeft(Callback):
        """Nothing of the epoch has been fetched yet; validation goes by the steps since the first
        start."""

        begun = False

        def on_train_start(self, trainer, module):
            """The checkpoint's counts are in place now."""
            self.begun = True
            trainer.fit_loop.epoch_loop.batch_progress.current.reset()

        def on_fit_end(self, trainer, module):
            """Where the checkpoint is that of the last step, Lightning skips training and its end,
            in which NeMo writes the ``.nemo``."""
            if not self.begun:
                trainer.checkpoint_callback.on_train_end(trainer, module)

    trainer.callbacks.append(RowsLeft())
    if isinstance(trainer.val_check_interval, int):
        trainer.check_val_every_n_epoch = None


main = hydra_runner(config_path="conf", config_name="megatron_gpt_finetuning_config")(train)


if __name__ == "__main__":
    # Workers that index data files start fresh: a forked copy of a process that runs threads can
    # deadlock.
    torch.multiprocessing.set_start_method("spawn", force=True)
    main()
