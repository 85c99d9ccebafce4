"""Models and tokenizers: built, loaded, and known to fit each other."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig
from lm_args import LanguageModelArguments, ModelArguments, UsageError
from lm_data import train_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.distributed import DistributedConfig


def load_config(args: ModelArguments):
    """The configuration of the model to build, with the overrides in place."""
    name = args.config_name or args.model_name_or_path
    if name.endswith(".json") and not Path(name).is_file():
        raise UsageError(f"--config_name {name}: no such file")
    hub = {"cache_dir": args.cache_dir, "revision": args.model_revision, "token": args.token}
    config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code, **hub)
    if not args.config_overrides:
        return config
    changes = {}
    for item in args.config_overrides.split(","):
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals or not hasattr(config, key):
            raise UsageError(
                f"--config_overrides {item!r}: expected NAME=VALUE, NAME a field of {type(config).__name__}"
            )
        changes[key] = _typed(key, text, getattr(config, key))
    # Built anew from what is written in the file: fields derived from others (head_dim) must follow the changes.
    written, _ = type(config).get_config_dict(name, **hub)
    return type(config).from_dict({**written, **changes})


def _typed(key: str, text: str, current):
    if isinstance(current, str):
        return text
    try:
        value = json.loads(text.lower())
    except json.JSONDecodeError:
        value = text
    kind = (int, float) if type(current) is float else type(current)
    if current is not None and (not isinstance(value, kind) or isinstance(value, bool) != isinstance(current, bool)):
        raise UsageError(f"--config_overrides {key}={text}: expected a value like {current!r}")
    return value


def load_tokenizer(args: LanguageModelArguments, training: TrainingArguments, documents, text_column: str):
    hub = {"cache_dir": args.cache_dir, "token": args.token, "trust_remote_code": args.trust_remote_code}
    if args.train_tokenizer_vocab_size is None:
        own = args.model_name_or_path or args.config_name
        name = args.tokenizer_name or own
        if name.endswith(".json"):
            raise UsageError(f"{name} names no tokenizer: give --tokenizer_name or --train_tokenizer_vocab_size")
        return AutoTokenizer.from_pretrained(name, revision=args.model_revision if name == own else "main", **hub)
    folder = str(Path(training.output_dir) / "tokenizer")
    everywhere = training.save_on_each_node  # else the nodes share the directory, and only one process may write
    with training.main_process_first(local=everywhere, desc="train the tokenizer"):
        if (training.local_process_index if everywhere else training.process_index) == 0:
            tokenizer = train_tokenizer(documents, text_column=text_column, vocab_size=args.train_tokenizer_vocab_size)
            tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def load_model(args: ModelArguments, config, auto: Any = AutoModelForCausalLM, **pretrained: Any):
    """The model that `args` name, as one of the task of `auto`; `pretrained` is for its `from_pretrained` only.

    Under tensor parallelism (`accelerate launch --config_file configs/accelerate/tp.yaml`) it comes cut into parts.
    """
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    options = {"config": config, "dtype": dtype, "trust_remote_code": args.trust_remote_code}
    cut = _cut()
    if args.config_name is not None:
        model = auto.from_config(**options)
        if cut:  # only from_pretrained cuts; every process made the same weights, and keeps its part
            model = type(model).from_pretrained(
                None, config=model.config, dtype=model.dtype, state_dict=model.state_dict(), **cut
            )
        return model
    hub = {"cache_dir": args.cache_dir, "revision": args.model_revision, "token": args.token}
    return auto.from_pretrained(args.model_name_or_path, **options, **hub, **cut, **pretrained)


def _cut() -> dict[str, DistributedConfig]:
    """How Accelerate's configuration has transformers cut a model when it loads it: nothing without tensor parallelism.

    FSDP2 beside it is then transformers' as well. On its own, FSDP2 is Accelerate's, after the model is loaded.
    """
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false") != "true":
        return {}
    sizes = ParallelismConfig()  # from Accelerate's environment
    if not sizes.tp_enabled:
        return {}
    if sizes.dp_replicate_enabled:
        raise UsageError("tensor parallelism takes no dp_replicate_size: give dp_shard_size instead, or leave it out")
    return {"distributed_config": DistributedConfig(tp_size=sizes.tp_size, fsdp_size=sizes.dp_shard_size)}


def check_sizes(config, tokenizer, block_size: int | None) -> int:
    """The block size, once tokenizer and blocks are known to fit the model."""
    text_config = config.get_text_config()
    if len(tokenizer) > text_config.vocab_size:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only vocab_size {text_config.vocab_size}: "
            f"give --config_overrides vocab_size={len(tokenizer)} or another tokenizer"
        )
    positions = getattr(text_config, "max_position_embeddings", None)
    block_size = min(positions or 1024, 1024) if block_size is None else block_size
    if block_size < 2 or block_size > (positions or block_size):
        raise UsageError(
            f"--block_size {block_size}: give 2 to {positions or 'any'}, the model's positions; for more positions "
            f"give --config_overrides max_position_embeddings={block_size}"
        )
    return block_size
