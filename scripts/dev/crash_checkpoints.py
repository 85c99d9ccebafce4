#!/usr/bin/env python
"""Kills training runs at random moments, resumes them, and compares the ends with those of runs that nobody killed.

    .venv/bin/python scripts/dev/crash_checkpoints.py --kills 200 --layouts one ddp fsdp2 zero3

A tiny Llama is trained by CWDTrainer, saving at each step, on CPU processes. Each run is killed several times (SIGKILL:
all its ranks, or one of them, whose end the others then see), and each time started again with
``resume_from_checkpoint=True``. It is lost if it does not end with the checkpoint of the run that nobody killed, bit
for bit: weights, optimizer states, schedule and random numbers. Exits with 1 if a run was lost.
"""

import argparse
import contextlib
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Started as a file it finds its neighbours as scripts/*.py do, and the package of this checkout.
if __name__ == "__main__":
    sys.path[:1] = map(str, Path(__file__).resolve().parents[1:3])

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import numpy as np
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dev.forked_runs import LAYOUTS, STEPS, finish, start, train, warm_up
from hf_cwd.checkpoint import manifest

END = f"checkpoint-{STEPS}"
DIFFERENT = ("trainer_state.json", "training_args.bin")  # times and paths


def contents(checkpoint: Path) -> dict[str, str]:
    """A digest of what each file of a checkpoint holds: of all but times, paths and the order of keys."""
    return {name: _digest(value) for name, value in loaded(checkpoint)}


def loaded(checkpoint: Path) -> Iterator[tuple[str, Any]]:
    """What each file of a checkpoint holds, one after another; see :func:`contents`."""
    for name in manifest.verify(checkpoint).files:
        path = checkpoint / name
        if name.endswith(".metadata"):  # of torch.distributed.checkpoint, with the files beside it
            with tempfile.NamedTemporaryFile() as file:
                dcp_to_torch_save(path.parent, file.name)
                yield name, torch.load(file.name, weights_only=False)
        elif path.suffix in (".pt", ".pth", ".bin") and name not in DIFFERENT:
            yield name, torch.load(path, weights_only=False)
        elif path.suffix == ".safetensors":
            yield name, load_file(path)
        elif path.suffix != ".distcp" and name not in DIFFERENT:
            yield name, path.read_bytes()


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(_plain(value)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A value without what differs between two equal ones; an object other than these is its type."""
    if isinstance(value, dict):
        return sorted((str(key), _plain(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).tolist())
    return value if isinstance(value, str | bytes | int | float | None) else type(value).__name__


def run(folder: Path, name: str, log: Path, **options: Any) -> float:
    """A run that nobody kills; the seconds that it took."""
    began = time.monotonic()
    codes = finish(start(lambda: train(folder, name, **options), LAYOUTS[name].world, log), timeout=300)
    if any(codes):
        raise RuntimeError(f"{name}: ranks ended with {codes}:\n{log.read_text()[-4000:]}")
    return time.monotonic() - began


def lineage(folder: Path, name: str, log: Path, *, seconds: float, most: int, random_: random.Random) -> int:
    """Starts a run, kills it and starts it again until it was killed ``most`` times or has ended; how many it were.

    Args:
        seconds: that a whole run takes: it is killed at any moment of most of them.
    """
    world, kills = LAYOUTS[name].world, 0
    while kills < most:
        pids = start(lambda: train(folder, name, resume=has_begun(folder)), world, log)
        time.sleep(random_.uniform(0, 0.8 * seconds))
        victims = pids if random_.random() < 0.5 else [random_.choice(pids)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        codes = finish(pids, timeout=120, grace=random_.uniform(0, 2))
        if not any(codes):
            break  # it had ended before
        kills += 1
    return kills


def has_begun(folder: Path) -> bool:
    """Whether there is something to resume from: a run that was killed before its first checkpoint begins anew."""
    return any(folder.glob("*checkpoint-*/checkpoint-*/" + manifest.NAME)) or any(folder.glob("checkpoint-*"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="at least so many, over all layouts")
    parser.add_argument("--seed", type=int, default=None, help="of the moments and victims; printed when left out")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--most", type=int, default=6, help="kills of one run, before it is left to end")
    parser.add_argument("--seconds", type=float, default=None, help="begin no run after so many")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    moments, began, kills, runs, lost = random.Random(seed), time.monotonic(), 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        seconds, ends = {}, {}
        for name in args.layouts:
            warm_up(name, root)
            seconds[name] = run(root / name, name, root / "log")
            ends[name] = contents(root / name / END)
            print(f"{name}: {seconds[name]:.1f} s without a kill", flush=True)
        while kills < args.kills and (args.seconds is None or time.monotonic() - began < args.seconds):
            name, folder, log = args.layouts[runs % len(args.layouts)], root / str(runs), root / f"{runs}.log"
            more = lineage(folder, name, log, seconds=seconds[name], most=args.most, random_=moments)
            try:
                run(folder, name, log, resume=has_begun(folder))
                same = contents(folder / END) == ends[name]
            except (RuntimeError, ValueError) as error:
                print(error)
                same = False
            kills, runs, lost = kills + more, runs + 1, lost + (not same)
            print(f"{name}: {more} kills, {'the same end' if same else 'LOST'}", flush=True)
    print(f"seed {seed}: {kills} kills of {runs} runs in {time.monotonic() - began:.0f} s, {lost} lost")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
