"""Ranks of which the last has a bad batch in step 2; each writes to FOLDER/RANK.pt what became of it.

    torchrun --nproc_per_node 2 -m tests.trainer.guard_ranks FOLDER
    torchrun --nproc_per_node 1 -m tests.trainer.guard_ranks FOLDER deepspeed

The last case of the first is not caught: it ends both ranks.
"""

import os
import sys
from pathlib import Path

import torch
from dev import cpu_ranks
from dev.forked_runs import clean_state

from hf_cwd import CWDTrainingArguments
from tests.distributed.trainer_ranks import weights
from tests.distributed.trainer_table import zero
from tests.support.tiny import tiny_llama
from tests.trainer.bad_batches import BATCH, InOrder, rows

FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2}}
CASES = {"ddp-adamw": {}, "fsdp2-adamw": FSDP2, "fsdp2-muon": FSDP2}


def run(folder, world, *, bad, steps=4, **options):
    """Ranks take batches in turn: the last one's second is batch 2 * world - 1. Without the bad step if not `bad`."""
    data = rows(4 * world, bad=[2 * world - 1] if bad else [])
    if not bad:
        data = data[: world * BATCH] + data[2 * world * BATCH :]
    with clean_state():
        args = CWDTrainingArguments(
            output_dir=str(folder / "out"),
            use_cpu=True,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=1e-2,
            weight_decay=0.1,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            **options,
        )
        trainer = InOrder(model=tiny_llama(), args=args, train_dataset=data)
        trainer.train()
        return {"weights": weights(trainer.model), "skipped": trainer._cwd_guard.skipped}


def error_of(*args, **options):
    try:
        return run(*args, bad=True, **options)
    except (RuntimeError, ValueError) as error:
        return {"error": str(error)}


def main():
    folder, rank, world = Path(sys.argv[1]), os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    results = {"start": weights(tiny_llama())}
    if sys.argv[2:] == ["deepspeed"]:
        cpu_ranks.meet()
        for mode in ("stop", "skip"):
            results[mode] = error_of(folder, world, cwd_not_finite=mode, deepspeed=zero(2))
        torch.save(results, folder / "deepspeed.pt")
        return
    for name, layout in CASES.items():
        if layout:
            cpu_ranks.switch_on()
        options = {"optim": f"cwd_{name.partition('-')[2]}", **layout}
        results[f"without-{name}"] = run(folder, world, bad=False, steps=3, **options)
        results[f"skip-{name}"] = run(folder, world, bad=True, cwd_not_finite="skip", **options)
        results[f"stop-{name}"] = error_of(folder, world, cwd_not_finite="stop", **options)
    torch.save(results, folder / f"{rank}.pt")
    run(folder, world, bad=True, **options)


if __name__ == "__main__":
    main()
