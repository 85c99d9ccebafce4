#!/usr/bin/env python
"""What a step of an optimizer costs, beside torch.optim.AdamW(fused=True) and torch.optim.Muon on the same tensors.

In each round every candidate takes one step of its own, in random order; a ratio is the median of the rounds' ratios to
the baseline, with a 95 % interval between two of them in order (no assumption about the noise but that rounds are
independent). The baseline takes part twice, as two optimizers: a run whose ratio of those is not known to lie within
2 % of 1 says nothing, and says so. Element-wise rules and Muon (on the hidden matrices of the model) run apart.

    scripts/bench/step.py --model gpt2-124m --threads 1 2 --targets
    scripts/bench/step.py --device cuda --model gpt2-124m llama-3.2-1b --dtype fp32 bf16 --targets --json step.json
    scripts/bench/step.py --model '8*1024x1024,4*1024' --candidates cwd_adamw cwd_adamw_eager --pairs 20

Each run (a model, a dtype, a number of threads, a family) is a process of its own.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

# Started as a file it finds its neighbours as scripts/*.py do, and the package of this checkout.
if __name__ == "__main__":
    sys.path[:1] = map(str, Path(__file__).resolve().parents[1:3])

FAMILIES = ("element-wise", "matrix")
CHILD = "HF_CWD_BENCH_RUN"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    import torch

    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _check(args)
    except ValueError as error:
        parser.error(str(error))
    args.threads = args.threads or [torch.get_num_threads()]
    if args.json and not args.list:
        args.json.touch()  # an hour of figures must not fail here
    return args


def _parser() -> argparse.ArgumentParser:
    from bench.shapes import MODELS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model",
        default=["gpt2-124m"],
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(MODELS)}, or N*ROWSxCOLUMNS,... (gpt2-124m)",
    )
    parser.add_argument("--dtype", default=["fp32"], nargs="+", choices=["fp32", "bf16"], help="of all tensors (fp32)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(%(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", help="of a process (all cores)")
    parser.add_argument("--family", default=list(FAMILIES), nargs="+", choices=FAMILIES, help="(both)")
    parser.add_argument(
        "--candidates", nargs="+", metavar="NAME", help="besides the baselines (all; --list names them)"
    )
    parser.add_argument("--pairs", type=int, default=100, help="rounds, and so ratios (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1800, help="no round of a run begins later (%(default)s)")
    parser.add_argument("--memory", default="auto", choices=["auto", "own", "shared"], help="tensors (%(default)s)")
    parser.add_argument("--targets", action="store_true", help="print the project's goals beside the figures")
    parser.add_argument("--list", action="store_true", help="list the candidates and stop")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for what the parser takes and no run can be made of."""
    import torch

    from bench.candidates import candidates
    from bench.shapes import shapes_of

    for name, values in {"pairs": [args.pairs], "seconds": [args.seconds], "threads": args.threads or ()}.items():
        for value in values:
            if value <= 0:
                raise ValueError(f"--{name} {value}: give at least 1")
    for model in args.model:
        try:
            shapes_of(model)
        except ValueError as error:
            raise ValueError(f"--model {error}") from None
    if unknown := {*(args.candidates or ())} - {*candidates()}:
        raise ValueError(f"--candidates {', '.join(sorted(unknown))}: give some of {', '.join(candidates())}")
    if args.device == "cuda" and not torch.cuda.is_available() and not args.list:
        raise ValueError("--device cuda: torch finds no GPU here")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One run: the first of each list in ``args``."""
    import torch

    from bench.candidates import AGAIN, BASELINES, DTYPES, MATRIX, candidates, iteration_flops, kernel_of
    from bench.machine import machine
    from bench.rounds import extra_memory, plan, prepared, product_rate, rounds
    from bench.shapes import elements, largest_aspect, least_aspect, shapes_of
    from bench.stats import conclusive, paired

    family, device, dtype = args.family[0], args.device, DTYPES[args.dtype[0]]
    torch.set_num_threads(args.threads[0])
    baseline = BASELINES[family]
    needed = (baseline, AGAIN.format(baseline))
    wanted = {
        name: candidate
        for name, candidate in candidates().items()
        if candidate.family == family
        and candidate.device in (None, device)
        and candidate.dtype in (None, args.dtype[0])
        and (not args.candidates or name in (*needed, *args.candidates))
    }
    parameters = [p for p in shapes_of(args.model[0]) if family != MATRIX or p.matrix]
    load = os.getloadavg()
    chosen = plan(wanted, needed, parameters, dtype, device, args.memory)
    rate = product_rate(device, family)  # first: what a library keeps from its first use on is nobody's
    ready = prepared(chosen, wanted, parameters, dtype, device)
    extra = {name: extra_memory(each, device) for name, each in ready.items()}
    times = rounds(ready, args.pairs, device, args.seconds)
    same = paired(times.step[needed[1]], times.step[baseline])
    found = {}
    for name, each in ready.items():
        seconds = median(times.step[name])
        found[name] = {
            "ratio": paired(times.step[name], times.step[baseline])._asdict(),
            "ms": seconds * 1e3,
            "bytes": each.bytes,
            "gb_per_second": each.bytes / seconds / 1e9,
            "tflops": iteration_flops(each.params) / seconds / 1e12 if family == MATRIX else None,
            "extra_bytes": extra[name],
            "kernel": kernel_of(wanted[name], device),
            "host_ms": median(times.host[name]) * 1e3 if device == "cuda" else None,
            "seconds": [float(f"{value:.5g}") for value in times.step[name]],
            "host_seconds": [float(f"{value:.4g}") for value in times.host[name]] if device == "cuda" else None,
        }
    return {
        "model": args.model[0],
        "dtype": args.dtype[0],
        "device": device,
        "threads": args.threads[0],
        "family": family,
        "tensors": len(parameters),
        "parameters": elements(parameters),
        "least_aspect": least_aspect(parameters),
        "largest_aspect": largest_aspect(parameters),
        "baseline": baseline,
        "rounds": same.count,
        "memory": "shared" if chosen.shared else "own",
        "load": [load, os.getloadavg()],
        "machine": machine(device, "deepspeed"),
        "product_tflops": rate,
        "same": {**same._asdict(), "conclusive": conclusive(same)},
        "candidates": found,
        "left_out": chosen.left_out,
    }


def report(run: dict[str, Any], targets: bool) -> str:
    """A run as text."""
    from bench.stats import Interval
    from bench.targets import goals

    same = Interval(*(run["same"][key] for key in Interval._fields))
    own = "tensors of its own each" if run["memory"] == "own" else "one set of tensors, taken in turns"
    muon = run["family"] == "matrix"
    loads = ", ".join(f"{load[0]:.1f}" for load in run["load"])
    lines = [
        f"{run['model']} {run['dtype']}, {run['family']}, {run['device']}, threads {run['threads']}: {run['tensors']} "
        f"tensors, {run['parameters'] / 1e6:.1f} M parameters, {own}; {run['rounds']} rounds, load {loads}",
        f"{run['baseline']} against itself: {same}: "
        + ("conclusive" if run["same"]["conclusive"] else "INCONCLUSIVE: this run says nothing about small ratios"),
    ]
    if muon:
        lines.append(f"TFLOP/s as if in the plain form; a large product in bf16 runs at {run['product_tflops']:.3g}")
    cells = [["", "ms", "ratio", "95 %", "TFLOP/s" if muon else "GB/s", "extra MB", "host ms"]]
    for name, row in run["candidates"].items():
        ratio, extra = Interval(*row["ratio"].values()), row["extra_bytes"]
        speed = f"{row['tflops']:.3g}" if muon else f"{row['gb_per_second']:.1f}"
        label = name + (f" ({row['kernel']})" if row["kernel"] else "")
        host = "" if row["host_ms"] is None else f"{row['host_ms']:.2f}"
        cells.append([label, f"{row['ms']:.3f}", f"{ratio.median:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}", speed])
        cells[-1] += ["?" if extra is None else f"{extra / 1e6:.1f}", host]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        lines.append("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip())
    lines += [f"left out: {name}: {reason}" for name, reason in run["left_out"].items()]
    return "\n".join([*lines, *(f"goal: {goal}" for goal in (goals(run) if targets else ()))])


def child(args: argparse.Namespace, model: str, dtype: str, threads: int, family: str) -> dict[str, Any] | str:
    """One run in a process of its own; what went wrong, where it did."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "run.json")
        command = [sys.executable, __file__, "--model", model, "--dtype", dtype, "--threads", str(threads)]
        command += ["--family", family, "--device", args.device, "--memory", args.memory, "--json", str(result)]
        command += ["--pairs", str(args.pairs), "--seconds", str(args.seconds)]
        command += ["--candidates", *args.candidates] if args.candidates else []
        # Before libraries start: OpenMP of kernels outside torch asks for nothing else.
        env = {**os.environ, CHILD: "1", "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=env, stdout=sys.stderr)
        text = result.read_text() if result.exists() else ""
    return json.loads(text) if done.returncode == 0 and text else f"no figures (exit status {done.returncode})"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        from bench.candidates import candidates

        print("\n".join(f"{name}: {candidate.family}" for name, candidate in candidates().items()))
        return 0
    if os.environ.get(CHILD):
        try:
            args.json.write_text(json.dumps(measure(args)))
        except (MemoryError, RuntimeError) as error:
            print(f"{args.model[0]} {args.dtype[0]}: {error}", file=sys.stderr)
            return 1
        return 0
    from bench.machine import described, machine

    print(f"machine: {described(machine(args.device, 'transformers', 'deepspeed'))}", flush=True)
    found, failed = [], {}
    for family, model, dtype, threads in itertools.product(args.family, args.model, args.dtype, args.threads):
        run = child(args, model, dtype, threads, family)
        if isinstance(run, str):
            failed[f"{model} {dtype} {family} threads {threads}"] = run
            print(f"\n{model} {dtype}, {family}, threads {threads}: {run}", flush=True)
            continue
        found.append(run)
        print(f"\n{report(run, args.targets)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"runs": found, "failed": failed}, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
