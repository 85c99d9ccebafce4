"""The rows that `finetune.py` trains on: which format they have, and that every one of them has it."""

from datasets import Dataset

from common.ft_args import FinetuneArguments
from common.lm_data import hold_out, load_rows
from common.usage import UsageError

# TRL knows the formats by these names; the first one that the data has is taken. Its ShareGPT (`conversations`) is left
# out: TRL keeps the roles `human` and `gpt`, which no model's chat template knows.
FORMATS = (("messages",), ("prompt", "completion"))
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # TRL hands them to the chat template


def load_parts(data: FinetuneArguments, *, text_field: str) -> tuple[Dataset, Dataset, bool]:
    """Training and held-out rows, and whether they are chats. Rows are held out where the data has no such part."""
    train, validation = load_rows(data, cache_dir=data.cache_dir, token=None)
    train, is_chat = select_format(train, text_field=text_field, source="the training data")
    if validation is None:
        return *hold_out(train, percentage=data.validation_split_percentage), is_chat
    validation, same = select_format(validation, text_field=text_field, source="the held-out data")
    if (validation.column_names[0], same) != (train.column_names[0], is_chat):
        columns = (" and ".join(part.column_names) for part in (validation, train))
        raise UsageError("the held-out data ({}) has another format than the training data ({})".format(*columns))
    return train, validation, is_chat


def select_format(rows: Dataset, *, text_field: str, source: str) -> tuple[Dataset, bool]:
    """The rows with the columns of their format only, and whether they are chats.

    Other columns go, because TRL mistakes a `prompt` beside `messages` for prompt and completion. Blank texts are
    dropped, as `pretrain.py` does. A `text_field` other than "text" was asked for, and comes before any other format.

    Raises:
        UsageError: no columns of a known format, or a row without the values of its format.
    """
    columns = _columns(rows.column_names, text_field, source)
    if columns == (text_field,):
        rows = rows.filter(lambda row: bool(str(row[text_field] or "").strip()), desc="Drop blank texts")
    if len(rows) == 0:
        raise UsageError(f"{source} has no rows")
    is_chat = columns != (text_field,) and not isinstance(rows[0][columns[0]], str)
    expected = "a list of messages with 'role' and 'content'" if is_chat else "a text"
    for number, row in enumerate(rows.select_columns(list(columns))):
        for column, value in row.items():
            if not (_is_messages(value) if is_chat else isinstance(value, str)):
                shown = str(value)[:80]
                raise UsageError(f"{source}, row {number}: {column!r} is {shown!r}, where {expected} belongs")
    extra = [name for name in TEMPLATE_COLUMNS if is_chat and name in rows.column_names]
    return rows.select_columns([*columns, *extra]), is_chat


def _columns(names: list[str], text_field: str, source: str) -> tuple[str, ...]:
    asked = text_field != "text"
    if asked and text_field not in names:
        raise UsageError(f"no column {text_field!r} in {source}; choose --dataset_text_field from: {', '.join(names)}")
    formats = ((text_field,), *FORMATS) if asked else (*FORMATS, (text_field,))
    for columns in formats:
        if set(columns) <= set(names):
            return columns
    known = "; ".join(" and ".join(columns) for columns in formats)
    raise UsageError(
        f"{source} has the columns {', '.join(names)}, which are those of no format ({known}): rename them, "
        "or name the column with the text by --dataset_text_field"
    )


def _is_messages(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and m.get("role") for m in value)
