"""NeMo's fine-tuning data module for what :mod:`.prepare_data` wrote, on GPUs and on a CPU. Imports
NeMo.

    data = PreparedDataModule("datasets/tickets", tokenizer=load_tokenizer(checkpoint))
    llm.finetune(model=model, data=data, tokenizer="data", ...)

The loss counts the answer and the stop token alone (NeMo's ``answer_only_loss``); rows that are too
long lose tokens of the prompt.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from workshop_utils.checkpoints.formats import nemo2
from workshop_utils.core import paths
from workshop_utils.core.errors import DataError, WorkshopError
from workshop_utils.runtime import nemo_cpu
from workshop_utils.training.recipe.prepare_data import load_prepared, require_whole_batch

nemo_cpu.apply()

from nemo.collections.llm.gpt.data import FineTuningDataModule  # after the patches  # noqa: E402

if TYPE_CHECKING:
    from nemo.collections.common.tokenizers import TokenizerSpec
    from nemo.collections.llm.gpt.data.packed_sequence import PackedSequenceSpecs


class PreparedDataModule(FineTuningDataModule):
    """``FineTuningDataModule`` with the settings that belong to the prepared rows of
    ``dataset_root``.

    What stands between prompt and answer comes from the preparation. Without a GPU rows are loaded
    in this process, without pinned memory. ``packed_sequence_specs`` packs the rows first, with the
    same settings; NeMo itself packs with its defaults. Lengths are in tokens, batch sizes in rows,
    of all ranks together for ``global_batch_size``.

    Raises:
        DataError: ``dataset_root`` holds no prepared rows, or they were changed since.
        WorkshopError: packed rows on a CPU, for training.
    """

    def __init__(
        self,
        dataset_root: Path | str,
        seq_length: int = 2048,
        tokenizer: "TokenizerSpec | None" = None,
        micro_batch_size: int = 4,
        global_batch_size: int = 8,
        seed: int = 1234,
        num_workers: int = 8,
        packed_sequence_specs: "PackedSequenceSpecs | None" = None,
        dataset_kwargs: dict[str, Any] | None = None,
    ):
        import torch

        self.on_cpu = not torch.cuda.is_available()
        self.prepared = load_prepared(dataset_root)
        settings = {"prompt_template": self.prepared.prompt_template}
        super().__init__(
            dataset_root,
            seq_length,
            tokenizer,
            micro_batch_size,
            global_batch_size,
            seed=seed,
            memmap_workers=1,
            num_workers=0 if self.on_cpu else num_workers,
            pin_memory=not self.on_cpu,
            persistent_workers=not self.on_cpu and num_workers > 0,
            packed_sequence_specs=packed_sequence_specs,
            dataset_kwargs=settings | (dataset_kwargs or {}),
        )

    @property
    def default_pack_path(self) -> Path:
        """Packed rows of this tokenizer, size and length; packing again with others leaves them
        alone."""
        tokenizer = self._extract_tokenizer_model_name()
        name = f"{tokenizer}-{self.packed_sequence_size}-{self.seq_length}"
        return Path(self.dataset_root) / "packed" / name.lstrip("-")

    def prepare_data(self) -> None:
        """Pack the rows where that is asked for: a whole directory or nothing. Lightning calls this
        in one process a machine."""
        if self.packed_sequence_size <= 0 or self.default_pack_path.is_dir():
            return
        from nemo.collections.llm.gpt.data.packed_sequence import prepare_packed_sequence_data

        with paths.new_directory(self.default_pack_path) as part:
            validation = (self.validation_path, self.validation_path_packed)
            for source, packed in ((self.train_path, self.train_path_packed), validation):
                # NeMo's own call leaves dataset_kwargs out, and so packs rows that are joined by
                # its default template.
                prepare_packed_sequence_data(
                    input_path=source,
                    output_path=part / packed.name,
                    output_metadata_path=part / self.pack_metadata.name,
                    packed_sequence_size=self.packed_sequence_size,
                    tokenizer=self.tokenizer,
                    max_seq_length=self.seq_length,
                    seed=self.seed,
                    dataset_kwargs=dict(self.dataset_kwargs),
                )

    def setup(self, stage: str) -> None:
        """As NeMo's; refuses what cannot be trained. Raises :class:`DataError` for fewer validation
        rows than a global batch."""
        if self.tokenizer is None:
            raise DataError("the data module has no tokenizer: give load_tokenizer(checkpoint).")
        if stage == "fit" and self.packed_sequence_size > 0 and self.on_cpu:
            raise WorkshopError(
                "packed_sequence: Megatron-Core's attention takes packed rows only with "
                "Transformer Engine, on a GPU. Leave it out on a CPU."
            )
        if stage == "fit" and self.packed_sequence_size <= 0:
            require_whole_batch(self.prepared, self.global_batch_size)
        super().setup(stage)


def load_tokenizer(checkpoint: Path | str) -> "TokenizerSpec":
    """The tokenizer of a NeMo 2.0 ``checkpoint`` (or of a Hugging Face directory), without running
    code of its own.

    Raises :class:`DataError` when it holds no Hugging Face tokenizer.
    """
    from nemo.collections.common.tokenizers import AutoTokenizer

    folder = Path(checkpoint)
    if nemo2.looks_like(folder):
        folder = folder / "context" / "nemo_tokenizer"
    if not (folder / "tokenizer_config.json").is_file():
        raise DataError(
            f"{paths.shown(folder)} holds no Hugging Face tokenizer (tokenizer_config.json is "
            "missing)."
        )
    return AutoTokenizer(str(folder.resolve()))
