"""Arguments: run_clm.py's names where they exist, and every flag of TrainingArguments; shared by the scripts."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


class UsageError(ValueError):
    """A mistake of the caller's; the message names the value and the fix."""


def flag(help_text: str, default=None, **metadata):
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass
class HubArguments:
    """How a model is loaded."""

    dtype: str = flag(
        "Type of the weights; mixed precision (--bf16) wants float32 here.",
        "float32",
        choices=["auto", "bfloat16", "float16", "float32"],
    )
    cache_dir: str | None = flag("Where downloads and prepared data are kept.")
    model_revision: str = flag("Branch, tag or commit of the model.", "main")
    token: str | None = flag("Hub token; by default the one of `hf auth login`.")
    trust_remote_code: bool = flag("Run code that comes with the model.", False)


@dataclass
class ModelArguments(HubArguments):
    """Which model: its weights, or a new one."""

    model_name_or_path: str | None = flag("Go on from these weights: a directory or Hub id.")
    config_name: str | None = flag("Start from scratch: a JSON file, a directory or a Hub id.")
    config_overrides: str | None = flag("Changes to --config_name, e.g. hidden_size=64,num_hidden_layers=2.")

    def check(self) -> None:
        if (self.config_name is None) == (self.model_name_or_path is None):
            raise UsageError("give exactly one of --config_name (from scratch) and --model_name_or_path (its weights)")
        if self.config_overrides and self.config_name is None:
            raise UsageError("--config_overrides changes a --config_name; the shape of --model_name_or_path is fixed")


@dataclass
class LanguageModelArguments(ModelArguments):
    """Which model and tokenizer."""

    tokenizer_name: str | None = flag("A directory or Hub id; the model's own by default.")
    train_tokenizer_vocab_size: int | None = flag("Train a byte-level BPE of this size on the training documents.")


@dataclass
class SourceArguments:
    """Which data."""

    dataset_name: str | None = flag("A Hub id or a local directory.")
    dataset_config_name: str | None = flag("The configuration of --dataset_name.")
    train_file: str | None = flag("A txt, json(l), csv or parquet file; .xz, .gz, .bz2 and .zst are read as they are.")
    validation_file: str | None = flag("Held-out data; by default whole documents (rows) of the training data.")
    sample_by: str = flag("What one document is in a txt file.", "line", choices=["line", "paragraph", "document"])
    validation_split_percentage: int = flag("Share of the documents (rows) to hold out.", 5)
    max_train_samples: int | None = flag("Use only the first so many training blocks (rows).")
    max_eval_samples: int | None = flag("Use only the first so many held-out blocks (rows).")


@dataclass
class DataArguments(SourceArguments):
    """Which documents, and how they become blocks."""

    text_column: str = flag("The column that holds the text.", "text")
    block_size: int | None = flag("Tokens in a block; by default the model's positions, at most 1024.")
    preprocessing_num_workers: int | None = flag("Processes that tokenise.")
    overwrite_cache: bool = flag("Tokenise again even where a cached result exists.", False)


def parse_flags(argv: Sequence[str] | None, kinds: tuple[type, ...], description: str, **defaults) -> list:
    """One instance of each dataclass; a .json or .yaml file may come first, and flags after it win over its values."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        argv = [*_flags_of_file(argv[0]), *argv[1:]]
    parser = HfArgumentParser(kinds, description=description)
    parser.set_defaults(**defaults)
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
    if unknown:
        raise UsageError(f"unknown arguments: {' '.join(unknown)}; see --help")
    return parsed


def check_source(data: SourceArguments) -> None:
    if (data.dataset_name is None) == (data.train_file is None):
        raise UsageError("no data, or two: give exactly one of --dataset_name and --train_file")


def parse(
    argv: Sequence[str] | None, description: str
) -> tuple[LanguageModelArguments, DataArguments, TrainingArguments]:
    model, data, training = parse_flags(argv, (LanguageModelArguments, DataArguments, TrainingArguments), description)
    model.check()
    if model.tokenizer_name and model.train_tokenizer_vocab_size:
        raise UsageError("give only one of --tokenizer_name and --train_tokenizer_vocab_size")
    check_source(data)
    return model, data, training


def _flags_of_file(path: str) -> list[str]:
    """A file of arguments as flags, so that its values are read and checked as those of the command line."""
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file of arguments")
    text = Path(path).read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected a mapping of argument names to values")
    # As written, for YAML's types are not ours: `save_strategy: no` would be False, `learning_rate: 1e-3` a string.
    written = yaml.load(text, Loader=yaml.BaseLoader)
    flags = []
    for (key, plain), value in zip(written.items(), values.values(), strict=True):
        if isinstance(value, dict):
            flags += [f"--{key}", json.dumps(value)]
        elif value is not None:
            flags += [f"--{key}", *(plain if isinstance(value, list) else [plain])]
    return flags


def find_checkpoint(args: TrainingArguments) -> str | None:
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "none", ""):
        return None
    found = wanted
    if str(wanted).lower() == "true":
        found = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
        if found is None:
            raise UsageError(f"--resume_from_checkpoint true: there is no checkpoint in {args.output_dir}")
    if not (Path(found) / "trainer_state.json").is_file():
        raise UsageError(f"--resume_from_checkpoint {wanted}: {found} is no checkpoint of the Trainer")
    return found
