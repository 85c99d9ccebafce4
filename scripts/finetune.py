#!/usr/bin/env python
"""Fine-tune a causal language model, all of it or by LoRA, with TRL's SFTTrainer and any `--optim`.

    python scripts/finetune.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --train_file chats.jsonl \\
        --output_dir runs/chats --optim cwd_adamw --weight_decay 0.1 --use_peft --learning_rate 2e-4

It trains, then evaluates on the held-out rows and saves the model (with --use_peft, the adapter). Rows are chats
(`messages`), a `prompt` with its `completion`, on which alone the loss is taken, or a `text`. Every flag of TRL's
SFTConfig (TrainingArguments and its own) and ModelConfig works; a .json or .yaml file of flags may come first.
`perplexity` is exp(`eval_loss`), and that the mean over batches of the mean over their tokens.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import transformers
from ft_args import parse
from ft_rows import load_parts
from lm_args import UsageError, find_checkpoint
from lm_data import first
from run_trainer import count, run, set_up_logging
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

import hf_cwd  # noqa: F401  registers the cwd_* names, before the argument parser lists the choices of --optim

HELP = """Fine-tune a causal language model, all of it or by LoRA (--use_peft), with TRL's SFTTrainer and any --optim.
Rows are chats ('messages'), 'prompt' and 'completion' (texts or messages; the loss is on the completion), or 'text'; a
.json or .yaml file of flags may come first. Defaults are TRL's where they differ from the Trainer's: --learning_rate
2e-5 (LoRA usually wants ten times more), --max_length 1024 (what is longer is cut off), --gradient_checkpointing true
(less memory, about 20 percent slower), --logging_steps 10; but --bf16 is true only where the GPU has it."""


def load_tokenizer(model: ModelConfig, training: SFTConfig, *, is_chat: bool) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, once it is known to serve the rows."""
    name, remote = model.model_name_or_path, training.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(name, revision=model.model_revision, trust_remote_code=remote)
    if is_chat and tokenizer.chat_template is None and training.chat_template_path is None:
        raise UsageError(
            f"the rows are chats, and the tokenizer of {name} has no chat template: give --chat_template_path, "
            "a .jinja file or the directory or Hub id of a model that has one"
        )
    if tokenizer.eos_token is None and training.eos_token is None:
        raise UsageError(f"the tokenizer of {name} has no EOS token to end a row with: give --eos_token")
    config = AutoConfig.from_pretrained(name, revision=model.model_revision, trust_remote_code=remote)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or training.max_length
    if training.max_length > positions:
        raise UsageError(f"--max_length {training.max_length}: the model has {positions} positions, give at most that")
    return tokenizer


def main(argv: Sequence[str] | None = None, callbacks: Sequence[transformers.TrainerCallback] = ()) -> dict:
    """Train, evaluate and save; the metrics. UsageError, a ValueError, is raised for what the caller can mend."""
    data, model, training = parse(argv, HELP)
    set_up_logging(training)
    checkpoint = find_checkpoint(training)
    with training.main_process_first(desc="load the rows"):
        train, validation, is_chat = load_parts(data, text_field=training.dataset_text_field)
    tokenizer = load_tokenizer(model, training, is_chat=is_chat)
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=first(train, data.max_train_samples),
        eval_dataset=first(validation, data.max_eval_samples),
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
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
    try:
        main()
    except UsageError as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
