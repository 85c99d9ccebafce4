"""The part of ``hf-cwd doctor`` that needs torch: devices, kernels, and a step of every rule by its definition."""

import os
import platform
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from hf_cwd import kernels
from hf_cwd.cli.errors import in_words
from hf_cwd.optim.optimizer import CWDOptimizer
from hf_cwd.rules import COMMON, RULES

Report = dict[str, str]


def devices(problems: list[str]) -> Report:
    """Processors and their memory."""
    threads = f"{torch.get_num_threads()} threads, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}"
    report = {"cpu": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {threads}"}
    for device in _devices()[1:]:
        try:
            report[str(device)] = _describe(device)
        except Exception as error:
            report[str(device)] = f"broken: {in_words(error)}"
            problems.append(f"{device} is broken: {in_words(error)}")
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
            report[f"{name} on {device.type}"] = found.__name__ if usable else f"not usable: {in_words(found)}"
            if name == "auto" and not usable:
                problems.append(f"no kernel runs on {device.type}: {in_words(found)}")
    return report


def _kernels(device: torch.device) -> dict[str, ModuleType | Exception]:
    found: dict[str, ModuleType | Exception] = {}
    for name in COMMON["kernel"].choices:
        try:
            found[name] = kernels.select(name, device)
        except Exception as error:
            found[name] = error
    return found


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
                taken = [rule for rule in RULES if kernel == "auto" or _takes(found, rule)]
                report[f"{kernel} on {device}"] = "; ".join(_checked(rule, kernel, device, problems) for rule in taken)
    return report


def _takes(kernel: ModuleType, rule: str) -> bool:
    """Whether a kernel has this rule in float32; that of the user's own is not in the fused ones."""
    states = RULES[rule].state_keys({name: kind.default for name, kind in RULES[rule].hyperparameters.items()})
    return kernel.refusal(RULES[rule], (torch.float32,) * (2 + len(states))) is None


def _checked(rule: str, kernel: str, device: torch.device, problems: list[str]) -> str:
    # Off the CPU Muon's matrices are orthogonalised in bfloat16, whose roundings five iterations amplify; a decay that
    # is wrongly there or not moves an element by 0.125 or more. In float32, a few roundings of numbers up to 2.
    tolerance = 2e-2 if RULES[rule].matrix is not None else 2e-6
    try:
        error = (_stepped(rule, kernel, device, WEIGHT_DECAY) - _expected(rule, kernel, device)).abs().max().item()
        failure = "" if error <= tolerance else f"off by {error:.3g}"  # so written, NaN is a failure
    except Exception as raised:
        failure = in_words(raised)
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
