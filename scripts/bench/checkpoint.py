#!/usr/bin/env python
"""Time and size of saving and loading a checkpoint: CWDTrainer's beside the plain Trainer's.

In each layout the ranks train one step. Then the same weights and states are saved by turns, in random order, as each
Trainer does it, into a directory of its own from which the oldest is removed. Loads are timed from
``train(resume_from_checkpoint=...)`` to the first step, by a new Trainer each time. Times are the first rank's; ratios
are to "plain" within a round, medians over the rounds with 95 % intervals. "plain" takes part twice: where its ratio to
itself is not known to lie within 2 % of 1, the run says so.

    plain             the Trainer without this package's callback
    plain, synced     the same; then it waits until all is on the disk, as CWDTrainer does and the Trainer does not
    Trainer           the Trainer as it is with --optim cwd_*: the callback writes a manifest, and compares
    CWDTrainer        with what --cwd_verify is told at loading

What is to be written is on the disk before the next one's turn, and memory for it is at hand: a virtual machine gives
free memory back to its host, and waits when it wants it again. The disk needs room for six checkpoints. Memory is what
the first rank needed at the worst moment beside what it had.

    scripts/bench/checkpoint.py --threads 2
    scripts/bench/checkpoint.py --layouts one fsdp2 zero3 --optim cwd_muon --output_dir DIRECTORY_ON_THAT_DISK
    scripts/bench/checkpoint.py --cold     # loads from the disk, not from what the system keeps of it in memory
"""

import argparse
import contextlib
import faulthandler
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

# Started as a file it finds its neighbours as scripts/*.py do, and the package of this checkout.
if __name__ == "__main__":
    sys.path[:1] = map(str, Path(__file__).resolve().parents[1:3])

from bench import files as bench_files

ROOT = Path(__file__).resolve().parents[2]
SAVES = ["plain", "plain again", "plain, synced", "Trainer", "CWDTrainer"]
LOADS = ["plain", "plain again", "Trainer", "CWDTrainer", "CWDTrainer, fast", "CWDTrainer, off"]
LIMIT = 1.10  # of CWDTrainer's time to the plain Trainer's
LONGEST = 3600  # seconds for a layout


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = ROOT / "configs/models/llama-111m.json"
    parser.add_argument("--config_name", type=Path, default=default, help="of the model (llama-111m.json)")
    parser.add_argument("--optim", default="cwd_adamw", help="(%(default)s)")
    parser.add_argument("--layouts", nargs="+", default=["one"], help="of scripts/dev/forked_runs.py (one)")
    parser.add_argument("--rounds", type=int, default=9, help="saves and loads of each (%(default)s)")
    parser.add_argument("--output_dir", type=Path, help="where to save (a temporary directory)")
    parser.add_argument("--cold", action="store_true", help="nothing of a checkpoint is in memory before it is loaded")
    parser.add_argument("--threads", type=int, default=1, help="of each rank (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    args = parser.parse_args(argv)
    for name in ("rounds", "threads"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"--{name} {value}: give at least 1")
    for path, exists in ((args.config_name, Path.is_file), (args.output_dir, Path.is_dir)):
        if path is not None and not exists(path):
            parser.error(f"{path} does not exist")
    if args.json:
        args.json.touch()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported
    from dev.forked_runs import LAYOUTS

    if unknown := {*args.layouts} - {*LAYOUTS}:
        parser.error(f"--layouts {', '.join(sorted(unknown))}: there are {', '.join(LAYOUTS)}")
    return args


class Loaded(Exception):  # noqa: N818
    """Ends a run that was to be loaded and not to be trained."""


class Rank:
    """What one rank of a layout does. Its figures are the first one's that count."""

    def __init__(self, args: argparse.Namespace, layout: str, folder: Path) -> None:
        from transformers import AutoConfig

        self.args, self.layout, self.folder = args, layout, folder
        self.config, self.order = AutoConfig.from_pretrained(args.config_name), random.Random(0)
        self.room = 0

    def run(self) -> None:
        """Writes ``found.json``."""
        from dev.forked_runs import clean_state

        from hf_cwd.distributed import collectives

        with clean_state():
            found = self.saves()
        newest = {name: max((self.folder / name).glob("checkpoint-*"), key=step) for name in SAVES}
        found["sizes"] = {name: bench_files.size(path) for name, path in newest.items()}
        found["loads"] = self.rounds(LOADS, lambda name: self.load(name, newest["CWDTrainer"]))
        if collectives.rank() == 0:
            (self.folder / "found.json").write_text(json.dumps(found))

    def saves(self) -> dict[str, Any]:
        trainer = self.trainer("CWDTrainer")
        trainer.train()
        count = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
        self.room = 16 * count  # bytes of weights in fp32 and two states, and some
        found = self.rounds(SAVES, lambda name: self.save(trainer, name))
        self.end(trainer)
        return {"parameters": count, "saves": found}

    def trainer(self, name: str, **options: Any) -> Any:
        import torch
        from dev.forked_runs import trainer_of
        from transformers import AutoModelForCausalLM, PrinterCallback, Trainer

        from hf_cwd import CWDTrainer
        from hf_cwd.trainer.callbacks.checkpoint import CheckpointCallback

        def model() -> torch.nn.Module:
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(self.config)

        kind, _, verify = name.partition(", ")
        given = {"steps": 1, "save_steps": 10**6, "optim": self.args.optim, "cwd_verify": verify or "full"}
        given |= {"save_total_limit": 1, **options}
        given["kind"] = CWDTrainer if kind == "CWDTrainer" else Trainer
        trainer = trainer_of(self.folder / "own", self.layout, model=model, **given)
        trainer.remove_callback(PrinterCallback)
        if kind.startswith("plain"):
            trainer.remove_callback(CheckpointCallback)
        return trainer

    def end(self, trainer: Any) -> None:
        if trainer.is_deepspeed_enabled:
            trainer.deepspeed.destroy()  # its hooks would keep it, with everything in it

    def rounds(self, names: list[str], one: Callable[[str], tuple[float, int | None]]) -> dict[str, Any]:
        """Seconds and bytes of memory of each round, by name; a round before the first is not counted."""
        found: dict[str, Any] = {name: {"seconds": [], "bytes": []} for name in names}
        for number in range(self.args.rounds + 1):
            for name in self.order.sample(names, len(names)):
                seconds, peak = one(name)
                if number:
                    found[name]["seconds"].append(seconds)
                    found[name]["bytes"].append(peak)
        return found

    def timed(self, action: Callable[[], Any]) -> tuple[float, int | None]:
        import torch

        from bench.machine import Peak
        from hf_cwd.distributed import collectives

        faulthandler.dump_traceback_later(LONGEST, exit=True)
        gc.collect()
        if collectives.rank() == 0:
            os.sync()
            torch.ones(self.room, dtype=torch.uint8)
        collectives.gathered(None)
        peak = Peak("cpu")
        peak.start()
        began = time.perf_counter()
        action()
        collectives.gathered(None)
        return time.perf_counter() - began, peak.stop()

    def save(self, trainer: Any, name: str) -> tuple[float, int | None]:
        from transformers import Trainer

        from hf_cwd import CWDTrainer
        from hf_cwd.distributed import collectives
        from hf_cwd.trainer.callbacks.checkpoint import CheckpointCallback

        folder = self.folder / name
        trainer.args.output_dir = str(folder)
        trainer.state.global_step += 1
        kind = CWDTrainer if name == "CWDTrainer" else Trainer
        seen = {"args": trainer.args, "state": trainer.state, "control": trainer.control}

        def action() -> None:
            kind._save_checkpoint(trainer, trainer.model_wrapped, None)
            if name == "plain, synced":
                collectives.gathered(None)
                if collectives.rank() == 0:
                    bench_files.sync(folder / f"checkpoint-{trainer.state.global_step}")
            elif name == "Trainer":
                callback = CheckpointCallback()
                callback.on_save(**seen, optimizer=trainer.optimizer)
                collectives.gathered(None)
                callback.on_step_end(**seen)

        return self.timed(action)

    def load(self, name: str, checkpoint: Path) -> tuple[float, int | None]:
        from dev.forked_runs import clean_state
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                raise Loaded

        def action() -> None:
            with contextlib.suppress(Loaded):
                trainer.train(resume_from_checkpoint=str(checkpoint))

        with clean_state():
            options = {"steps": 10**6, "ignore_data_skip": True, "resume_from_checkpoint": str(checkpoint)}
            trainer = self.trainer(name, **options)
            trainer.add_callback(Stop)
            if self.args.cold:
                bench_files.forget(checkpoint)
            found = self.timed(action)
            self.end(trainer)
        return found


def step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from dev.forked_runs import LAYOUTS, finish, start, warm_up

    from bench.machine import machine

    load, found = os.getloadavg(), {}
    for layout in args.layouts:
        home = folder / layout
        home.mkdir()
        warm_up(layout, home)
        log = home / "log"
        ranks = start(Rank(args, layout, home).run, LAYOUTS[layout].world, log, threads=args.threads)
        if any(codes := finish(ranks, timeout=LONGEST)):
            raise RuntimeError(f"{layout}: ranks have ended with {codes}:\n{log.read_text()[-4000:]}")
        found[layout] = json.loads((home / "found.json").read_text())
    given = {name: getattr(args, name) for name in ("optim", "rounds", "cold", "threads")}
    packages = ("transformers", "accelerate", "safetensors")
    about = {"config": args.config_name.name, **given, "load": [load, os.getloadavg()]}
    return {**about, "machine": machine("cpu", *packages), "layouts": found}


def report(run: dict[str, Any]) -> str:
    from bench.machine import described

    lines = [f"machine: {described(run['machine'])}"]
    for layout, found in run["layouts"].items():
        what = f"{run['config']}, {found['parameters'] / 1e6:.1f} M parameters, {run['optim']}, {layout}"
        lines += ["", f"{what}, {run['rounds']} rounds, load {', '.join(f'{load[0]:.1f}' for load in run['load'])}"]
        lines += table("save", found["saves"], found["sizes"])
        lines += ["", *table("load, cold" if run["cold"] else "load", found["loads"], {})]
    return "\n".join(lines)


def table(kind: str, rows: dict[str, Any], sizes: dict[str, int]) -> list[str]:
    from bench.stats import conclusive, paired, verdict

    plain = rows["plain"]["seconds"]
    same = paired(rows["plain again"]["seconds"], plain)
    trusted = conclusive(same)
    cells = [[kind, "seconds", "ratio", "95 %", "memory MB", *(["size MB"] if sizes else [])]]
    for name, row in rows.items():
        ratio = paired(row["seconds"], plain)
        peaks = [peak for peak in row["bytes"] if peak is not None]
        cells.append(
            [name, f"{median(row['seconds']):.2f}", f"{ratio.median:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}"]
        )
        cells[-1].append(f"{median(peaks) / 1e6:.0f}" if peaks else "?")
        cells[-1] += [f"{sizes[name] / 1e6:.2f}"] if sizes else []
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells]
    judged = paired(rows["CWDTrainer"]["seconds"], plain)
    says = "conclusive" if trusted else "INCONCLUSIVE: this run says nothing about small ratios"
    lines.append(f"plain against itself: {same}: {says}")
    return [*lines, f"CWDTrainer takes at most {LIMIT:.2f} of plain's time: {verdict(judged, LIMIT, trusted)}"]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder, contextlib.redirect_stdout(sys.stderr):
        run = measure(args, Path(folder))
    print(report(run))
    if args.json:
        args.json.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
