"""Runs that kill themselves at named points, or at each change of a file; FOLDER/results.json says what became of them.

    python -m tests.checkpoint.victims FOLDER one|fsdp2|zero3

This process imports everything, computes nothing, and forks the ranks of all runs.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import transformers.trainer
from dev.crash_checkpoints import END, contents, has_begun
from dev.forked_runs import LAYOUTS, finish, start, train, warm_up
from transformers import Trainer

from hf_cwd.checkpoint import manifest, storage
from hf_cwd.checkpoint.storage import Storage
from tests.support import garbage

POINTS = {
    "recover": (Storage, "recover"),
    "verify": (Storage, "verify"),
    "load": (Trainer, "_load_from_checkpoint"),
    "load of DeepSpeed": (transformers.trainer, "deepspeed_load_checkpoint"),
    "load of the optimizer": (Trainer, "_load_optimizer_and_scheduler"),
    "stage": (Storage, "stage"),
    "first write": (Trainer, "save_model"),
    "write of the optimizer": (Trainer, "_save_optimizer_and_scheduler"),
    "last write of a rank": (Trainer, "_save_rng_state"),
    "sync": (manifest, "describe"),
    "manifest": (manifest, "write"),
    "rename": (os, "replace"),
    "publish": (Storage, "_move"),
    "rotate": (Storage, "rotate"),
    "tidying": (storage.shutil, "rmtree"),
}
# One after another in one directory: (rank, or None for all; side; point). Each goes on from what the last has left.
CHAIN = [
    (None, "before", "stage"),
    (0, "after", "first write"),
    (0, "after", "manifest"),
    (0, "before", "first write"),
    (1, "before", "first write"),
    (1, "before", "write of the optimizer"),
    (1, "before", "recover"),
    (0, "after", "write of the optimizer"),
    (0, "before", "last write of a rank"),
    (1, "after", "last write of a rank"),
    (None, "after", "verify"),
    (1, "before", "sync"),
    (0, "after", "sync"),
    (0, "before", "load of the optimizer"),
    (0, "before", "manifest"),
    (0, "before", "publish"),
    (1, "before", "load"),
    (0, "after", "publish"),
    (1, "before", "rotate"),
    (0, "before", "rotate"),
    (0, "before", "tidying"),
    (0, "after", "load"),
    (1, "after", "rotate"),
]


def die_at(point, side, marker):
    """The process kills itself the first time that it comes to a point."""
    home, name = POINTS[point]
    original = getattr(home, name)

    def fatal(*args, **kwargs):
        result = original(*args, **kwargs) if side == "after" else None
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(home, name, fatal)


def die_at_change(number, folder, log):
    """The process kills itself before the so-manieth change that Python makes to a file or directory in a folder."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
        if event == "open" and isinstance(args[2], int):
            changes = args[2] & (os.O_WRONLY | os.O_RDWR)
        if changes and str(args[0]).startswith(str(folder)):
            seen += 1
            if seen == number:
                log.write_text(f"{event} {Path(args[0]).name}")
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def chain(folder, layout, reference):
    """Each point of the chain; then a run that nobody kills."""
    run, log, results = folder / "chain", folder / "log", []
    world = LAYOUTS[layout].world
    for number, (victim, side, point) in enumerate(CHAIN):
        if victim is not None and victim >= world:
            continue
        if layout == "zero3" and point == "load":
            point = "load of DeepSpeed"
        marker = folder / f"reached-{number}"

        def job(victim=victim, side=side, point=point, marker=marker):
            if victim in (None, int(os.environ.get("RANK", 0))):
                die_at(point, side, marker)
            train(run, layout, resume=has_begun(run), ddp_timeout=20)

        began = time.monotonic()
        codes = finish(start(job, world, log), timeout=120, grace=10)
        at = f"{side} {point}, rank {'all' if victim is None else victim}"
        kept = sorted(path.name for path in run.glob("*") if path.name.startswith(("_", "checkpoint")))
        results.append(
            {"at": at, "codes": codes, "reached": marker.exists(), "left": kept, "seconds": time.monotonic() - began}
        )
    codes = finish(start(lambda: train(run, layout, resume=True), world, log), timeout=120)
    same = codes == [0] * world and contents(run / END) == reference
    left = sorted(path.name for path in run.glob("_*"))
    return {"kills": results, "codes": codes, "same": same, "left": left, "log": log.read_text()[-20000:]}


def every_change(folder, reference):
    """A run from step 2 to 3 is killed at its first change of a file; another at its second; and so on."""
    base, log, results = folder / "base", folder / "log", []
    finish(start(lambda: train(base, "one", steps=2), 1, log), timeout=60)
    # A run before had begun to remove a checkpoint, and had been ended while it replaced another.
    shutil.copytree(base / "checkpoint-1", base / "_tmp-checkpoint-1-00000000" / "rotated")
    shutil.copytree(base / "checkpoint-2", base / "_tmp-checkpoint-2-00000000" / "checkpoint-2")
    while True:
        number = len(results) + 1
        case, at = folder / f"change-{number}", folder / f"change-{number}.txt"
        shutil.copytree(base, case)

        def job(number=number, case=case, at=at):
            die_at_change(number, case, at)
            train(case, "one", steps=3, resume=True)

        (code,) = finish(start(job, 1, log), timeout=60)
        (again,) = finish(start(lambda case=case: train(case, "one", steps=3, resume=True), 1, log), timeout=60)
        same = again == 0 and contents(case / "checkpoint-3") == reference
        if code == 0:
            return {"kills": results, "same": same, "log": log.read_text()[-20000:]}
        results.append({"at": at.read_text() if at.exists() else None, "codes": [code, again], "same": same})
        shutil.rmtree(case)


def main():
    folder, layout = Path(sys.argv[1]), sys.argv[2]
    warm_up(layout, folder)
    garbage.pass_over()
    world, log = LAYOUTS[layout].world, folder / "log"
    codes = finish(start(lambda: train(folder / "reference", layout, save_total_limit=None), world, log), timeout=120)
    assert codes == [0] * world, log.read_text()
    results = {"chain": chain(folder, layout, contents(folder / "reference" / END))}
    if layout == "one":
        results["changes"] = every_change(folder, contents(folder / "reference" / "checkpoint-3"))
    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
