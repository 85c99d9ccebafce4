#!/usr/bin/env python
"""Tokens a second of the real Trainer with several optimizers, and the optimizer's share of a step.

All optimizers train the same model from the same weights on the same tokens, in blocks of a few steps that take turns
in one process, in random order: whatever slows the machine for longer than a round slows all of them, and each finds
the others' memory freed and its own code loaded. A round before the first one is not counted. The baseline takes part
twice; where its ratio to itself is not known to lie within 2 % of 1, the run says so. Ratios are of the time of a
token, medians over the rounds with 95 % intervals. Nothing waits for a GPU but the two ends of a block; the optimizer's
time there is the device's, between two events.

    scripts/bench/train.py --threads 2
    scripts/bench/train.py --config_name configs/models/llama-111m.json --bf16 --batch_size 16 --block_size 1024
    scripts/bench/train.py --optimizers adamw_torch_fused cwd_muon cwd_muon:ns=gram,ns_dtype=bfloat16

Under DeepSpeed, by as many processes as torchrun starts, of which the first one reports; with CPU offload adamw_torch
is DeepSpeedCPUAdam there, which Accelerate puts in its place:

    torchrun --nproc_per_node 2 scripts/bench/train.py --deepspeed configs/deepspeed/zero2_offload.json --threads 1 \\
        --optimizers adamw_torch cwd_adamw cwd_lion cwd_muon
"""

import argparse
import contextlib
import gc
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

# Started as a file it finds its neighbours as scripts/*.py do, and the package of this checkout.
if __name__ == "__main__":
    sys.path[:1] = map(str, Path(__file__).resolve().parents[1:3])

ROOT = Path(__file__).resolve().parents[2]
OPTIMIZERS = ["adamw_torch_fused", "adamw_torch", "cwd_adamw", "cwd_lion", "cwd_muon"]
ALPHABET = 64  # tokens that occur in the data


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    small = ROOT / "configs/models/llama-1m.json"
    parser.add_argument("--config_name", type=Path, default=small, help="of the model (llama-1m.json)")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        metavar="NAME[:OPTIM_ARGS]",
        default=OPTIMIZERS,
        help=f"values of --optim; the first is the baseline ({' '.join(OPTIMIZERS)})",
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of weights (%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="autocast, as the Trainer's flag")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a step (%(default)s)")
    parser.add_argument("--block_size", type=int, default=256, help="tokens of a row (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a block (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="blocks of each optimizer (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3600, help="no round begins later (%(default)s)")
    parser.add_argument(
        "--deepspeed", type=Path, metavar="CONFIG", help="train under DeepSpeed with this configuration"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(a GPU where there is one)")
    parser.add_argument("--threads", type=int, help="(all cores)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    args = parser.parse_args(argv)
    for name in ("batch_size", "block_size", "steps", "warmup", "rounds", "seconds", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: give at least 1")
    if not args.config_name.is_file():
        parser.error(f"--config_name {args.config_name}: no such file")
    if args.deepspeed and not args.deepspeed.is_file():
        parser.error(f"--deepspeed {args.deepspeed}: no such file")
    if args.deepspeed and "RANK" not in os.environ:
        parser.error("--deepspeed: start it by torchrun, also a single process")
    if len(set(args.optimizers)) < len(args.optimizers):
        parser.error(f"--optimizers {' '.join(args.optimizers)}: each once; the baseline is run twice as it is")
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported
    if args.json:
        args.json.touch()
    return args


def rows(vocabulary: int, length: int, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Random walks along one cycle of tokens: a model learns within a few steps which token follows."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    size = min(ALPHABET, vocabulary)
    cycle = torch.randperm(vocabulary, generator=generator)[:size]
    found = []
    for start in torch.randint(size, (count,), generator=generator).tolist():
        tokens = cycle[(torch.arange(length) + start) % size]
        found.append({"input_ids": tokens, "labels": tokens})
    return found


def train(config: Any, name: str, device: str, folder: str, steps: int, warmup: int, **options: Any) -> dict[str, Any]:
    """One block: a new model, a few steps of it by the Trainer.

    Args:
        name: ``NAME`` or ``NAME:OPTIM_ARGS`` of the optimizer.
        options: ``dtype`` of the weights by name, ``bf16``, ``batch_size``, ``block_size``, ``logging_steps`` (0: no
            losses, which a GPU would have to wait for).
    """
    import torch
    from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed

    import hf_cwd  # noqa: F401  registers the names
    from bench.machine import Peak
    from bench.stopwatch import Stopwatch

    optim, _, optim_args = name.partition(":")
    every, batch = options.get("logging_steps", 0), options["batch_size"]
    training = TrainingArguments(
        output_dir=folder,
        optim=optim,
        optim_args=optim_args or None,
        bf16=options["bf16"],
        max_steps=warmup + steps,
        per_device_train_batch_size=batch,
        seed=0,
        use_cpu=device == "cpu",
        learning_rate=options.get("learning_rate", 3e-4),
        weight_decay=0.1,
        save_strategy="no",
        logging_strategy="steps" if every else "no",
        logging_steps=every or 500,
        logging_first_step=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device == "cuda",
        deepspeed=deepspeed_config(options["deepspeed"], optim) if options.get("deepspeed") else None,
    )
    watch, peak = Stopwatch(device, warmup=warmup, last=warmup + steps), Peak(device)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    peak.start()
    set_seed(0)
    with torch.device(device) if not options.get("deepspeed") else contextlib.nullcontext():
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options["dtype"]))
    processes = training.world_size
    data = rows(config.vocab_size, options["block_size"], (warmup + steps) * batch * processes)
    trainer = Trainer(model=model, args=training, train_dataset=data, callbacks=[watch])
    trainer.remove_callback(PrinterCallback)
    loss = trainer.train().training_loss
    bytes_ = peak.stop()
    optimizer = watch.optimizer_seconds()
    if options.get("deepspeed"):
        trainer.deepspeed.destroy()  # its hooks would keep it, with everything in it
    return {
        "tokens_per_second": steps * batch * processes * options["block_size"] / watch.seconds,
        "step_ms": watch.seconds / steps * 1e3,
        "optimizer_ms": optimizer / steps * 1e3,
        "share": optimizer / watch.seconds,
        "peak_bytes": bytes_,
        "loss": loss,
        "losses": watch.losses,
    }


def deepspeed_config(path: Path, optim: str) -> dict[str, Any]:
    """The configuration, under which other optimizers than ours are what Accelerate makes of them."""
    config = json.loads(path.read_text())
    if not optim.startswith("cwd_"):
        config.pop("zero_force_ds_cpu_optimizer", None)
    return config


def quiet() -> None:
    """For a process of blocks only: a line for each of a hundred says nothing new, and each collects garbage twice."""
    gc.collect()
    gc.freeze()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("hf_cwd").setLevel(logging.WARNING)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig

    from bench.machine import machine
    from bench.stats import conclusive, paired

    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.deepspeed:
        import deepspeed

        deepspeed.init_distributed("gloo" if device == "cpu" else "nccl")
    config = AutoConfig.from_pretrained(args.config_name)
    baseline, order = args.optimizers[0], random.Random(0)
    candidates = {name: name for name in args.optimizers} | {f"{baseline} again": baseline}
    given = {name: getattr(args, name) for name in ("dtype", "bf16", "batch_size", "block_size", "deepspeed")}
    blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in candidates}
    left_out, load = {}, os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        for name, optimizer in list(candidates.items()):
            try:
                train(config, optimizer, device, folder, 1, args.warmup, **given)
            except Exception as error:  # said, and the others go on
                if optimizer == baseline:
                    raise
                left_out[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                del candidates[name], blocks[name]
        start = time.monotonic()
        for done in range(args.rounds):
            if done and time.monotonic() - start > args.seconds:
                break
            for name in order.sample(list(candidates), len(candidates)):
                blocks[name].append(train(config, candidates[name], device, folder, args.steps, args.warmup, **given))
    times = {name: [block["step_ms"] for block in some] for name, some in blocks.items()}
    same = paired(times[f"{baseline} again"], times[baseline])
    found = {}
    for name, some in blocks.items():
        peaks = [block["peak_bytes"] for block in some if block["peak_bytes"] is not None]
        middle = {key: median(block[key] for block in some) for key in some[0] if key not in ("losses", "peak_bytes")}
        found[name] = {**middle, "peak_bytes": min(peaks) if peaks else None, "step_ms_of_rounds": times[name]}
        found[name]["ratio"] = paired(times[name], times[baseline])._asdict()
    given["deepspeed"] = args.deepspeed.name if args.deepspeed else None
    return {
        "config": args.config_name.name,
        "device": device,
        "threads": torch.get_num_threads(),
        **given,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "steps": args.steps,
        "rounds": same.count,
        "baseline": baseline,
        "load": [load, os.getloadavg()],
        "machine": machine(device, "transformers", "accelerate"),
        "left_out": left_out,
        "optimizers": found,
        "same": {**same._asdict(), "conclusive": conclusive(same)},
    }


def report(run: dict[str, Any]) -> str:
    from bench.machine import described
    from bench.stats import Interval

    same = Interval(*(run["same"][key] for key in Interval._fields))
    precision = f"{run['dtype']} weights{', bf16 autocast' if run['bf16'] else ''}"
    lines = [
        f"machine: {described(run['machine'])}",
        f"{run['config']} on {run['device']}, {precision}, {run['batch_size']} x {run['block_size']} tokens a step"
        + (f" in each of {run['processes']} processes, {run['deepspeed']}, " if run["deepspeed"] else ", ")
        + f"{run['rounds']} rounds of {run['steps']} steps, load {', '.join(f'{load[0]:.1f}' for load in run['load'])}",
        f"{run['baseline']} against itself: {same}: "
        + ("conclusive" if run["same"]["conclusive"] else "INCONCLUSIVE: this run says nothing about small ratios"),
    ]
    cells = [["", "tokens/s", "time ratio", "95 %", "optimizer ms", "share", "peak MB", "loss"]]
    for name, row in run["optimizers"].items():
        ratio, peak = Interval(*row["ratio"].values()), row["peak_bytes"]
        cells.append([name, f"{row['tokens_per_second']:.0f}", f"{ratio.median:.3f}"])
        cells[-1] += [f"{ratio.low:.3f} to {ratio.high:.3f}", f"{row['optimizer_ms']:.2f}", f"{row['share']:.1%}"]
        cells[-1] += ["?" if peak is None else f"{peak / 1e6:.0f}", f"{row['loss']:.3f}"]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        lines.append("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]))
    return "\n".join([*lines, *(f"left out: {name}: {reason}" for name, reason in run["left_out"].items())])


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with contextlib.redirect_stdout(sys.stderr):  # the Trainer prints
        quiet()
        run = measure(args)
    if int(os.environ.get("RANK", 0)):
        return
    print(report(run))
    if args.json:
        args.json.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
