"""``hf-cwd doctor``: what a bug report should say, also where torch cannot be imported."""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from packaging.requirements import Requirement
from packaging.version import Version

import hf_cwd
from hf_cwd.cli import enable
from hf_cwd.cli.errors import in_words

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "deepspeed", "peft", "trl", "triton")
# What decides how many processes there are, who shards, and where it runs; never a token.
VARIABLES = ("ACCELERATE_", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "FSDP_", "LOCAL_RANK", "PARALLELISM_CONFIG_")
VARIABLES += ("PYTORCH_", "RANK", "TORCH_", "TRITON_", "WORLD_SIZE")
OPERATION = "deepspeed_shm_comm"  # with which DeepSpeed's ranks communicate where there is no accelerator
NOT_NEEDED = "not needed with an accelerator"
STALE = 15 * 60  # seconds, after which nobody is compiling any more

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
            reports[title] = {"error": in_words(error)}
            problems.append(f"{title}: {in_words(error)}")
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
    if "torch" in sys.modules:
        report["torch"] += f", {_build(sys.modules['torch'])}"
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
        return "not installed" if absent else f"broken: {in_words(error)}", False
    if required is not None and not required.specifier.contains(version, prereleases=True):
        return f"{version}, not supported: hf_cwd needs {required}", False
    return version, True


def _build(torch: ModuleType) -> str:
    for name, version in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip), ("XPU", torch.version.xpu)):
        if version:
            return f"built for {name} {version}"
    return f"built for {'MPS' if torch.backends.mps.is_built() else 'the CPU'}"


def distributed(problems: list[str]) -> Report:
    """Back-ends that this torch was built with."""
    import torch

    if not torch.distributed.is_available():
        return {"torch.distributed": "not in this build of torch: one process only"}
    backends = ("gloo", "nccl", "mpi", "xccl", "ucc")
    return {name: "yes" if torch.distributed.is_backend_available(name) else "no" for name in backends}


def deepspeed(problems: list[str]) -> Report:
    """Its version, and whether it can compile what it needs when processes meet; nothing is compiled here."""
    import torch

    from hf_cwd.distributed.deepspeed_zero import TESTED
    from hf_cwd.trainer.deepspeed import missing_tools

    found, works = _package("deepspeed", None)
    if not works:
        return {"deepspeed": f"{found}; tested: {TESTED}"}
    low, high = map(Version, TESTED.split(" to "))
    is_tested = low <= Version(Version(found).public) <= high
    report = {"deepspeed": f"{found}, {'tested' if is_tested else f'not tried with hf_cwd: tests run with {TESTED}'}"}
    folder = _compiled()
    report["compiled operations"] = str(folder)
    if torch.accelerator.is_available():
        return report | {"compiler and ninja": NOT_NEEDED, OPERATION: NOT_NEEDED}
    report["compiler and ninja"] = "found"
    if missing := " and ".join(missing_tools()):
        report["compiler and ninja"] = f"missing: {missing}"
        tools = {"compiler": "apt install g++", "ninja": "pip install ninja"}
        problems.append(
            f"without an accelerator DeepSpeed compiles its communication, and lacks {missing}; try: "
            + ", ".join(command for tool, command in tools.items() if tool in missing)
        )
    is_compiled = any((folder / OPERATION).glob(f"{OPERATION}*.so"))
    report[OPERATION] = "compiled" if is_compiled else "will be compiled at the first start, which takes about a minute"
    lock = folder / OPERATION / "lock"
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return report
    if age < STALE:
        report[OPERATION] = f"being compiled by another process since {age:.0f} s"
    else:
        report[OPERATION] = f"locked since {age / 60:.0f} minutes"
        problems.append(
            f"a compilation that was interrupted has left {lock}, and every start of DeepSpeed waits until it is gone: "
            "delete that file"
        )
    return report


def _compiled() -> Path:
    """The folder of the operations that are compiled when they are first used, each of which has one of its own."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    import torch
    from torch.utils import cpp_extension

    kinds = {"rocm": torch.version.hip, "cu": torch.version.cuda}
    kind = next((f"{name}{text.replace('.', '')}" for name, text in kinds.items() if text), "cpu")
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(cpp_extension.get_default_build_root()) / f"{python}_{kind}"


def optimizers(problems: list[str]) -> Report:
    """Whether transformers knows our names, and whether TrainingArguments take them in this environment."""
    from hf_cwd.trainer.handler import handler
    from hf_cwd.trainer.optim_names import names

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
            report[f"--optim {name}"] = in_words(error)
            problems.append(f"--optim {name}: {in_words(error)}")
    startup = Path(sysconfig.get_path("purelib")) / f"{enable.MODULE}.pth"
    report["hf-cwd enable"] = f"active, by {startup}" if startup.is_file() else "not active"
    return report


def environment(problems: list[str]) -> Report:
    """Variables that change how a run is set up."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    return found or {"variables": f"none of {', '.join(VARIABLES)}"}


def _self_check() -> ModuleType:
    return importlib.import_module("hf_cwd.cli.self_check")  # it needs torch, and its error is that section's


SECTIONS: dict[str, Callable[[list[str]], Report]] = {
    "Environment": environment,  # before others are imported, for some of them set variables
    "Versions": versions,
    "Devices": lambda problems: _self_check().devices(problems),
    "Kernels": lambda problems: _self_check().kernel_table(problems),
    "Distributed back-ends": distributed,
    "DeepSpeed": deepspeed,
    "Optimizers": optimizers,
    "Self-check": lambda problems: _self_check().self_check(problems),
}
