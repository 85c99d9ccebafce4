"""Files of text and rows: whether one is what its name says, and what is wrong with one that cannot be read."""

import bz2
import codecs
import glob
import gzip
import importlib
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import datasets
import pyarrow.parquet
from datasets import Dataset, concatenate_datasets, load_dataset

from common.usage import UsageError, reason, told, writing

LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ\x00", ".bz2": b"BZh", ".zst": b"\x28\xb5\x2f\xfd"}
# Of encodings other than UTF-8, which `datasets` reads; the longer ones first.
MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
HEAD = 1 << 16  # bytes that are looked at before a file is read


def load_file(path: str, *, sample_by: str, cache_dir: str | None) -> Dataset:
    """One text, JSON(L), CSV or Parquet file, compressed or not, as a dataset with one row a document.

    Raises:
        UsageError: it is not there, not what its name says, or cannot be read; the message says which part of it.
    """
    suffix = _kind(path)
    options = {"sample_by": sample_by} if LOADERS[suffix] == "text" else {}
    if suffix == ".parquet":
        with told(f"{path} is no Parquet file, or is cut off", "Make it again"):
            pyarrow.parquet.read_schema(path)
    else:
        _check_head(path)
    # A name may have glob characters in it.
    options |= {"data_files": glob.escape(str(Path(path).absolute())), "cache_dir": cache_dir}
    try:
        with writing(cache_dir or datasets.config.HF_DATASETS_CACHE, "--cache_dir"):
            rows = load_dataset(LOADERS[suffix], split="train", **options)
        for column in rows.data.columns:
            column.validate(full=True)  # JSON and Parquet are read without a look at whether texts are UTF-8
    except UsageError:
        raise
    except Exception as error:  # pyarrow's, pandas', fsspec's and those of `datasets`, which documents none of them
        fault = _fault(path, suffix) or f"{reason(error).rstrip('.')}. Mend the file"
        raise UsageError(f"{path} cannot be read: {fault}") from error
    return _without_mark(rows) if suffix == ".txt" else rows


def _without_mark(rows: Dataset) -> Dataset:
    """Texts without the byte order mark, which the readers of JSON and CSV leave out themselves."""
    first = rows[0]["text"]
    if not first.startswith("\ufeff"):
        return rows
    first = Dataset.from_dict({"text": [first.removeprefix("\ufeff")]}, features=rows.features)
    return concatenate_datasets([first, rows.select(range(1, len(rows)))])


def _kind(path: str) -> str:
    """The suffix that says how a file is read."""
    if Path(path).is_dir():
        raise UsageError(f"{path} is a directory: give it by --dataset_name, or name a file in it")
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file; --train_file and --validation_file take the path of a file")
    if "::" in str(Path(path).absolute()):
        raise UsageError(f"{path}: '::' in a path stands between file systems for `datasets`; rename it")
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    suffix = next((s for s in reversed(suffixes) if s not in COMPRESSED), "")
    if suffix not in LOADERS:
        raise UsageError(f"{path}: unknown kind of file {suffix!r}; use one of {', '.join(LOADERS)}")
    return suffix


def _opened(path: str) -> BinaryIO:
    """What is in a file, uncompressed, as `datasets` does it: by its first bytes, whatever its name."""
    with open(path, "rb") as file:
        start = file.read(6)
    kind = next((suffix for suffix, magic in COMPRESSED.items() if start.startswith(magic)), None)
    named = Path(path).suffix.lower()
    if start and named in COMPRESSED and kind != named:
        raise UsageError(f"{path} is named {named}, and is not compressed so: rename it, or compress it anew")
    if kind == ".zst":
        try:
            return importlib.import_module("zstandard").open(path, "rb")
        except ImportError:
            raise UsageError(f"{path} is compressed by Zstandard: pip install zstandard, or uncompress it") from None
    return {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, None: open}[kind](path, "rb")


def _check_head(path: str) -> None:
    """Refuses what the first bytes show to be no text in UTF-8."""
    with told(f"{path} cannot be read", "Copy or make it again"), _opened(path) as file:
        head = file.read(HEAD)
    if not head.removeprefix(codecs.BOM_UTF8).strip():
        raise UsageError(f"{path} is empty: give a file with text in it")
    found = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    if found is None and b"\0" in head:
        # Latin letters in UTF-16: every second byte is zero, and hardly one of the others.
        fewer, more = sorted((head[::2].count(0), head[1::2].count(0)))
        found = "UTF-16" if more > 0.4 * len(head) and fewer < 0.05 * len(head) else "binary"
    if found == "binary":
        raise UsageError(f"{path} is binary, and no text: give one of {', '.join(LOADERS)}, which hold text")
    if found is not None:
        raise UsageError(f"{path} is {found}, and must be UTF-8: iconv -f {found} -t UTF-8 converts it")


def _fault(path: str, suffix: str) -> str | None:
    """What is wrong, found by reading the file once more; None where that is not found so."""
    if suffix == ".parquet":
        return None
    try:
        with _opened(path) as file:
            filled = sum(not line.isspace() for line in _lines(file))
        if suffix == ".csv" and filled == 1:
            return "it has a header and no rows. Give a file with rows"
        return next(_faulty_rows(path), None) if LOADERS[suffix] == "json" else None
    except UsageError as found:
        return str(found)
    except Exception as found:  # each format has errors of its own
        return f"it is cut off or damaged ({reason(found)}). Copy or make it again"


def _lines(file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise UsageError(
                f"line {number} is no UTF-8 (byte 0x{line[error.start]:02x}). If it is Latin-1, "
                "iconv -f LATIN1 -t UTF-8 converts it"
            ) from error


def _faulty_rows(path: str) -> Iterator[str]:
    """What is wrong with the rows of a JSON file."""
    with _opened(path) as file:
        start = file.read(HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(0)
        if start.startswith(b"["):
            rows = iter([("it", file.read())])
        else:
            rows = ((f"line {number}", line) for number, line in enumerate(file, 1))
        for where, text in rows:
            try:
                row = json.loads(text.decode("utf-8-sig")) if text.strip() else {}
            except json.JSONDecodeError as error:
                yield f"{where} is no JSON ({error.msg}, column {error.colno}). Mend or remove it"
            else:
                if not isinstance(row, dict | list):
                    yield f"{where} is {json.dumps(row)[:40]}, where a JSON object belongs. Mend or remove it"
