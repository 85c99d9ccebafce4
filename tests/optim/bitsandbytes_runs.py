"""Runs of bitsandbytes' optimizers, and what ours make of them; prints it as JSON.

    PYTHONPATH=WHERE_IT_LIES python -m tests.optim.bitsandbytes_runs FOLDER

A process of its own: where bitsandbytes is installed transformers imports it everywhere.
"""

import copy
import functools
import json
import sys
from pathlib import Path

import bitsandbytes.optim
import torch
from transformers import Trainer, TrainingArguments

from hf_cwd import CWDAdamW, CWDLion
from tests.support.parity import gradients, parameter, step
from tests.support.tiny import tiny_data, tiny_llama

SHAPE, STEPS = (64, 80), 5  # bitsandbytes keeps less than 4096 elements in 32 bits
PAIRS = {
    "lion": (functools.partial(bitsandbytes.optim.Lion32bit, betas=(0.9, 0.99)), CWDLion),
    "adamw": (functools.partial(bitsandbytes.optim.AdamW32bit, betas=(0.9, 0.95), eps=1e-6), CWDAdamW),
}
IN_8_BITS = {"lion": bitsandbytes.optim.Lion8bit, "adamw": bitsandbytes.optim.AdamW8bit}


def begun(kind):
    p = parameter(SHAPE, torch.float32)
    optimizer = kind([p], lr=0.01, weight_decay=0.1)
    for g in gradients(SHAPE, torch.float32, steps=STEPS):
        step(optimizer, g)
    return optimizer, p


def continued(theirs_class, own_class):
    """How far the two move in some more steps, and apart; the hyper-parameters given here are wrong on purpose."""
    theirs_optimizer, theirs = begun(theirs_class)
    start, ours = theirs.detach().clone(), torch.nn.Parameter(theirs.detach().clone())
    optimizer = own_class([ours], lr=0.5, weight_decay=0.7, cautious=False)
    optimizer.load_state_dict(copy.deepcopy(theirs_optimizer.state_dict()))
    for g in gradients(SHAPE, torch.float32, steps=STEPS):
        step(optimizer, g)
        step(theirs_optimizer, g)
    return {
        "moved": (theirs - start).abs().min().item(),
        "apart": (ours - theirs).abs().max().item(),
        "largest": ours.abs().max().item(),
        "steps": int(optimizer.state[ours]["step"]),
    }


def refusal(theirs_class, own_class):
    optimizer, p = begun(theirs_class)
    try:
        own_class([p]).load_state_dict(optimizer.state_dict())
    except ValueError as error:
        return str(error)
    return "none"


def train(folder, optim, optim_args=None, resume=None):
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        optim=optim,
        optim_args=optim_args,
        learning_rate=1e-2,
        weight_decay=0.1,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=tiny_data())
    trainer.train(resume_from_checkpoint=resume)
    states = trainer.optimizer.optimizer.state
    params = list(trainer.model.parameters())
    momenta = [states[p]["exp_avg" if "exp_avg" in states[p] else "state1"] for p in params]
    return [torch.cat([x.detach().flatten() for x in some]) for some in (params, momenta)]


def trained(folder):
    """By the Trainer: apart at the end, in weights and momenta, where the second half is ours; and if it is not."""
    whole = train(folder / "whole", "lion_32bit")
    same = "cautious=false,betas=0.9:0.999"  # the Trainer gives bitsandbytes Adam's betas
    resumed = train(folder / "resumed", "cwd_lion", same, str(folder / "whole" / "checkpoint-3"))
    cautious = train(folder / "cautious", "cwd_lion", None, str(folder / "whole" / "checkpoint-3"))
    apart = [(x - y).abs().max().item() for x, y in zip(whole, resumed, strict=True)]
    return {"apart": apart, "apart if cautious": (whole[0] - cautious[0]).abs().max().item()}


def main():
    torch.set_num_threads(1)
    found = {
        "continued": {rule: continued(*pair) for rule, pair in PAIRS.items()},
        "refused": {rule: refusal(kind, PAIRS[rule][1]) for rule, kind in IN_8_BITS.items()},
        "trained": trained(Path(sys.argv[1])),
    }
    (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
