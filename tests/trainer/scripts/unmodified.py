"""A training script as people have them, after transformers' run_clm.py: it knows nothing of optimizer packages."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

BLOCK = 32


@dataclass
class DataArguments:
    model_name_or_path: str = field()
    train_file: str = field()
    validation_file: str = field()
    metric: str = field()


class Collator:
    """Defined in __main__: a spawned worker has to find it there."""

    def __call__(self, rows):
        ids = torch.tensor([row["input_ids"] for row in rows])
        in_worker = torch.utils.data.get_worker_info() is not None
        return {"input_ids": ids, "labels": ids, "in_worker": torch.tensor([in_worker])}


class CountingTrainer(Trainer):
    worker_batches = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.worker_batches += inputs.pop("in_worker").sum().item()
        return super().compute_loss(model, inputs, *args, **kwargs)


def main():
    data, arguments = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(data.model_name_or_path)

    def tokenize(rows):
        ids = [token for text in rows["text"] for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        return {"input_ids": [ids[i : i + BLOCK] for i in range(0, len(ids) - BLOCK, BLOCK)]}

    with arguments.main_process_first():
        files = {"train": data.train_file, "validation": data.validation_file}
        blocks = load_dataset("text", data_files=files).map(tokenize, batched=True, num_proc=2, remove_columns=["text"])
        metric = evaluate.load(data.metric, experiment_id=str(arguments.process_index), keep_in_memory=True)

    def compute_metrics(output):
        return metric.compute(
            predictions=output.predictions[:, :-1].reshape(-1), references=output.label_ids[:, 1:].reshape(-1)
        )

    if arguments.dataloader_num_workers:
        torch.multiprocessing.set_start_method("spawn", force=True)  # tqdm's lock has set the default
    trainer = CountingTrainer(
        AutoModelForCausalLM.from_pretrained(data.model_name_or_path),
        arguments,
        data_collator=Collator(),
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    trainer.train()
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # Accelerate wraps it, and DeepSpeed does
        optimizer = optimizer.optimizer
    report = {
        "optimizer": type(optimizer).__name__,
        "world_size": arguments.world_size,
        "argv": sys.argv,
        "path0": sys.path[0],
        "name": __name__,
        "file": __file__,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "accuracies": [log["eval_token_accuracy"] for log in trainer.state.log_history if "eval_loss" in log],
        "worker_batches": trainer.worker_batches,
    }
    Path(arguments.output_dir, f"report-{arguments.process_index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
