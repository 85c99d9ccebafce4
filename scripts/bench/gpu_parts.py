"""The parts of gpu_check, each run as `bench/gpu_parts.py PART FOLDER SECONDS`; checks go to FOLDER/checks.jsonl."""

import functools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# Started as a file it finds its neighbours as scripts/*.py do, and the package of this checkout.
if __name__ == "__main__":
    sys.path[:1] = map(str, Path(__file__).resolve().parents[1:3])

import torch
from torch import Tensor

from bench import train as bench_train
from bench.gpu_zero import zero  # noqa: F401  a part as well

ROOT = Path(__file__).resolve().parents[2]
# name, ok (None: a figure that is neither good nor bad), text
Say = Callable[[str, bool | None, str], None]
SHAPES = [(257, 129), (64, 64), (1000,), (1,), (3, 5, 7)]
STEPS, WARM_UP = 8, 3
# Runs of bench/step.py: model, dtype, family, candidates.
FUSED = ["copy", "cwd_adamw", "cwd_adamw_logged", "cwd_lion", "cwd_lion_logged"]
MORE = ["torch_adamw_foreach", "cwd_adamw_off", "cwd_adamw_eager", "cwd_adamw_capturable", "cwd_sgd"]
RUNS = [
    ("gpt2-124m", "fp32", "element-wise", [*FUSED, *MORE]),
    ("llama-3.2-1b", "bf16", "matrix", ["cwd_muon_bf16", "cwd_muon_logged", "cwd_muon_standard", "cwd_muon_gram"]),
    ("300-tensors", "fp32", "element-wise", FUSED),
    ("llama-3.2-1b", "bf16", "element-wise", [*FUSED, "cwd_adamw_remainder"]),
    ("llama-3.2-1b", "fp32", "element-wise", FUSED),
]
# --optim, its learning rate, dtype of the weights, bf16 autocast.
TRAININGS = [
    ("cwd_adamw", 3e-3, "float32", True),
    ("cwd_lion", 1e-3, "float32", True),
    ("cwd_muon", 3e-3, "float32", True),
    ("cwd_sgd:momentum=0.9", 0.1, "float32", True),
    ("cwd_adamw:master=remainder", 3e-3, "bfloat16", False),
]


def attempt(say: Say, name: str, check: Callable[[], tuple[bool | None, str]]) -> None:
    """One check; what it raises is a failure of it alone."""
    try:
        say(name, *check())
    except Exception as error:  # whatever it is, the other checks go on
        say(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def optimizers() -> dict[str, Callable[..., Any]]:
    """Element-wise rules, by name; all but one with a decay, so that there is a mask."""
    from hf_cwd import CWDSGD, CWDAdamW, CWDLion

    def made(cls: Any, dtype: torch.dtype, **own: Any) -> Callable[..., Any]:
        return lambda device, **more: with_parameters(cls, dtype, device, **own, **more)

    found = {}
    for name, cls, own in (("adamw", CWDAdamW, {}), ("lion", CWDLion, {}), ("sgd", CWDSGD, {"momentum": 0.9})):
        for dtype in (torch.float32, torch.bfloat16):
            found[f"{name} {str(dtype).removeprefix('torch.')}"] = made(cls, dtype, **own)
    return found | {"adamw remainder": made(CWDAdamW, torch.bfloat16, master="remainder")}


def with_parameters(
    cls: Any, dtype: torch.dtype, device: str, *, lr: float = 1e-2, **options: Any
) -> tuple[Any, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES)
    params = [torch.nn.Parameter(tensor) for tensor in made]
    for p in params:
        p.grad = torch.zeros_like(p)
    return cls(params, lr=lr, weight_decay=0.1, **options), params


def new_gradients(params: Iterable[Tensor], step: int) -> None:
    """In place, as a graph needs them; the same for every optimizer."""
    for position, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + position)
        p.grad.copy_(torch.randn(p.shape, generator=generator))


def differing(optimizers: tuple[Any, Any], params: tuple[list[Tensor], list[Tensor]]) -> list[str]:
    """What of parameters and states is not bit for bit the same."""
    wrong = []
    for p, q in zip(*params, strict=True):
        one, other = ({"parameter": x.detach(), **o.state[x]} for o, x in zip(optimizers, (p, q), strict=True))
        wrong += [f"{key} of {tuple(p.shape)}" for key in one if not torch.equal(_bits(one[key]), _bits(other[key]))]
    return wrong


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)  # a remainder may look like a NaN, which equals nothing


def versions(say: Say) -> None:
    from bench.machine import described, machine
    from hf_cwd import __version__, kernels

    about = machine("cuda", "transformers", "accelerate", "numpy")
    say("machine", None, described({key: about[key] for key in ("gpu", "driver", "cuda", "cpu", "cores")}))
    packages = ("python", "torch", "triton", "transformers", "accelerate")
    say("packages", None, described({"hf_cwd": __version__} | {key: about[key] for key in packages}))
    for device, wanted in (("cuda", "triton"), ("cpu", "c")):
        attempt(say, f"auto on {device}", lambda device=device, wanted=wanted: _chosen(kernels, device, wanted))


def _chosen(kernels: Any, device: str, wanted: str) -> tuple[bool, str]:
    found = kernels.select("auto", torch.device(device)).__name__.rpartition(".")[2]
    reason = "" if found == wanted else f" instead of {wanted}: {kernels.select(wanted, torch.device(device))}"
    return found == wanted, f"the {found} kernel{reason}"


KERNELS = ("triton:cuda", "triton:cuda:capturable", "c:cpu", "eager:cuda")  # and devices


def kernels(say: Say, chosen: Sequence[str] = KERNELS) -> None:
    """The truth table of the tests, compiled. It is a command of theirs, since scripts import no tests."""
    command = [sys.executable, "-m", "tests.kernels.on_device", *chosen]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            say(**json.loads(line))
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with status {process.returncode}")


def graph(say: Say) -> None:
    """Steps that a CUDA graph replays are those that are taken one by one, bit for bit, also with a new lr."""
    for name, make in optimizers().items():
        attempt(say, name, functools.partial(_captured, make, tensor=False))
        attempt(say, f"{name}, tensor lr", functools.partial(_captured, make, tensor=True))


def _captured(make: Callable[..., Any], *, tensor: bool) -> tuple[bool, str]:
    rates = [1e-2 / (1 + step) if tensor else 1e-2 for step in range(STEPS)]
    lrs = [torch.tensor(rates[0], device="cuda") if tensor else rates[0] for _ in range(2)]

    def follow(lr: Any, step: int) -> None:
        if tensor:
            lr.fill_(rates[step])

    (plain, one), (captured, other) = (make("cuda", capturable=True, lr=rate) for rate in lrs)
    for step in range(STEPS):
        follow(lrs[0], step)
        new_gradients(one, step)
        plain.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(WARM_UP):
            follow(lrs[1], step)
            new_gradients(other, step)
            captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    replayed = torch.cuda.CUDAGraph()
    with torch.cuda.graph(replayed):
        captured.step()
    for step in range(WARM_UP, STEPS):
        follow(lrs[1], step)
        new_gradients(other, step)
        replayed.replay()
    torch.cuda.synchronize()
    wrong = differing((plain, captured), (one, other))
    counts = {float(captured.state[p]["step"]) for p in other}
    wrong += [f"step counts {counts}"] if counts != {STEPS} else []
    return not wrong, ", ".join(wrong)


def waiting(say: Say) -> None:
    """No step waits for the GPU."""
    from hf_cwd import CWDMuon, StepStatistics

    def muon(device: str) -> tuple[Any, list[Tensor]]:
        routing = lambda groups: [  # noqa: E731
            {"params": [p for p in groups[0]["params"] if p.ndim == 2]},
            {"params": [p for p in groups[0]["params"] if p.ndim != 2], "algorithm": "adamw"},
        ]
        return with_parameters(CWDMuon, torch.float32, device, routing=routing)

    for name, make in {**optimizers(), "muon and adamw": muon}.items():
        for counting in (False, True):
            label = f"{name}{', counting' if counting else ''}"
            attempt(say, label, functools.partial(_not_waiting, make, StepStatistics if counting else lambda: None))


def _not_waiting(make: Callable[..., Any], count: Callable[[], Any]) -> tuple[bool, str]:
    optimizer, params = make("cuda")
    for step in range(4):  # the first one makes states and tables, and may wait
        new_gradients(params, step)
        optimizer.statistics = count()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return True, ""


def training(say: Say, device: str = "cuda", steps: int = 30, config: Any = None, **options: Any) -> None:
    """The real Trainer on a small Llama: the loss must fall."""
    from transformers import AutoConfig

    config = config or AutoConfig.from_pretrained(ROOT / "configs/models/llama-1m.json")
    given = {"batch_size": 8, "block_size": 128, "logging_steps": max(1, steps // 3), **options}
    for name, lr, dtype, bf16 in TRAININGS:

        def check(name: str = name, lr: float = lr, dtype: str = dtype, bf16: bool = bf16) -> tuple[bool, str]:
            with tempfile.TemporaryDirectory() as folder:
                asked = {"dtype": dtype, "bf16": bf16, "learning_rate": lr, **given}
                found = bench_train.train(config, name, device, folder, steps - 2, 2, **asked)
            losses = found["losses"]
            falls = all(map(math.isfinite, losses)) and losses[-1] < 0.95 * losses[0]
            return falls, f"loss {losses[0]:.2f} to {losses[-1]:.2f}, {found['step_ms']:.1f} ms a step"

        attempt(say, f"{name} {dtype}{', bf16 autocast' if bf16 else ''}", check)


def step(say: Say, seconds: float = 150.0, runs: Sequence[Any] = RUNS, device: str = "cuda", pairs: int = 100) -> None:
    from bench import candidates as bench_candidates
    from bench import step as bench_step
    from bench.stats import Interval
    from bench.targets import goals

    begin = time.monotonic()
    for model, dtype, family, candidates in runs:
        name = f"{model} {dtype}"
        if time.monotonic() - begin > seconds - 25:
            say(name, None, "left out: no time")
            continue
        flags = ["--device", device, "--seconds", "8", "--pairs", str(pairs), "--candidates", *candidates]
        run = bench_step.child(bench_step.parse(flags), model, dtype, 4, family)
        if isinstance(run, str):
            say(name, False, run)
            continue
        same = Interval(*(run["same"][key] for key in Interval._fields))
        conclusive = "" if run["same"]["conclusive"] else ", INCONCLUSIVE"
        say(f"{name} {run['baseline']} to itself", None, f"{same}{conclusive}, {run['rounds']} rounds, {run['memory']}")
        for key, row in run["candidates"].items():
            if key == bench_candidates.AGAIN.format(run["baseline"]):
                continue
            rate = f"{row['tflops']:.0f} TFLOP/s" if row["tflops"] else f"{row['gb_per_second']:.0f} GB/s"
            text = f"{row['ms']:.2f} ms, x{Interval(*row['ratio'].values())}, {rate}"
            text += "" if row["host_ms"] is None else f", host {row['host_ms']:.2f} ms"
            say(f"{name} {key}", None, f"{text}, +{(row['extra_bytes'] or 0) / 1e6:.1f} MB")
        for key, reason in run["left_out"].items():
            say(f"{name} {key}", False if key.startswith("cwd_") else None, reason)
        measured = [goal for goal in goals(run) if goal.measured is not None]
        held = [goal for goal in measured if goal.verdict == "holds"]
        say(f"{name} goals", None, f"{len(held)} of {len(measured)} hold")
        for goal in measured:
            if goal not in held:
                say(f"{name} goal", None, str(goal))


def train(say: Say, seconds: float = 120.0, **flags: Any) -> None:
    config = ROOT / "configs/models/llama-111m.json"
    sizes = {"batch_size": 8, "block_size": 512, "steps": 10, "rounds": 6, "seconds": max(1, seconds - 60)}
    given = {"config_name": config, **sizes, **flags}.items()
    run = bench_train.measure(bench_train.parse(["--bf16", *(str(x) for k, v in given for x in (f"--{k}", v))]))
    same = f"{run['same']['median']:.3f} [{run['same']['low']:.3f}, {run['same']['high']:.3f}]"
    say(f"{run['baseline']} to itself", None, f"{same}, {run['rounds']} rounds")
    for name, row in run["optimizers"].items():
        ratio = row["ratio"]
        text = f"{row['tokens_per_second']:.0f} tokens/s, time ratio {ratio['median']:.3f}, "
        text += (
            f"optimizer {row['optimizer_ms']:.2f} ms = {row['share']:.1%}, peak {(row['peak_bytes'] or 0) / 1e6:.0f} MB"
        )
        say(name, True, text)
    for name, reason in run["left_out"].items():
        say(name, False, reason)


def main(part: str, folder: str, seconds: str) -> None:
    def say(name: str, ok: bool | None, text: str) -> None:
        with Path(folder, "checks.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "ok": ok, "text": text}) + "\n")

    run = globals()[part]
    if part in ("training", "train", "zero"):
        bench_train.quiet()
    run(say, seconds=float(seconds)) if part in ("step", "train", "zero") else run(say)


if __name__ == "__main__":
    main(*sys.argv[1:])
