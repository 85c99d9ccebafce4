"""Models and tokenizers: built, loaded, and known to fit each other."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.distributed import DistributedConfig

from common.lm_args import LanguageModelArguments, ModelArguments
from common.lm_data import train_tokenizer
from common.usage import UsageError, told, writing


def load_config(args: ModelArguments):
    """The configuration of the model to build, with the overrides in place."""
    name = args.config_name or args.model_name_or_path
    hub = {"cache_dir": args.cache_dir, "revision": args.model_revision, "token": args.token}
    flag = "--config_name" if args.config_name else "--model_name_or_path"
    config = read_config(name, flag, trust_remote_code=args.trust_remote_code, **hub)
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
    with told(f"--config_overrides {args.config_overrides}"):
        return type(config).from_dict({**written, **changes})


def read_config(name: str, flag: str, **options: Any):
    """A model's configuration, or the UsageError that says what `name`, the value of `flag`, is instead."""
    path = Path(name)
    if not path.exists() and (name.startswith((".", "/", "~")) or name.endswith(".json") or name.count("/") > 1):
        raise UsageError(f"{flag} {name}: no such file or directory")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(f"{flag} {name}: the directory has no config.json. Give a model's own directory")
    with told(f"{flag} {name} is no configuration", "Give a model's config.json, its directory or its Hub id"):
        return AutoConfig.from_pretrained(name, **options)


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
        return read_tokenizer(name, revision=args.model_revision if name == own else "main", **hub)
    folder = str(Path(training.output_dir) / "tokenizer")
    everywhere = training.save_on_each_node  # else the nodes share the directory, and only one process may write
    with training.main_process_first(local=everywhere, desc="train the tokenizer"):
        if (training.local_process_index if everywhere else training.process_index) == 0:
            tokenizer = train_tokenizer(documents, text_column=text_column, vocab_size=args.train_tokenizer_vocab_size)
            with writing(training.output_dir):
                tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def read_tokenizer(name: str, **options: Any):
    """A tokenizer, or the UsageError that says why there is none under this name."""
    with told(
        f"{name} has no tokenizer that can be read", "Give a directory or Hub id that has one, or mend its files"
    ):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes where the files are not there
        raise UsageError(f"{name} has no tokenizer: give a directory or Hub id that has one")
    return tokenizer


def load_model(args: ModelArguments, config, auto: Any = AutoModelForCausalLM, **pretrained: Any):
    """The model that `args` name, as one of the task of `auto`; `pretrained` is for its `from_pretrained` only.

    Under tensor parallelism (`accelerate launch --config_file configs/accelerate/tp.yaml`) it comes cut into parts.
    """
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    options = {"config": config, "dtype": dtype, "trust_remote_code": args.trust_remote_code}
    cut = _cut()
    if args.config_name is not None:
        with told(f"--config_name {args.config_name} makes no model of this kind"):
            model = auto.from_config(**options)
        if cut:  # only from_pretrained cuts; every process made the same weights, and keeps its part
            model = type(model).from_pretrained(
                None, config=model.config, dtype=model.dtype, state_dict=model.state_dict(), **cut
            )
        return model
    hub = {"cache_dir": args.cache_dir, "revision": args.model_revision, "token": args.token}
    return read_weights(auto.from_pretrained, args.model_name_or_path, **options, **hub, **cut, **pretrained)


def read_weights(
    from_pretrained: Callable, name: str, *, ignore_mismatched_sizes: bool = False, **options: Any
) -> nn.Module:
    """A model with its weights, once they are known to be its own; a head may be missing, and is then a new one.

    transformers makes new weights in the place of those that it does not find, and only warns.

    Args:
        ignore_mismatched_sizes: a head may be of another size, too.
    """
    with told(f"--model_name_or_path {name} has no weights that can be read", "Copy it again, or give another model"):
        model, found = from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    body, what = _body(model), f"--model_name_or_path {name} has not the weights of a {type(model).__name__}"
    fix = "Give a directory whose config.json and weights belong together"
    for key, saved, made in sorted(found["mismatched_keys"]):
        if key in body or not ignore_mismatched_sizes:
            raise UsageError(f"{what}: its {key} is {[*saved]}, and should be {[*made]}. {fix}")
    if new := sorted(body & {*found["missing_keys"]}):
        raise UsageError(f"{what}: of {len(body)} it lacks {len(new)}, such as {new[0]}. {fix}")
    return model


def _body(model: nn.Module) -> set[str]:
    """The names of the parameters that a model has beside its head."""
    prefix = f"{model.base_model_prefix}."
    if hasattr(model, model.base_model_prefix):
        return {name for name, _ in model.named_parameters() if name.startswith(prefix)}
    head = model.get_output_embeddings()
    outside = set() if head is None else {id(p) for p in head.parameters()}
    return {name for name, p in model.named_parameters() if id(p) not in outside}


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
    if not hasattr(text_config, "vocab_size"):
        raise UsageError(f"a {type(config).__name__} has no vocab_size: give the configuration of a language model")
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
