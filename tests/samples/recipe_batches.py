"""What NeMo makes of prepared rows, as JSON: ``recipe_batches.py PREPARED TOKENIZER SEQ_LENGTH
[PACKED_SIZE]``. Loads NeMo."""

import json
import sys
from types import SimpleNamespace


def main() -> None:
    prepared, tokenizer, length, *packed = sys.argv[1:]
    from nemo.collections.llm.gpt.data.packed_sequence import PackedSequenceSpecs

    from workshop_utils.core.errors import WorkshopError
    from workshop_utils.training.recipe.data_module import PreparedDataModule, load_tokenizer

    specs = PackedSequenceSpecs(packed_sequence_size=int(packed[0])) if packed else None
    module = PreparedDataModule(
        prepared,
        int(length),
        load_tokenizer(tokenizer),
        micro_batch_size=1 if packed else 2,
        global_batch_size=2,
        packed_sequence_specs=specs,
    )
    module.trainer = SimpleNamespace(max_steps=2, global_step=0)
    found = {
        "num_workers": module.num_workers,
        "pin_memory": module.pin_memory,
        "eos": module.tokenizer.eos_id,
    }
    module.prepare_data()
    try:
        module.setup("fit")
    except WorkshopError as error:
        found["refused"] = str(error)
        module.setup("validate")
    batches = list(module.val_dataloader())
    keep = ("tokens", "labels", "loss_mask", "cu_seqlens")
    found["batches"] = [
        {name: batch[name].tolist() for name in keep if name in batch} for batch in batches
    ]
    print("FOUND " + json.dumps(found))


if __name__ == "__main__":
    main()
