"""``hf-cwd doctor``: what a bug report should say, and whether every rule steps as it is defined on this machine."""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from packaging.requirements import Requirement
from torch import Tensor

import hf_cwd
from hf_cwd import kernels
from hf_cwd.cli import enable
from hf_cwd.optimizer import CWDOptimizer
from hf_cwd.rules import COMMON, RULES
from hf_cwd.trainer.options import handler, names

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "deepspeed", "peft", "trl", "triton")
# What decides how many processes there are, who shards, and where it runs; never a token.
VARIABLES = ("ACCELERATE_", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "FSDP_", "LOCAL_RANK", "PARALLELISM_CONFIG_")
VARIABLES += ("PYTORCH_", "RANK", "TORCH_", "TRITON_", "WORLD_SIZE")

Report = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def main(args: argparse.Namespace) -> int:
    """Prints the report; 1 if there is a problem that keeps hf_cwd from training, else 0."""
    problems: list[str] = []
    reports: dict[str, Report] = {}
    for title, section in SECTIONS.items():
        try:
            # Packages print while they are imported, which would spoil the JSON.
            with contextlib.redirect_stdout(sys.stderr):
                reports[title] = section(problems)
        except Exception as error:  # whatever is broken, the other sections must be reported
            reports[title] = {"error": _text(error)}
            problems.append(f"{title}: {_text(error)}")
        if not args.json:
            lines = (f"  {label}: {value}" for label, value in reports[title].items())
            print(f"{title}:", *lines, sep="\n", flush=True)
    if args.json:
        print(json.dumps({**reports, "Problems": problems}, indent=2))
    else:
        print("Problems:", *(f"  {problem}" for problem in problems or ["none"]), sep="\n")
    return 1 if problems else 0


def versions(problems: list[str]) -> Report:
    """Every package that a run may meet; what hf_cwd requires must be there and new enough."""
    report = {
        "hf_cwd": f"{hf_cwd.__version__}, {Path(hf_cwd.__file__).parent}",
        "python": f"{platform.python_version()}, {sys.executable}",
        "platform": platform.platform(),
    }
    try:
        required = _required()
    except importlib.metadata.PackageNotFoundError:
        required = {}
        report["hf_cwd"] += ", not installed by pip: which versions of others it supports is not known"
    for name in PACKAGES:
        report[name], works = _package(name, required.get(name))
        if not works and name in required:
            problems.append(f"{name} {report[name]}; try: pip install -U '{required[name]}'")
    report["torch"] += f", {_build()}"
    return report


def _required() -> dict[str, Requirement]:
    requirements = map(Requirement, importlib.metadata.requires("hf_cwd") or ())
    return {r.name: r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}


def _package(name: str, required: Requirement | None) -> tuple[str, bool]:
    """A package in words, and whether hf_cwd can use it."""
    try:
        version = getattr(importlib.import_module(name), "__version__", None) or importlib.metadata.version(name)
    except (Exception, SystemExit) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        return "not installed" if absent else f"broken: {_text(error)}", False
    if required is not None and not required.specifier.contains(version, prereleases=True):
        return f"{version}, not supported: hf_cwd needs {required}", False
    return version, True


def _build() -> str:
    for name, version in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip), ("XPU", torch.version.xpu)):
        if version:
            return f"built for {name} {version}"
    return f"built for {'MPS' if torch.backends.mps.is_built() else 'the CPU'}"


def devices(problems: list[str]) -> Report:
    """Processors and their memory."""
    threads = f"{torch.get_num_threads()} threads, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}"
    report = {"cpu": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {threads}"}
    for device in _devices()[1:]:
        try:
            report[str(device)] = _describe(device)
        except Exception as error:
            report[str(device)] = f"broken: {_text(error)}"
            problems.append(f"{device} is broken: {_text(error)}")
    if len(report) == 1:
        report["accelerator"] = "none that this torch can use"
    return report


def _devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        found += [torch.device(kind, index) for index in range(torch.accelerator.device_count())]
    return found


def _describe(device: torch.device) -> str:
    if device.type == "mps":
        return f"{platform.processor()}, {torch.mps.recommended_max_memory() / 2**30:.1f} GiB shared with the CPU"
    properties = torch.get_device_module(device).get_device_properties(device)
    text = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if device.type == "cuda":
        text += f", compute capability {properties.major}.{properties.minor}"
    return text


def kernel_table(problems: list[str]) -> Report:
    """What each value of the ``kernel`` option runs on each kind of device, or why it cannot."""
    report = {}
    for device in {device.type: device for device in _devices()}.values():
        for name, found in _kernels(device).items():
            usable = not isinstance(found, Exception)
            report[f"{name} on {device.type}"] = found.__name__ if usable else f"not usable: {_text(found)}"
            if name == "auto" and not usable:
                problems.append(f"no kernel runs on {device.type}: {_text(found)}")
    return report


def _kernels(device: torch.device) -> dict[str, ModuleType | Exception]:
    found: dict[str, ModuleType | Exception] = {}
    for name in COMMON["kernel"].choices:
        try:
            found[name] = kernels.select(name, device)
        except Exception as error:
            found[name] = error
    return found


def distributed(problems: list[str]) -> Report:
    """Back-ends that this torch was built with."""
    if not torch.distributed.is_available():
        return {"torch.distributed": "not in this build of torch: one process only"}
    backends = ("gloo", "nccl", "mpi", "xccl", "ucc")
    return {name: "yes" if torch.distributed.is_backend_available(name) else "no" for name in backends}


def optimizers(problems: list[str]) -> Report:
    """Whether transformers knows our names, and whether TrainingArguments take them in this environment."""
    arguments = importlib.import_module("transformers.training_args")
    handlers = importlib.import_module("transformers.trainer_optimizer")._OPTIMIZER_HANDLERS
    members = {member.value: member for member in arguments.OptimizerNames}
    report = {}
    for name in names():
        try:
            if handlers.get(members.get(name)) is not handler:
                raise LookupError("not registered" if name not in members else "its handler is not hf_cwd's")
            arguments.TrainingArguments(optim=name, report_to="none")
            report[f"--optim {name}"] = f"registered, rule {name.removeprefix('cwd_')}"
        except Exception as error:
            report[f"--optim {name}"] = _text(error)
            problems.append(f"--optim {name}: {_text(error)}")
    startup = Path(sysconfig.get_path("purelib")) / f"{enable.MODULE}.pth"
    report["hf-cwd enable"] = f"active, by {startup}" if startup.is_file() else "not active"
    return report


def environment(problems: list[str]) -> Report:
    """Variables that change how a run is set up."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    return found or {"variables": f"none of {', '.join(VARIABLES)}"}


LR, WEIGHT_DECAY = 0.25, 0.5
# With the gradient below, each agreement of signs once: u x > 0, u x < 0, and again; u = 0 wherever else.
PARAM = torch.tensor([[2.0, 1, -1, 0], [1, -2, -1, 1], [-1, 0, -1, 1], [1, 1, -1, 1]])
GRAD = torch.diag(torch.tensor([0.5, 0.5, -0.5, -0.5]))


def _muon(grad: Tensor) -> Tensor:
    # All singular values of this gradient are equal, so that Newton-Schulz is the polynomial of one number.
    s = 0.5 / torch.linalg.matrix_norm(grad)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return 0.2 * max(grad.shape) ** 0.5 * s * grad.sign()


# u of the first step of each rule at its defaults, by hand. A rule that is not here is held to its own u without decay.
DIRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "adamw": lambda grad: grad / (grad.abs() + 1e-8),
    "lion": torch.sign,
    "muon": _muon,
    "sgd": lambda grad: grad,
}


def self_check(problems: list[str]) -> Report:
    """A step of every rule, by each kernel on each device, against ``x - lr (u + wd 1[u x >= 0] x)``."""
    report = {}
    for device in _devices():
        for kernel, found in _kernels(device).items():
            if not isinstance(found, Exception):
                report[f"{kernel} on {device}"] = "; ".join(_checked(rule, kernel, device, problems) for rule in RULES)
    return report


def _checked(rule: str, kernel: str, device: torch.device, problems: list[str]) -> str:
    # Muon's matrices are orthogonalised in bfloat16, whose roundings five iterations amplify; a decay that is wrongly
    # there or not moves an element by 0.125 or more. In float32, a few roundings of numbers up to 2.
    tolerance = 2e-2 if RULES[rule].matrix is not None else 2e-6
    try:
        error = (_stepped(rule, kernel, device, WEIGHT_DECAY) - _expected(rule, kernel, device)).abs().max().item()
        failure = "" if error <= tolerance else f"off by {error:.3g}"  # so written, NaN is a failure
    except Exception as raised:
        failure = _text(raised)
    if failure:
        problems.append(f"{rule} does not step as defined, {kernel} kernel on {device}: {failure}")
    return f"{rule} {'FAILED, ' + failure if failure else 'ok'}"


def _stepped(rule: str, kernel: str, device: torch.device, weight_decay: float) -> Tensor:
    x = torch.nn.Parameter(PARAM.to(device, copy=True))
    x.grad = GRAD.to(device, copy=True)
    CWDOptimizer([x], LR, algorithm=rule, weight_decay=weight_decay, kernel=kernel).step()
    return x.detach().cpu().double()


def _expected(rule: str, kernel: str, device: torch.device) -> Tensor:
    x = PARAM.double()
    known = DIRECTIONS.get(rule)
    u = known(GRAD.double()) if known else (x - _stepped(rule, kernel, device, weight_decay=0.0)) / LR
    return x - LR * (u + WEIGHT_DECAY * torch.where(u * x >= 0, x, 0))


def _text(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


SECTIONS: dict[str, Callable[[list[str]], Report]] = {
    "Environment": environment,  # before others are imported, for some of them set variables
    "Versions": versions,
    "Devices": devices,
    "Kernels": kernel_table,
    "Distributed back-ends": distributed,
    "Optimizers": optimizers,
    "Self-check": self_check,
}
