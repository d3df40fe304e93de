r"""Which data set, and how a row of it becomes a prompt and an answer: :class:`HFDatasetConfig`.

    HFDatasetConfig("data/my.csv", input_template="Q: {question}\nA:", output_template="{answer}",
    field_mapping={"question": "q"})

The fields have the names and defaults of the reference pipeline's class of that name; ``seed`` is
added.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from workshop_utils.core import checked
from workshop_utils.core.errors import DataError
from workshop_utils.training.recipe import row_conversion, row_templates
from workshop_utils.training.recipe.row_conversion import Converter

_INSTEAD = {"path": "dataset_name", "name": "dataset_config", "split": "split"}
_INSTEAD |= {"num_proc": "num_proc"} | dict.fromkeys(
    ("streaming", "trust_remote_code", "cache_dir", "keep_in_memory")
)
"""Arguments of ``datasets.load_dataset`` that ``load_kwargs`` may not hold, and the fields that
stand for them."""
_SHARE = {"limits": {"gt": 0, "lt": 1}}  # no split may be empty


@dataclass(frozen=True)
class HFDatasetConfig:
    """A data set and how its rows are used.

    ``dataset_name`` is a data set of the Hugging Face Hub (``dataset_config`` its configuration,
    ``load_kwargs={"revision": ...}`` its version), a file (.jsonl, .json, .csv, .tsv, .parquet,
    .arrow), a folder of such files, or one that ``save_to_disk`` wrote.

    ``split`` is divided: ``train_split_ratio`` of its rows for training, ``val_test_split_ratio``
    of the rest for test, the others for validation, drawn with ``seed``. Three names with slashes,
    ``train/validation/test``, take the data set's own splits as they are.

    A row becomes a prompt by ``input_template`` and an answer by ``output_template`` (see
    :mod:`.row_templates`; ``field_mapping`` gives a field of a template another column). Without
    templates the columns ``messages`` (rendered with the model's chat template) or ``input`` and
    ``output`` are used. ``custom_converter``, a function or ``FILE.py:name`` or ``module:name``,
    does it instead: from a row (a dict) to ``{"input", "output"}``, to ``{"messages": [...]}``, or
    to None for a row to leave out.

    Raises :class:`DataError` at once for whatever is wrong without looking at the data.
    """

    dataset_name: str
    dataset_config: str | None = None
    split: str = "train"
    train_split_ratio: float = field(default=0.9, metadata=_SHARE)
    val_test_split_ratio: float = field(default=0.5, metadata=_SHARE)
    input_template: str | None = None
    output_template: str | None = None
    field_mapping: dict[str, str] | str | None = None
    num_proc: int = field(default=8, metadata={"limits": {"ge": 1}})
    load_kwargs: dict[str, Any] = field(default_factory=dict)
    custom_converter: Converter | str | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        mapping = self.field_mapping
        if isinstance(mapping, str):  # as on the command line
            try:
                mapping = json.loads(mapping)
            except ValueError as error:
                raise DataError(
                    f"field_mapping is no JSON ({error}). Example: "
                    '\'{"question": "instruction"}\'.'
                ) from None
        object.__setattr__(self, "field_mapping", {} if mapping is None else mapping)
        checked.check(self, DataError)
        for name in sorted(self.load_kwargs.keys() & _INSTEAD):
            ours = _INSTEAD[name]
            instead = f"set {ours}" if ours else "it is chosen for you"
            raise DataError(f"load_kwargs: {name} is not taken here; {instead}.")
        self._check_templates()
        if "/" in self.split and len([part for part in self.split.split("/") if part]) != 3:
            raise DataError(
                f"split is {self.split!r}; give one split to divide, or three with slashes to "
                "take as they are: train/validation/test."
            )

    def _check_templates(self) -> None:
        if (self.input_template is None) != (self.output_template is None):
            missing = "output_template" if self.output_template is None else "input_template"
            raise DataError(f"{missing} is missing: give both templates, or neither.")
        if self.custom_converter and (self.input_template is not None or self.field_mapping):
            raise DataError(
                "custom_converter makes input and output itself: leave out input_template, "
                "output_template and field_mapping."
            )
        if isinstance(self.custom_converter, str):
            row_conversion.place_of_converter(self.custom_converter)
        if self.field_mapping and self.input_template is None:
            raise DataError(
                "field_mapping names the fields of templates: give input_template and "
                "output_template."
            )
        fields = {name for template in self.templates() or () for name in template.fields}
        if unknown := [name for name in self.field_mapping if name not in fields]:
            raise DataError(
                f"field_mapping: no template has a field {{{unknown[0]}}}; they have "
                f"{', '.join(f'{{{name}}}' for name in sorted(fields))}."
            )

    def templates(self) -> tuple[row_templates.RowTemplate, row_templates.RowTemplate] | None:
        """Both templates, parsed; None when there are none."""
        if self.input_template is None:
            return None
        names = ("input_template", "output_template")
        return tuple(row_templates.parse(getattr(self, name), name) for name in names)

    def own_splits(self) -> list[str] | None:
        """The names of the data set's own splits, where these are to be used; else None."""
        return self.split.split("/") if "/" in self.split else None

    def converter(self) -> Converter | None:
        """``custom_converter`` as a function. Raises :class:`DataError` when there is none of that
        name."""
        given = self.custom_converter
        return row_conversion.load_converter(given) if isinstance(given, str) else given

    def conversion(self, columns: list[str], tokenizer_dir: Any) -> row_conversion.Conversion:
        """What turns a row with these ``columns`` into prompt and answer."""
        rule = (self.templates(), self.field_mapping, self.converter(), str(self.custom_converter))
        return row_conversion.Conversion(self.dataset_name, columns, tokenizer_dir, *rule)

    def describe(self) -> dict[str, Any]:
        """Everything of it that shapes the rows, as JSON values: the configuration's part of the
        cache's key."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "num_proc"]
        shapes = {name: getattr(self, name) for name in names}
        return shapes | {"custom_converter": row_conversion.converter_hash(self.converter())}
