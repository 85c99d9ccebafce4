"""Documents, hold-out, tokenizer and packing."""

import gzip
import json
import lzma
from itertools import pairwise
from pathlib import Path

import pytest
from common import lm_data
from common.lm_args import DataArguments
from common.usage import UsageError
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"Document {i} begins.\n\nIt ends with {i * i}." for i in range(20)]


def load(tmp_path, **arguments):
    return lm_data.load_documents(DataArguments(**arguments), cache_dir=str(tmp_path / "cache"), token=None)


@pytest.mark.parametrize(("number", "percentage"), [(20, 5), (233, 5), (100, 1), (7, 50), (10, 99), (1000, 33)])
def test_hold_out_is_spread_evenly_and_loses_nothing(number, percentage):
    kept, out = lm_data.hold_out(Dataset.from_dict({"i": range(number)}), percentage=percentage)
    assert sorted([*kept["i"], *out["i"]]) == list(range(number))
    assert len(out) == number * percentage // 100
    expected = [i for i in range(number) if (i + 1) * percentage // 100 > i * percentage // 100]
    assert list(out["i"]) == expected
    gaps = [after - before for before, after in pairwise(expected)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def write(folder, kind):
    """The texts as one kind of input: the arguments that name it."""
    rows = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    path = folder / f"some data.{kind}"
    if kind in ("jsonl", "json"):
        path.write_text(rows)
    elif kind.endswith(".xz"):
        path.write_bytes(lzma.compress(rows.encode()))
    elif kind.endswith(".gz"):
        path.write_bytes(gzip.compress(rows.encode()))
    elif kind == "csv":
        Dataset.from_dict({"text": TEXTS}).to_csv(path)
    elif kind == "parquet":
        Dataset.from_dict({"text": TEXTS}).to_parquet(path)
    elif kind == "directory":
        (folder / "data").mkdir()
        (folder / "data/train.jsonl").write_text(rows)
        return {"dataset_name": str(folder / "data")}
    elif kind == "saved":
        Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "data")
        return {"dataset_name": str(folder / "data")}
    return {"train_file": str(path)}


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.xz", "jsonl.gz", "csv", "parquet", "directory", "saved"])
def test_kinds_of_input(tmp_path, kind):
    train, held_out = load(tmp_path, **write(tmp_path, kind))
    assert list(train["text"]) == TEXTS[:19]
    assert list(held_out["text"]) == TEXTS[19:]


def test_text_by_line_paragraph_and_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\nthree")
    for sample_by, expected in {"line": 4, "paragraph": 2, "document": 1}.items():
        train, _ = load(tmp_path, train_file=str(path), validation_file=str(path), sample_by=sample_by)
        assert len(train) == expected, sample_by


def test_validation_split_and_file_come_before_holding_out(tmp_path):
    parts = {"train": Dataset.from_dict({"text": TEXTS}), "validation": Dataset.from_dict({"text": ["held"]})}
    DatasetDict(parts).save_to_disk(tmp_path / "data")
    train, held_out = load(tmp_path, dataset_name=str(tmp_path / "data"))
    assert (len(train), list(held_out["text"])) == (20, ["held"])
    (tmp_path / "other.txt").write_text("from a file")
    _, held_out = load(tmp_path, dataset_name=str(tmp_path / "data"), validation_file=str(tmp_path / "other.txt"))
    assert list(held_out["text"]) == ["from a file"]


def test_dataset_without_a_train_split(tmp_path):
    DatasetDict(test=Dataset.from_dict({"text": TEXTS})).save_to_disk(tmp_path / "data")
    with pytest.raises(UsageError, match="no split 'train', only test"):
        load(tmp_path, dataset_name=str(tmp_path / "data"))


@pytest.fixture
def tokenizer():
    return lm_data.train_tokenizer(Dataset.from_dict({"text": TEXTS}), text_column="text", vocab_size=300)


def test_tokenizer_is_deterministic_and_loses_nothing(tokenizer, tmp_path):
    again = lm_data.train_tokenizer(Dataset.from_dict({"text": TEXTS}), text_column="text", vocab_size=300)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(tokenizer) == 300
    tokenizer.save_pretrained(tmp_path)
    text = "Ünseen  bytes \t\n and spaces "
    assert AutoTokenizer.from_pretrained(tmp_path).decode(tokenizer(text)["input_ids"]) == text


def pack(documents, tokenizer, **changes):
    arguments = DataArguments(**({"train_file": "x"} | changes))
    return lm_data.pack(documents, tokenizer, arguments, block_size=16, part="training")


def test_blocks_are_the_stream_of_documents_and_eos(tokenizer):
    texts = [*TEXTS, "", " \n", None, *TEXTS * 10]  # several batches of 100
    blocks = pack(Dataset.from_dict({"text": texts}), tokenizer)
    stream = [t for text in [*TEXTS, *TEXTS * 10] for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert [token for block in blocks["input_ids"] for token in block] == stream[: len(stream) // 16 * 16]
    assert {len(block) for block in blocks["input_ids"]} == {16}


def test_second_run_reads_the_cache(tokenizer, tmp_path, monkeypatch):
    """Also with the tokenizer loaded from another place, and only as long as nothing that matters changed."""
    arguments = write(tmp_path, "jsonl")
    first = pack(load(tmp_path, **arguments)[0], tokenizer)
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    calls = []
    original = lm_data.Packer.__call__
    monkeypatch.setattr(lm_data.Packer, "__call__", lambda self, batch: calls.append(1) or original(self, batch))
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "elsewhere")
    assert pack(load(tmp_path, **arguments)[0], reloaded).to_dict() == first.to_dict()
    assert not calls
    pack(load(tmp_path, **arguments)[0], reloaded, overwrite_cache=True)
    assert calls.pop()
    other = lm_data.train_tokenizer(Dataset.from_dict({"text": TEXTS}), text_column="text", vocab_size=290)
    pack(load(tmp_path, **arguments)[0], other)
    assert calls


def test_corpus_is_as_its_readme_says():
    with lzma.open(ROOT / "scripts/corpus/sotu.jsonl.xz", "rt", encoding="utf-8") as corpus:
        speeches = [json.loads(line) for line in corpus]
    readme = " ".join((ROOT / "scripts/corpus/README.md").read_text(encoding="utf-8").split())
    years = [speech["year"] for speech in speeches]
    assert all(speech.keys() == {"year", "president", "text"} for speech in speeches)
    assert years == sorted(years)
    facts = (
        f"{len(speeches)} addresses by {len({s['president'] for s in speeches})} presidents, {years[0]} to {years[-1]}"
    )
    assert facts in readme
    assert f"{sum(len(speech['text']) for speech in speeches):,} characters" in readme
