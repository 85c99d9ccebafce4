"""Trains a tiny fp64 Llama with every rule under the Trainer; each rank writes its weights to PREFIX-RANK."""

import os
import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_cwd.rules import RULES

GLOBAL_BATCH = 4


def loss_in_fp64(outputs, labels, num_items_in_batch=None):
    """transformers' own loss casts the logits to fp32, whose rounding depends on how the batch was split."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    assert logits.dtype == torch.float64
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def main():
    prefix, rank, world = sys.argv[1], int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    tokens = torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    result = {"weights": {}}
    for rule in RULES:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).double()
        result["start"] = {name: p.detach().clone() for name, p in model.named_parameters()}
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            optim=f"cwd_{rule}",
            use_cpu=True,
            ddp_backend="gloo" if world > 1 else None,
            max_steps=4,
            per_device_train_batch_size=GLOBAL_BATCH // world,
            learning_rate=1e-2,
            weight_decay=0.1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data, compute_loss_func=loss_in_fp64)
        trainer.train()
        result["world_size"] = arguments.world_size
        result["weights"][rule] = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.save(result, f"{prefix}-{rank}")


if __name__ == "__main__":
    main()
