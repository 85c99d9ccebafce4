#!/usr/bin/env python
"""Fine-tune a causal language model, all of it or by LoRA, with TRL's SFTTrainer and any `--optim`.

    python scripts/finetune.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --train_file chats.jsonl \\
        --output_dir runs/chats --optim cwd_adamw --weight_decay 0.1 --use_peft --learning_rate 2e-4

It trains, then evaluates on the held-out rows and saves the model (with --use_peft, the adapter). Rows are chats
(`messages`), a `prompt` with its `completion`, on which alone the loss is taken, or a `text`. Every flag of TRL's
SFTConfig (TrainingArguments and its own) and ModelConfig works; a .json or .yaml file of flags may come first.
`perplexity` is exp(`eval_loss`), and that the mean over batches of the mean over their tokens.
"""

from collections.abc import Sequence

import transformers
from accelerate import DistributedType
from common.ft_args import parse
from common.ft_rows import load_parts
from common.lm_args import find_checkpoint
from common.lm_data import first
from common.lm_model import read_config, read_tokenizer, read_weights
from common.run_trainer import check_metric, count, run, seed, set_up_logging, trainer_class
from common.usage import UsageError, command, told
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config
from trl.trainer.utils import create_model_from_path

HELP = """Fine-tune a causal language model, all of it or by LoRA (--use_peft), with TRL's SFTTrainer and any --optim.
Rows are chats ('messages'), 'prompt' and 'completion' (texts or messages; the loss is on the completion), or 'text'; a
.json or .yaml file of flags may come first. Defaults are TRL's where they differ from the Trainer's: --learning_rate
2e-5 (LoRA usually wants ten times more), --max_length 1024 (what is longer is cut off), --gradient_checkpointing true
(less memory, about 20 percent slower), --logging_steps 10; but --bf16 is true only where the GPU has it."""


def load_tokenizer(model: ModelConfig, training: SFTConfig, *, is_chat: bool) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, once it is known to serve the rows."""
    name, remote = model.model_name_or_path, training.trust_remote_code
    config = read_config(name, "--model_name_or_path", revision=model.model_revision, trust_remote_code=remote)
    tokenizer = read_tokenizer(name, revision=model.model_revision, trust_remote_code=remote)
    if is_chat and tokenizer.chat_template is None and training.chat_template_path is None:
        raise UsageError(
            f"the rows are chats, and the tokenizer of {name} has no chat template: give --chat_template_path, "
            "a .jinja file or the directory or Hub id of a model that has one"
        )
    if tokenizer.eos_token is None and training.eos_token is None:
        raise UsageError(f"the tokenizer of {name} has no EOS token to end a row with: give --eos_token")
    if training.eos_token is not None and training.eos_token not in tokenizer.get_vocab():
        raise UsageError(f"--eos_token {training.eos_token}: the tokenizer of {name} has no such token")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or training.max_length
    if training.max_length is not None and training.max_length > positions:
        raise UsageError(f"--max_length {training.max_length}: the model has {positions} positions, give at most that")
    return tokenizer


def load_model(model: ModelConfig, training: SFTConfig) -> PreTrainedModel:
    """The model as SFTTrainer would load it by its name, once its weights are known to be there."""
    options = {"revision": model.model_revision, "dtype": model.dtype, "attn_implementation": model.attn_implementation}
    options |= {"trust_remote_code": training.trust_remote_code, **(training.model_init_kwargs or {})}
    if training.distributed_state.distributed_type in (DistributedType.MULTI_GPU, DistributedType.DEEPSPEED):
        options["device_map"] = None
    if (quantization := get_quantization_config(model)) is not None:
        options["quantization_config"] = quantization
    training.model_init_kwargs = None
    return read_weights(create_model_from_path, model.model_name_or_path, **options)


def main(argv: Sequence[str] | None = None, callbacks: Sequence[transformers.TrainerCallback] = ()) -> dict:
    """Train, evaluate and save; the metrics. UsageError, a ValueError, is raised for what the caller can mend."""
    data, model, training = parse(argv, HELP)
    check_metric(training, "loss")
    set_up_logging(training)
    checkpoint = find_checkpoint(training)
    with training.main_process_first(desc="load the rows"):
        train, validation, is_chat = load_parts(data, text_field=training.dataset_text_field)
    tokenizer = load_tokenizer(model, training, is_chat=is_chat)
    seed(training)
    weights = load_model(model, training)
    with told("the Trainer takes no such flags, or rows"):
        trainer = trainer_class(SFTTrainer, training)(
            model=weights,
            args=training,
            train_dataset=first(train, data.max_train_samples),
            eval_dataset=first(validation, data.max_eval_samples),
            processing_class=tokenizer,
            peft_config=get_peft_config(model),
            callbacks=list(callbacks),
        )
    for part, rows in (("training", trainer.train_dataset), ("held-out", trainer.eval_dataset)):
        if len(rows) == 0:
            raise UsageError(
                f"no {part} row has a completion within --max_length {training.max_length}: the prompts fill it"
            )
    sizes = {"train_samples": len(trainer.train_dataset), "eval_samples": len(trainer.eval_dataset)}
    sizes["trainable_parameters"] = count(trainer.model, trainable=True)
    return run(trainer, checkpoint, lambda metrics: sizes)


if __name__ == "__main__":
    command(main)
