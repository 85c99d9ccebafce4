"""Arguments: run_clm.py's names where they exist, and every flag of TrainingArguments; shared by the scripts."""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import OptimizerNames

from common.usage import TRACEBACK, OneLineErrors, UsageError, check_writable, told
from hf_cwd import CWDArgumentsMixin  # registers the cwd_* names, before a parser lists the choices of --optim
from hf_cwd.trainer.optim_names import chosen, names

# The least and the greatest value of flags that nothing else checks before the model is loaded.
COUNT, INDEX, SHARE, ANY = (1, None), (0, 2**32 - 1), (0, 1), (0, None)
LIMITS = {
    **dict.fromkeys(("max_train_samples", "max_eval_samples", "preprocessing_num_workers"), COUNT),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), COUNT),
    **dict.fromkeys(("block_size", "max_length"), (2, None)),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon"), ANY),
    **dict.fromkeys(("dataloader_num_workers", "neftune_noise_alpha"), ANY),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), SHARE),
    **dict.fromkeys(("seed", "data_seed"), INDEX),
}
POSITIVE = ("num_train_epochs", "logging_steps", "save_steps", "eval_steps")
NAMES = ("_name", "_file", "_dir", "_path")  # how flags end that an empty value is no value of


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


@dataclass(init=False)
class AnyOptimizer(CWDArgumentsMixin):
    """The fields of hf_cwd beside the Trainer's own default optimizer."""

    optim: OptimizerNames | str = field(
        default=TrainingArguments.default_optim, metadata={"help": "The optimizer: cwd_adamw, cwd_lion, cwd_muon ..."}
    )


@dataclass
class ScriptArguments(AnyOptimizer, TrainingArguments):
    """TrainingArguments with the fields of hf_cwd."""


class Flags(OneLineErrors, HfArgumentParser):
    """HfArgumentParser, whose errors are UsageErrors."""


def parse_flags(argv: Sequence[str] | None, kinds: tuple[type, ...], description: str, **defaults) -> list:
    """One instance of each dataclass; a .json or .yaml file may come first, and flags after it win over its values.

    Raises:
        UsageError: a flag that there is not, or a value that is none; of a mistake in the values together, the message
            is transformers', or hf_cwd's.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].lower().endswith((".json", ".yaml", ".yml")):
        argv = [*_flags_of_file(argv[0]), *argv[1:]]
    parser = Flags(kinds, description=description)
    parser.add_argument(TRACEBACK, action="store_true", help="Show the traceback of a mistake, not one line.")
    parser.set_defaults(**defaults)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(f"unknown arguments: {' '.join(unknown)}; see --help")
    check_values(vars(values))
    if values.cache_dir is not None:
        check_writable(values.cache_dir, "--cache_dir")
    with told("wrong flags"):
        parsed = [
            kind(**{f.name: getattr(values, f.name) for f in dataclasses.fields(kind) if f.init}) for kind in kinds
        ]
    check_training(parsed[-1])
    return parsed


def check_values(values: dict[str, Any]) -> None:
    """Refuses numbers that are none, or out of their limits, and texts that are not what they must be."""
    for name, value in values.items():
        if isinstance(value, str):
            _check_text(name, value)
        elif isinstance(value, int | float):
            _check_number(name, value)
    if values["max_steps"] < 1 and values["max_steps"] != -1:
        raise UsageError(f"--max_steps {values['max_steps']}: give 1 or more, or -1 to train for --num_train_epochs")


def _check_text(name: str, value: str) -> None:
    if name.endswith(NAMES) and name != "run_name" and not value.strip():
        raise UsageError(f"--{name} is empty: give a name, or leave it out")
    if value.startswith("{"):
        try:
            json.loads(value)
        except ValueError as error:
            raise UsageError(f"--{name} {value} is no JSON: {error}") from error


def _check_number(name: str, value: float) -> None:
    least, most = LIMITS.get(name, (None, None))
    if not math.isfinite(value):
        raise UsageError(f"--{name} {value}: give a finite number")
    if (least is not None and value < least) or (most is not None and value > most):
        raise UsageError(
            f"--{name} {value}: give {least} or more" if most is None else f"--{name} {value}: give {least} to {most}"
        )
    if name in POSITIVE and value <= 0:
        raise UsageError(f"--{name} {value}: give more than 0")


def check_training(training: TrainingArguments) -> None:
    """Refuses a directory that cannot be written, and flags that the optimizer cannot heed."""
    check_writable(training.output_dir)
    if chosen(training) in names():
        return
    parts = training.optim_args.split(",") if training.optim_args else []
    if any(part.count("=") != 1 for part in parts):
        raise UsageError(f"--optim_args {training.optim_args}: write key=value,key=value")
    if training.cwd_not_finite != "stop":
        raise UsageError(
            f"--cwd_not_finite {training.cwd_not_finite} has no effect on --optim {chosen(training)}, which is not of "
            f"hf_cwd: leave it out, or give one of {', '.join(names())}"
        )


def check_source(data: SourceArguments) -> None:
    if (data.dataset_name is None) == (data.train_file is None):
        raise UsageError("no data, or two: give exactly one of --dataset_name and --train_file")


def parse(
    argv: Sequence[str] | None, description: str
) -> tuple[LanguageModelArguments, DataArguments, TrainingArguments]:
    model, data, training = parse_flags(argv, (LanguageModelArguments, DataArguments, ScriptArguments), description)
    model.check()
    if model.tokenizer_name is not None and model.train_tokenizer_vocab_size is not None:
        raise UsageError("give only one of --tokenizer_name and --train_tokenizer_vocab_size")
    check_source(data)
    return model, data, training


def _flags_of_file(path: str) -> list[str]:
    """A file of arguments as flags, so that its values are read and checked as those of the command line."""
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file of arguments")
    with told(f"{path} cannot be read", "Give a mapping of argument names to values"):
        text = Path(path).read_text(encoding="utf-8-sig")
        values = yaml.safe_load(text)
        # As written, for YAML's types are not ours: `save_strategy: no` would be False, `learning_rate: 1e-3` a string.
        written = yaml.load(text, Loader=yaml.BaseLoader)
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected a mapping of argument names to values")
    flags = []
    for (key, plain), value in zip(written.items(), values.values(), strict=True):
        if isinstance(value, dict):
            flags += [f"--{key}", json.dumps(value)]
        elif value is not None:
            flags += [f"--{key}", *(plain if isinstance(value, list) else [plain])]
    return flags


def find_checkpoint(args: TrainingArguments) -> str | bool | None:
    """What --resume_from_checkpoint asks for: a directory, True for the newest one that is whole, or None."""
    wanted = str(args.resume_from_checkpoint)
    if wanted.lower() in ("false", "none", ""):
        return None
    if wanted.lower() == "true":
        if not os.path.isdir(args.output_dir) or get_last_checkpoint(args.output_dir) is None:
            raise UsageError(f"--resume_from_checkpoint true: there is no checkpoint in {args.output_dir}")
        return True
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise UsageError(
            f"--resume_from_checkpoint {wanted} is no checkpoint of the Trainer, such as OUTPUT_DIR/checkpoint-100"
        )
    return wanted
