"""States of torchao's optimizers, and pytorch_optimizer's Lookahead, with ours; prints what came of it as JSON.

    PYTHONPATH=WHERE_THEY_LIE TORCHDYNAMO_DISABLE=1 python -m tests.optim.foreign_runs FOLDER

A process of its own: where torchao is installed transformers imports it.
"""

import copy
import json
import logging
import sys
from pathlib import Path

import torch
import torchao.optim
from pytorch_optimizer import Lookahead
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_cwd import CWDAdamW, CWDLion
from tests.support.parity import gradients, parameter, step
from tests.support.tiny import tiny_data, tiny_llama

SHAPE, STEPS = (64, 80), 3  # torchao keeps less than 4096 elements as they are
KINDS = {"8 bits": torchao.optim.AdamW8bit, "4 bits": torchao.optim.AdamW4bit}


class Said(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def adopted(kind, folder):
    """How far the states that were taken, and a step from them, are from the numbers that torchao's stand for."""
    p = parameter(SHAPE, torch.float32)
    theirs = kind([p], lr=0.01)
    for g in gradients(SHAPE, torch.float32, steps=STEPS):
        step(theirs, g)
    torch.save(theirs.state_dict(), folder / "optimizer.pt")
    saved, numbers = (torch.load(folder / "optimizer.pt", weights_only=True) for _ in range(2))
    for state in numbers["state"].values():
        state |= {key: state[key].dequantize() for key in ("exp_avg", "exp_avg_sq")}
    results = []
    for state in (saved, numbers):
        own = nn.Parameter(p.detach().clone())
        optimizer = CWDAdamW([own], lr=0.5)
        optimizer.load_state_dict(state)
        step(optimizer, torch.ones(SHAPE))
        results.append((own.detach(), type(optimizer.state[own]["exp_avg"]).__name__))
    type_was = type(next(iter(saved["state"].values()))["exp_avg"]).__name__
    apart = (results[0][0] - results[1][0]).abs().max().item()
    return {"was": type_was, "is": results[0][1], "apart": apart, "moved": (results[0][0] - p).abs().max().item()}


def trained(folder):
    """A run of --optim adamw_torch_8bit that goes on with cwd_adamw: its losses."""
    for optim, resume in (("adamw_torch_8bit", None), ("cwd_adamw", str(folder / "checkpoint-3"))):
        args = TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            max_steps=6,
            save_steps=3,
            logging_steps=1,
            optim=optim,
            per_device_train_batch_size=4,
            report_to="none",
            disable_tqdm=True,
        )
        model = tiny_llama(hidden_size=64, intermediate_size=128)
        trainer = Trainer(model=model, args=args, train_dataset=tiny_data())
        trainer.train(resume_from_checkpoint=resume)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "steps": sorted({int(state["step"]) for state in trainer.optimizer.optimizer.state.values()}),
    }


def looked_ahead(kind, momentum, *, interrupted=False, **options):
    """Weights after some steps of an optimizer inside Lookahead; interrupted, another one goes on in between."""

    def begun(weights):
        p = nn.Parameter(weights.clone())
        return p, Lookahead(kind([p], lr=0.05, weight_decay=0.0, **options), k=2, pullback_momentum=momentum)

    torch.manual_seed(0)
    p, optimizer = begun(torch.randn(6, 8))
    for k, g in enumerate(gradients((6, 8), torch.float32, steps=7)):
        if interrupted and k == 3:
            saved = copy.deepcopy(optimizer.state_dict())
            p, optimizer = begun(p.detach())
            optimizer.load_state_dict(saved)
            assert optimizer.optimizer.state_dict()["state"].keys() == saved["base_optimizer"]["state"].keys()
        p.grad = g.clone()
        optimizer.step()
    return p.detach(), sorted(optimizer.optimizer.state[p])


def lookahead():
    found = {}
    for momentum in ("none", "reset", "pullback"):
        ours, keys = looked_ahead(CWDAdamW, momentum, cautious=False)
        theirs, their_keys = looked_ahead(torch.optim.AdamW, momentum)
        again, keys_again = looked_ahead(CWDAdamW, momentum, cautious=False, interrupted=True)
        lion, _ = looked_ahead(CWDLion, momentum)
        lion_again, _ = looked_ahead(CWDLion, momentum, interrupted=True)
        found[momentum] = {
            "apart": (ours - theirs).abs().max().item(),
            "apart after a break": (ours - again).abs().max().item(),
            "lion apart after a break": (lion - lion_again).abs().max().item(),
            "keys": [keys, their_keys, keys_again],
        }
    return found


def main():
    torch.set_num_threads(1)
    folder, said = Path(sys.argv[1]), Said()
    logging.getLogger("hf_cwd").addHandler(said)
    found = {
        "adopted": {name: adopted(kind, folder) for name, kind in KINDS.items()},
        "said": [line for line in said.lines if "numbers" in line],
        "trained": trained(folder / "run"),
        "lookahead": lookahead(),
    }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
