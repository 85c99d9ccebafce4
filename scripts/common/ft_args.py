"""The arguments of `finetune.py`: TRL's SFTConfig and ModelConfig, and the data flags of `pretrain.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from transformers.utils import is_torch_bf16_gpu_available
from trl import ModelConfig, SFTConfig

from common.lm_args import AnyOptimizer, SourceArguments, check_source, flag, parse_flags
from common.usage import UsageError

ADAPTER_FLAGS = ("lora_", "use_", "load_in_", "bnb_")  # how TRL's names begin of what only matters with --use_peft


@dataclass
class FinetuneArguments(SourceArguments):
    """Which rows. Their format shows in their columns, see --help."""

    cache_dir: str | None = flag("Where the data and its tokens are cached.")


@dataclass
class TuningArguments(AnyOptimizer, SFTConfig):
    """SFTConfig with the fields of hf_cwd."""


def parse(argv: Sequence[str] | None, description: str) -> tuple[FinetuneArguments, ModelConfig, TuningArguments]:
    # TRL's default is true everywhere: on a CPU that trains slower, and in less precision than was asked for.
    defaults = {} if is_torch_bf16_gpu_available() else {"bf16": False}
    kinds = (FinetuneArguments, ModelConfig, TuningArguments)
    data, model, training = parse_flags(argv, kinds, description, **defaults)
    if model.model_name_or_path is None:
        raise UsageError("no model: give --model_name_or_path, a directory or Hub id")
    check_source(data)
    _check_adapter(model)
    template = training.chat_template_path or ""
    if template.endswith((".jinja", ".j2")) and not Path(template).is_file():
        raise UsageError(f"--chat_template_path {template}: no such file")
    return data, model, training


def _check_adapter(model: ModelConfig) -> None:
    if model.use_peft:
        if model.lora_r < 1:
            raise UsageError(f"--lora_r {model.lora_r}: the rank is a number from 1")
        if not 0 <= model.lora_dropout < 1:
            raise UsageError(f"--lora_dropout {model.lora_dropout}: give a number from 0 to less than 1")
        return
    names = [field.name for field in fields(ModelConfig) if field.name.startswith(ADAPTER_FLAGS)]
    changed = [f"--{name}" for name in names if getattr(model, name) != getattr(ModelConfig(), name)]
    if changed:
        raise UsageError(f"{' and '.join(changed)} given without --use_peft, which would train every weight: add it")
