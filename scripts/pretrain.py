#!/usr/bin/env python
"""Pretrain a causal language model, or go on pretraining one, with the Hugging Face Trainer and any `--optim`.

From scratch, with a tokenizer trained on the documents:

    python scripts/pretrain.py --config_name configs/models/llama-1m.json --train_tokenizer_vocab_size 4096 \\
        --train_file scripts/corpus/sotu.jsonl.xz --output_dir runs/llama-1m \\
        --optim cwd_adamw --learning_rate 3e-3 --weight_decay 0.1 --max_steps 400

It always trains, then evaluates on the held-out documents and saves the model. Field names are those of transformers'
`run_clm.py`; every flag of TrainingArguments works; a .json or .yaml file of flags may come first.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from common.lm_args import find_checkpoint, parse
from common.lm_data import first, load_documents, pack
from common.lm_model import check_sizes, load_config, load_model, load_tokenizer
from common.run_trainer import check_metric, count, load_accuracy, run, seed, set_up_logging, trainer_class
from common.usage import command, told
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Blocks are full: no padding and no mask; the model shifts the labels itself."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def token_accuracy(training: TrainingArguments):
    """`compute_metrics` for argmax predictions: position t predicts token t + 1."""
    metric = load_accuracy(training)

    def compute(output) -> dict[str, float]:
        predictions, labels = output.predictions[:, :-1].reshape(-1), output.label_ids[:, 1:].reshape(-1)
        return metric.compute(predictions=predictions, references=labels)

    return compute


class FirstStep(TrainerCallback):
    """The step that training goes on from."""

    step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step = state.global_step


def trained_tokens(trainer: Trainer, first_step: int, block_size: int) -> int:
    """Tokens of the steps after `first_step`, over all ranks; an epoch's last batch may be a short one."""
    batch, rows = trainer.get_total_train_batch_size(trainer.args), len(trainer.train_dataset)
    micro = batch // trainer.args.gradient_accumulation_steps
    micro_steps = rows // micro if trainer.args.dataloader_drop_last else math.ceil(rows / micro)
    steps, rows = math.ceil(micro_steps / trainer.args.gradient_accumulation_steps), min(micro_steps * micro, rows)

    def seen(step: int) -> int:
        return step // steps * rows + min(step % steps * batch, rows)

    return (seen(trainer.state.global_step) - seen(first_step)) * block_size


def main(argv: Sequence[str] | None = None, callbacks: Sequence[transformers.TrainerCallback] = ()) -> dict:
    """Train, evaluate and save; the metrics. UsageError, a ValueError, is raised for what the caller can mend."""
    model_args, data_args, training = parse(argv, __doc__.splitlines()[0])
    check_metric(training, "loss", "token_accuracy")
    set_up_logging(training)
    checkpoint, start = find_checkpoint(training), FirstStep()
    config = load_config(model_args)
    with training.main_process_first(desc="load the documents"):
        documents = load_documents(data_args, cache_dir=model_args.cache_dir, token=model_args.token)
    tokenizer = load_tokenizer(model_args, training, documents[0], data_args.text_column)
    block_size = check_sizes(config, tokenizer, data_args.block_size)
    with training.main_process_first(desc="tokenise"):
        train, validation = (
            pack(part, tokenizer, data_args, block_size=block_size, part=name)
            for part, name in zip(documents, ("training", "held-out"), strict=True)
        )
    train, validation = first(train, data_args.max_train_samples), first(validation, data_args.max_eval_samples)

    seed(training)
    model = load_model(model_args, config)
    parameters = count(model)
    with told("the Trainer takes no such flags"):
        trainer = trainer_class(Trainer, training)(
            model=model,
            args=training,
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=collate,
            compute_metrics=token_accuracy(training),
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),  # which would not fit in memory
            callbacks=[start, *callbacks],
        )

    def more(metrics: dict[str, float]) -> dict[str, float]:
        tokens = trained_tokens(trainer, start.step, block_size)
        speed = {"train_tokens": tokens, "train_tokens_per_second": tokens / metrics["train_runtime"]}
        return {**speed, "num_parameters": parameters, "train_blocks": len(train), "eval_blocks": len(validation)}

    return run(trainer, checkpoint, more)


if __name__ == "__main__":
    command(main)
