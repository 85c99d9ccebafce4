#!/usr/bin/env python
"""What a step of Muon costs when its matrices are cut over several processes: bytes, rounds and time.

Times the exchange without its orthogonalisation, the orthogonalisation without the exchange, and both together, which
overlap. Beside them a simpler program: every process gathers every matrix and orthogonalises all of them.

Starts its own processes on this machine, or uses those of torchrun: `torchrun --nproc_per_node 8
scripts/bench/exchange.py --device cuda --hidden 2048 --layers 16`.
"""

import argparse
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

# Started as a file it finds its neighbours as scripts/*.py do, and the package of this checkout.
if __name__ == "__main__":
    sys.path[:1] = map(str, Path(__file__).resolve().parents[1:3])

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.multiprocessing import ProcessExitedException, spawn

from hf_cwd.distributed import dtensor, local_view, rank_groups
from hf_cwd.distributed.build import Source, build
from hf_cwd.distributed.exchange import Exchange
from hf_cwd.distributed.matrix_stage import Stage
from hf_cwd.distributed.plan import EXCHANGE, Plan
from hf_cwd.newton_schulz.matrices import MatrixLayout
from hf_cwd.optim.matrix_step import MatrixLoop, PreparedExchange
from hf_cwd.rules import RULES

WARM_UP = 2
LAYOUTS = ("fsdp2", "ddp", "hsdp")
ROWS = {
    "rounds": "rounds",
    "received": "MB received a step, busiest rank",
    "communication": "communication alone (ms)",
    "orthogonalisation": "orthogonalisation alone (ms)",
    "together": "together (ms)",
    "ratio": "together / sum of the two",
    "gathered": "full gather: MB received",
    "full_gather": "full gather: together (ms)",
    "speedup": "full gather / together",
}
CROWDED = (
    "More than {} ranks take turns on these {} cores: bytes and rounds are right, but their times say nothing about as "
    "many machines."
)
FORMS = {"received": "{:.2f}", "gathered": "{:.2f}", "ratio": "{:.2f}", "speedup": "{:.2f}", "rounds": "{}"}


class NoStage(Stage):
    """Hands matrices back as they came, but is planned for as what it stands in for."""

    def __call__(self, u: Tensor) -> Tensor:
        return u


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _check_numbers(args)
        args.processes = _processes(args)
        _check_device(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--processes", type=int, nargs="+", help="2 4 8, hsdp 4 8; not with torchrun")
    parser.add_argument("--layout", default="fsdp2", choices=LAYOUTS, help="hsdp has two replicas (%(default)s)")
    parser.add_argument("--shapes", nargs="+", default=["128x4096"], help="matrices of a layer (%(default)s)")
    parser.add_argument("--hidden", type=int, help="instead of --shapes: those of a Llama of this width")
    parser.add_argument("--layers", type=int, default=64, help="(%(default)s)")
    # On a CPU the five that Muon takes would dwarf the communication, which on accelerators they do not.
    parser.add_argument("--ns_steps", type=int, default=1, help="iterations of Newton-Schulz (%(default)s)")
    parser.add_argument("--share", default="always", choices=EXCHANGE["share"].choices, help="(%(default)s)")
    parser.add_argument("--exchange_bytes", type=int, default=1 << 22, help="of a round (%(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="timed repeats, of which the median counts (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, or the type of an accelerator (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    return parser


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("hidden", "layers", "ns_steps", "exchange_bytes", "steps", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: give at least 1")
    for shape in args.shapes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
            raise ValueError(f"--shapes {shape}: write ROWSxCOLUMNS, as 16x4096")


def _processes(args: argparse.Namespace) -> list[int]:
    """The numbers of processes to measure: torchrun's, those of the flag, or the default ones."""
    if "WORLD_SIZE" in os.environ and args.processes:
        raise ValueError("--processes: torchrun has started the processes already; leave it out")
    counts = args.processes or ([4, 8] if args.layout == "hsdp" else [2, 4, 8])
    if "WORLD_SIZE" in os.environ:
        counts = [int(os.environ["WORLD_SIZE"])]
    for count in counts:
        if count < 2:
            raise ValueError(f"--processes {count}: nothing is exchanged by fewer than 2")
        if args.layout == "hsdp" and (count < 4 or count % 2):
            raise ValueError(f"--processes {count}: --layout hsdp has two replicas of at least 2 processes")
    return counts


def _check_device(args: argparse.Namespace) -> None:
    """A device that torch finds, and one for each process that this program starts."""
    accelerator = torch.accelerator.current_accelerator()
    if args.device not in ("cpu", accelerator.type if accelerator else "cpu"):
        raise ValueError(f"--device {args.device}: torch finds no such device here; use {accelerator or 'cpu'}")
    count, most = torch.accelerator.device_count(), max(args.processes)
    if args.device != "cpu" and "WORLD_SIZE" not in os.environ and most > count:
        raise ValueError(f"--processes {most}: each needs a device of its own, and there are {count}")


def matrices(args: argparse.Namespace) -> list[tuple[int, int]]:
    """The shapes of all parameters."""
    layer = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    if h := args.hidden:
        inner = math.ceil(h * 8 / 3 / 16) * 16
        layer = [*[(h, h)] * 4, (inner, h), (inner, h), (h, inner)]
    return layer * args.layers


def parameters(args: argparse.Namespace, device: torch.device) -> list[Tensor]:
    """Full tensors (ddp), or DTensors cut as FSDP2 does."""
    generator, world = torch.Generator().manual_seed(0), dist.get_world_size()
    full = [torch.randn(shape, generator=generator).to(device) for shape in matrices(args)]
    if args.layout == "ddp":
        return full
    placements = (Replicate(), Shard(0)) if args.layout == "hsdp" else (Shard(0),)
    mesh = init_device_mesh(device.type, (2, world // 2) if args.layout == "hsdp" else (world,))
    return [distribute_tensor(tensor, mesh, placements, src_data_rank=None) for tensor in full]


class ExchangeLoop(MatrixLoop):
    """The optimizer's loop, of directions that are there already: what a rule computes is not measured."""

    def __init__(self, exchange: Exchange, directions: Sequence[Tensor]) -> None:
        super().__init__(PreparedExchange([], exchange, [], []), [], None, {}, None)
        self._given = directions
        self._present = [True] * len(directions)

    def _directions(self, sources: Sequence[int], outs: Mapping[int, Tensor] = MappingProxyType({})) -> None:
        self._step.parts.update({i: outs[i].copy_(self._given[i]) if i in outs else self._given[i] for i in sources})

    def _apply(self, sources: Sequence[int]) -> None:
        pass


def exchanged(params: Sequence[Tensor], stage: Stage, args: argparse.Namespace) -> tuple[Exchange, Callable[[], None]]:
    """The exchange of these parameters, and one step of it that leaves them alone."""
    sources = [
        Source(local_view.of(p), f"matrix {i}", MatrixLayout(), stage, torch.float32) for i, p in enumerate(params)
    ]
    exchange = build(sources, rank_groups.of(None), share=args.share, exchange_bytes=args.exchange_bytes)
    loop = ExchangeLoop(exchange, [dtensor.local(p).clone() for p in params])
    return exchange, lambda: loop.run(lambda: None)


def alone(exchange: Exchange, device: torch.device) -> Callable:
    """The orthogonalisation of the matrices that this rank owns, in the batches of the exchange."""
    rounds = [*(r for resident in exchange.schedule.resident for r in resident.rounds), *exchange.schedule.rounds]
    batches = [
        (batch.stage, torch.randn(len(batch.jobs), *batch.shape, device=device).to(batch.dtype))
        for round_ in rounds
        for batch in (*round_.first, *round_.second)
    ]
    return lambda: [stage(stack) for stage, stack in batches]


def full_gather(params: Sequence[Tensor], stage: Stage, wire: torch.dtype) -> Callable[[], None]:
    """Every rank gathers every matrix, orthogonalises it, and keeps its own part."""

    def run() -> None:
        for p in params:
            result = stage(dtensor.whole(p.to(wire)) if dtensor.is_dtensor(p) else p.to(wire))
            if dtensor.is_dtensor(p):
                distribute_tensor(result, p.device_mesh, p.placements, src_data_rank=None)

    return run


def gathered(plan: Plan, rank: int) -> int:
    """Bytes that a rank lacks of all matrices: what it receives in a full gather."""
    lacking = 0
    for entry in plan.entries:
        own = sum(math.prod(piece.size) for piece in entry.sharding.pieces(entry.shape, rank))
        lacking += (math.prod(entry.shape) - own) * entry.dtype.itemsize
    return lacking


def timed(candidates: dict[str, Callable], device: torch.device, steps: int) -> dict[str, Tensor]:
    """Seconds of each candidate in each repeat, of the slowest rank; they take turns, so that they share any noise."""
    seconds = torch.zeros(len(candidates), steps, dtype=torch.float64)
    for step in range(-WARM_UP, steps):
        for i, run in enumerate(candidates.values()):
            dist.barrier()
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if step >= 0:
                seconds[i, step] = time.perf_counter() - start
    slowest = seconds.to(device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return dict(zip(candidates, slowest.cpu(), strict=True))


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The numbers of this number of ranks, the same on every rank."""
    params = parameters(args, device)
    hyper = {name: kind.default for name, kind in RULES["muon"].hyperparameters.items()} | {"ns_steps": args.ns_steps}
    stage = Stage.of("muon", hyper)
    together, run = exchanged(params, stage, args)
    communication, run_communication = exchanged(params, NoStage(stage.rule, stage.hyper), args)
    plan = together.plan
    assert communication.plan.jobs == plan.jobs
    candidates = {
        "communication": run_communication,
        "orthogonalisation": alone(together, device),
        "together": run,
        "full_gather": full_gather(params, stage, plan.entries[0].dtype),
    }
    seconds = timed(candidates, device, args.steps)
    both = seconds["communication"] + seconds["orthogonalisation"]
    return {
        "ranks": dist.get_world_size(),
        "rounds": plan.rounds,
        "received": [plan.received[rank] for rank in sorted(plan.received)],
        "gathered": [gathered(plan, rank) for rank in range(dist.get_world_size())],
        "dtype": str(plan.entries[0].dtype).removeprefix("torch."),
        "seconds": {name: each.median().item() for name, each in seconds.items()},
        "ratio": (seconds["together"] / both).median().item(),
        "speedup": (seconds["full_gather"] / seconds["together"]).median().item(),
        "load": os.getloadavg()[0],
    }


def rank_main(rank: int, processes: int, args: argparse.Namespace, folder: str) -> None:
    """One of the processes that this script starts; the first one leaves its numbers in the folder."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", rank)))
        torch.accelerator.set_device_index(device.index)
    # A file where they meet, and not a port that may be taken.
    meeting = {} if "WORLD_SIZE" in os.environ else {"init_method": f"file://{folder}/meeting"}
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend, rank=rank, world_size=processes, **meeting)
    result = measure(args, device)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()  # a process that fails while it exits takes the others with it
    dist.destroy_process_group()


def results(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for processes in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder, "result.json")
            if "WORLD_SIZE" in os.environ:
                rank_main(int(os.environ["RANK"]), processes, args, folder)
            else:
                try:
                    spawn(rank_main, (processes, args, folder), nprocs=processes)
                except ProcessExitedException:
                    if not result.exists():  # now and then gloo aborts at exit, when all is done
                        raise
            if result.exists():
                yield json.loads(result.read_text())


def table(found: Sequence[dict[str, Any]]) -> str:
    """The numbers side by side."""
    lines = [["", *(f"{result['ranks']} ranks" for result in found)]]
    for key, name in ROWS.items():
        cells = []
        for result in found:
            value = result["seconds"][key] * 1e3 if key in result["seconds"] else result[key]
            value = max(value) / 1e6 if isinstance(value, list) else value
            cells.append(FORMS.get(key, "{:.1f}").format(value))
        lines.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    found = list(results(args))
    if not found:
        return  # a process of torchrun other than the first
    what = f"a Llama of width {args.hidden}" if args.hidden else " and ".join(args.shapes)
    size = sum(rows * columns for rows, columns in matrices(args)) / 1e6
    machine = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {args.device}",
        "matrices": f"{args.layers} layers of {what}, {size:.1f} M elements, sent as {found[0]['dtype']}",
        "run": f"layout {args.layout}, {args.threads} threads a rank, {args.exchange_bytes} bytes a round, "
        f"{args.ns_steps} iterations, medians of {args.steps}",
        "load": ", ".join(f"{result['load']:.1f}" for result in found),
    }
    print("\n".join(f"{name}: {text}" for name, text in machine.items()))
    print(f"\n{table(found)}")
    if args.device == "cpu" and max(args.processes) * args.threads > os.cpu_count():
        print(f"\n{CROWDED.format(os.cpu_count() // args.threads, os.cpu_count())}")
    if args.json:
        args.json.write_text(json.dumps({**machine, "results": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
