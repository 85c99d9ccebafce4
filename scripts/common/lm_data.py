"""Data in, and blocks of tokens out for `pretrain.py`."""

from pathlib import Path

from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset, load_from_disk
from datasets.fingerprint import Hasher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.data_files import load_file
from common.lm_args import DataArguments, SourceArguments
from common.usage import UsageError, told

END_OF_TEXT = "<|endoftext|>"


def load_rows(args: SourceArguments, *, cache_dir: str | None, token: str | None) -> tuple[Dataset, Dataset | None]:
    """Training rows, and the held-out ones where the data or --validation_file has some."""
    if args.dataset_name is not None:
        train, validation = _load_named(args.dataset_name, args.dataset_config_name, cache_dir=cache_dir, token=token)
    else:
        train, validation = load_file(args.train_file, sample_by=args.sample_by, cache_dir=cache_dir), None
    if args.validation_file is not None:
        validation = load_file(args.validation_file, sample_by=args.sample_by, cache_dir=cache_dir)
    return train, validation


def load_documents(args: DataArguments, *, cache_dir: str | None, token: str | None) -> tuple[Dataset, Dataset]:
    """Training and held-out documents; where the data has no validation part, whole documents are held out."""
    train, validation = load_rows(args, cache_dir=cache_dir, token=token)
    _check_texts(train, args.text_column, args.dataset_name or args.train_file)
    if validation is not None:
        _check_texts(validation, args.text_column, args.validation_file or args.dataset_name)
    if validation is None:
        train, validation = hold_out(train, percentage=args.validation_split_percentage)
    return train, validation


def _check_texts(rows: Dataset, column: str, source: str) -> None:
    if column not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise UsageError(f"{source} has no column {column!r}; choose --text_column from: {columns}")
    if rows.features[column] not in (Value("string"), Value("large_string")):
        values = enumerate(rows[column])
        odd = next(
            (f"row {i} is {value!r}" for i, value in values if value is not None and type(value) is not str), None
        )
        raise UsageError(
            f"{source} has no texts in column {column!r} ({odd or 'it is empty'}): write them as texts, or choose "
            f"--text_column from: {', '.join(rows.column_names)}"
        )


def first(rows: Dataset, number: int | None) -> Dataset:
    """The first `number` rows, all of them where it is None."""
    return rows if number is None else rows.select(range(min(len(rows), number)))


def _load_named(name: str, config: str | None, *, cache_dir: str | None, token: str | None):
    saved = Path(name) / "dataset_dict.json", Path(name) / "dataset_info.json"
    if Path(name).is_file():
        raise UsageError(f"--dataset_name {name} is a file: give it by --train_file")
    with told(f"--dataset_name {name} cannot be read", "Give a directory with data files, or a Hub id"):
        if any(path.is_file() for path in saved):  # written by save_to_disk, which load_dataset does not read
            splits = load_from_disk(name)
            splits = DatasetDict(train=splits) if isinstance(splits, Dataset) else splits
        else:
            splits = load_dataset(name, config, cache_dir=cache_dir, token=token)
    if "train" not in splits:
        raise UsageError(f"--dataset_name {name} has no split 'train', only {', '.join(splits)}")
    return splits["train"], splits.get("validation")


def hold_out(documents: Dataset, *, percentage: int) -> tuple[Dataset, Dataset]:
    """Hold out document i of n iff floor((i + 1) p / 100) > floor(i p / 100).

    Even over the corpus: corpora come in order of time or topic, and a tail is not a sample of one.
    """
    if not 0 < percentage < 100:
        raise UsageError(f"--validation_split_percentage {percentage}: give a number from 1 to 99")
    held = [(i + 1) * percentage // 100 > i * percentage // 100 for i in range(len(documents))]
    if not any(held):
        raise UsageError(
            f"{percentage} % of {len(documents)} documents is no document to hold out: "
            "raise --validation_split_percentage or give --validation_file"
        )
    kept, out = ([i for i, h in enumerate(held) if h is want] for want in (False, True))
    return documents.select(kept), documents.select(out)


def train_tokenizer(documents: Dataset, *, text_column: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens; the same documents give the same tokenizer."""
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if vocab_size < smallest:
        raise UsageError(
            f"--train_tokenizer_vocab_size {vocab_size}: a byte-level BPE needs at least {smallest} tokens, "
            f"one for each byte and {END_OF_TEXT}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    batches = (batch[text_column] for batch in documents.select_columns([text_column]).iter(batch_size=100))
    texts = ([text for text in batch if text] for batch in batches)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


class Packer:
    """Tokenises a batch of documents, ends each with EOS and cuts the stream into blocks.

    What does not fill a block waits for the next batch, so only the end of a corpus (of each worker's part) is lost.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, text_column: str, block_size: int):
        self.tokenizer, self.text_column, self.block_size = tokenizer, text_column, block_size
        self.rest: list[int] = []

    def __call__(self, batch: dict) -> dict:
        texts = [text for text in batch[self.text_column] if text and not text.isspace()]
        # verbose=False: a document longer than the model's context is no news here.
        encoded = self.tokenizer(texts, verbose=False)["input_ids"] if texts else []
        eos, stream = self.tokenizer.eos_token_id, self.rest
        for ids in encoded:
            stream.extend(ids if ids[-1:] == [eos] else [*ids, eos])
        end = len(stream) // self.block_size * self.block_size
        self.rest = stream[end:]
        return {"input_ids": [stream[i : i + self.block_size] for i in range(0, end, self.block_size)]}


def pack(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments, *, block_size: int, part: str
) -> Dataset:
    """The documents as blocks of `block_size` tokens in column `input_ids`, cached on disk by `datasets`."""
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer {tokenizer.name_or_path!r} has no EOS token: set eos_token in its config")
    # datasets would hash the tokenizer object, which holds its path: name what decides the tokens instead.
    content = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer
    key = [documents._fingerprint, content, tokenizer.eos_token_id, args.text_column, block_size]
    key.append(args.preprocessing_num_workers)  # each worker drops what fills no block
    blocks = documents.map(
        Packer(tokenizer, text_column=args.text_column, block_size=block_size),
        batched=True,
        batch_size=100,
        num_proc=args.preprocessing_num_workers,
        remove_columns=documents.column_names,
        features=Features({"input_ids": List(Value("int32"))}),  # the first batch may hold no block to infer it from
        load_from_cache_file=not args.overwrite_cache,
        new_fingerprint=Hasher.hash(key),
        desc=f"Tokenise and pack the {part} documents",
    )
    if len(blocks) == 0:
        raise UsageError(
            f"the {part} documents hold fewer tokens than one block of {block_size}: lower --block_size or add data"
        )
    return blocks
