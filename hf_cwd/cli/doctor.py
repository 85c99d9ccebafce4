"""``hf-cwd doctor``: prints what a bug report should contain, also if torch cannot be imported."""

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
# Variables that choose the number of processes, the sharding and the devices. None may hold a token.
VARIABLES = ("ACCELERATE_", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "FSDP_", "LOCAL_RANK", "PARALLELISM_CONFIG_")
VARIABLES += ("PYTORCH_", "RANK", "TORCH_", "TRITON_", "WORLD_SIZE")
OPERATION = "deepspeed_shm_comm"  # DeepSpeed's communication between ranks without an accelerator
NOT_NEEDED = "not needed with an accelerator"
STALE = 15 * 60  # seconds; no compilation takes longer

Report = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def main(args: argparse.Namespace) -> int:
    """Prints the report. Returns 1 if a problem keeps hf_cwd from training, else 0."""
    problems: list[str] = []
    reports: dict[str, Report] = {}
    for title, section in SECTIONS.items():
        try:
            # Some packages print when they are imported, which would make the JSON invalid.
            with contextlib.redirect_stdout(sys.stderr):
                reports[title] = section(problems)
        except Exception as error:  # the other sections must be reported nevertheless
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
    """The versions of all packages that a run may use; those that hf_cwd requires must be supported."""
    report = {
        "hf_cwd": f"{hf_cwd.__version__}, {Path(hf_cwd.__file__).parent}",
        "python": f"{platform.python_version()}, {sys.executable}",
        "platform": platform.platform(),
    }
    try:
        required = _required()
    except importlib.metadata.PackageNotFoundError:
        required = {}
        report["hf_cwd"] += ", not installed by pip: which versions of other packages it supports is not known"
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
    """The version of a package or why there is none, and whether hf_cwd can use it."""
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
    """The back-ends of torch.distributed that this torch was built with."""
    import torch

    if not torch.distributed.is_available():
        return {"torch.distributed": "not in this build of torch: one process only"}
    backends = ("gloo", "nccl", "mpi", "xccl", "ucc")
    return {name: "yes" if torch.distributed.is_backend_available(name) else "no" for name in backends}


def deepspeed(problems: list[str]) -> Report:
    """DeepSpeed's version, and whether it can compile its communication. Nothing is compiled here."""
    import torch

    from hf_cwd.distributed.deepspeed_zero import TESTED
    from hf_cwd.trainer.deepspeed import missing_tools

    version, works = _package("deepspeed", None)
    if not works:
        return {"deepspeed": f"{version}; tested: {TESTED}"}
    low, high = map(Version, TESTED.split(" to "))
    is_tested = low <= Version(Version(version).public) <= high
    report = {"deepspeed": f"{version}, {'tested' if is_tested else f'not tried with hf_cwd: tests run with {TESTED}'}"}
    folder = _compiled()
    report["compiled operations"] = str(folder)
    if torch.accelerator.is_available():
        return report | {"compiler and ninja": NOT_NEEDED, OPERATION: NOT_NEEDED}
    report["compiler and ninja"] = "found"
    if missing := " and ".join(missing_tools()):
        report["compiler and ninja"] = f"missing: {missing}"
        tools = {"compiler": "apt install g++", "ninja": "pip install ninja"}
        problems.append(
            f"without an accelerator DeepSpeed must compile its communication, and {missing} is missing; try: "
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
            f"an interrupted compilation has left {lock}, and every start of DeepSpeed waits for it: delete that file"
        )
    return report


def _compiled() -> Path:
    """The folder in which torch keeps extensions that are compiled at their first use, each in a folder of its own."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    import torch
    from torch.utils import cpp_extension

    platforms = {"rocm": torch.version.hip, "cu": torch.version.cuda}
    built_for = next((f"{name}{text.replace('.', '')}" for name, text in platforms.items() if text), "cpu")
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(cpp_extension.get_default_build_root()) / f"{python}_{built_for}"


def optimizers(problems: list[str]) -> Report:
    """Whether our names are registered in transformers, and whether TrainingArguments accept them here."""
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
    """The environment variables that change how a run is set up."""
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    return variables or {"variables": f"none of {', '.join(VARIABLES)}"}


def _self_check() -> ModuleType:
    return importlib.import_module("hf_cwd.cli.self_check")  # it imports torch; if that fails, only its sections do


SECTIONS: dict[str, Callable[[list[str]], Report]] = {
    "Environment": environment,  # first, because packages set variables when they are imported
    "Versions": versions,
    "Devices": lambda problems: _self_check().devices(problems),
    "Kernels": lambda problems: _self_check().kernel_table(problems),
    "Distributed back-ends": distributed,
    "DeepSpeed": deepspeed,
    "Optimizers": optimizers,
    "Self-check": lambda problems: _self_check().self_check(problems),
}
