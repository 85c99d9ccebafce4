"""A training script as people have them: it knows transformers and nothing else."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed


@dataclass
class ModelArguments:
    hidden_size: int = field(default=32)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        row = (torch.arange(16) * (i + 1)) % 64
        return {"input_ids": row, "labels": row, "worker": torch.utils.data.get_worker_info() is not None}


class Collator:
    """Defined in __main__: a spawned worker has to find it there."""

    seen_in_workers = 0

    def __call__(self, rows):
        batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}
        return batch | {"position_ids": torch.full((len(rows), 16), int(rows[0]["worker"]))}


class CountingTrainer(Trainer):
    worker_batches = 0

    def training_step(self, model, inputs, *args):
        self.worker_batches += int(inputs.pop("position_ids").max())
        return super().training_step(model, inputs, *args)


def main():
    model_arguments, arguments = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=model_arguments.hidden_size,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    arguments.max_steps, arguments.logging_steps, arguments.learning_rate, arguments.weight_decay = 6, 2, 1e-2, 0.1
    arguments.report_to, arguments.remove_unused_columns, arguments.save_strategy = [], False, "no"
    arguments.dataloader_num_workers = 1
    arguments.dataloader_prefetch_factor = 2
    torch.multiprocessing.set_start_method("spawn")
    trainer = CountingTrainer(LlamaForCausalLM(config), arguments, train_dataset=Rows(), data_collator=Collator())
    trainer.train()
    report = {
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "argv": sys.argv,
        "path0": sys.path[0],
        "name": __name__,
        "file": __file__,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "worker_batches": trainer.worker_batches,
    }
    Path(arguments.output_dir, "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
