"""The part of ``hf-cwd doctor`` that needs torch: devices, kernels, and a step of every rule against its definition."""

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
    """The CPU and the accelerators, with their memory."""
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
    result = [torch.device("cpu")]
    if torch.accelerator.is_available():
        device_type = torch.accelerator.current_accelerator().type
        result += [torch.device(device_type, index) for index in range(torch.accelerator.device_count())]
    return result


def _describe(device: torch.device) -> str:
    if device.type == "mps":
        return f"{platform.processor()}, {torch.mps.recommended_max_memory() / 2**30:.1f} GiB shared with the CPU"
    properties = torch.get_device_module(device).get_device_properties(device)
    text = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if device.type == "cuda":
        text += f", compute capability {properties.major}.{properties.minor}"
    return text


def kernel_table(problems: list[str]) -> Report:
    """The module that each value of the ``kernel`` option runs on each type of device, or why it cannot run."""
    report = {}
    for device in {device.type: device for device in _devices()}.values():
        for name, kernel in _kernels(device).items():
            usable = not isinstance(kernel, Exception)
            report[f"{name} on {device.type}"] = kernel.__name__ if usable else f"not usable: {in_words(kernel)}"
            if name == "auto" and not usable:
                problems.append(f"no kernel runs on {device.type}: {in_words(kernel)}")
    return report


def _kernels(device: torch.device) -> dict[str, ModuleType | Exception]:
    """The module for each value of the ``kernel`` option, or the error of its selection."""
    result: dict[str, ModuleType | Exception] = {}
    for name in COMMON["kernel"].choices:
        try:
            result[name] = kernels.select(name, device)
        except Exception as error:
            result[name] = error
    return result


LR, WEIGHT_DECAY = 0.25, 0.5
# On the diagonal, u x is > 0, < 0, > 0 and < 0. Everywhere else u is 0.
PARAM = torch.tensor([[2.0, 1, -1, 0], [1, -2, -1, 1], [-1, 0, -1, 1], [1, 1, -1, 1]])
GRAD = torch.diag(torch.tensor([0.5, 0.5, -0.5, -0.5]))


def _muon(grad: Tensor) -> Tensor:
    # All singular values of this gradient are equal, so that Newton-Schulz is a polynomial of one number.
    s = 0.5 / torch.linalg.matrix_norm(grad)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return 0.2 * max(grad.shape) ** 0.5 * s * grad.sign()


# The direction u of the first step of each rule with its defaults, by hand. For any other rule, u is measured by a step
# without decay.
DIRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "adamw": lambda grad: grad / (grad.abs() + 1e-8),
    "lion": torch.sign,
    "muon": _muon,
    "sgd": lambda grad: grad,
}


def self_check(problems: list[str]) -> Report:
    """Compares a step of every rule, with each kernel on each device, with ``x - lr (u + wd 1[u x >= 0] x)``."""
    report = {}
    for device in _devices():
        for name, kernel in _kernels(device).items():
            if not isinstance(kernel, Exception):
                supported = [rule for rule in RULES if name == "auto" or _supports(kernel, rule)]
                report[f"{name} on {device}"] = "; ".join(_checked(rule, name, device, problems) for rule in supported)
    return report


def _supports(kernel: ModuleType, rule: str) -> bool:
    """Whether a kernel supports a rule in float32; fused kernels do not support rules of the user."""
    states = RULES[rule].state_keys(RULES[rule].defaults())
    return kernel.refusal(RULES[rule], (torch.float32,) * (2 + len(states))) is None


def _checked(rule: str, kernel: str, device: torch.device, problems: list[str]) -> str:
    # On accelerators Muon orthogonalises in bfloat16, and five iterations amplify the rounding errors. A wrong decay
    # would change an element by 0.125 or more. In float32 there are a few roundings of numbers up to 2.
    tolerance = 2e-2 if RULES[rule].matrix is not None else 2e-6
    try:
        error = (_stepped(rule, kernel, device, WEIGHT_DECAY) - _expected(rule, kernel, device)).abs().max().item()
        failure = "" if error <= tolerance else f"off by {error:.3g}"  # NaN is a failure as well
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
    by_hand = DIRECTIONS.get(rule)
    u = by_hand(GRAD.double()) if by_hand else (x - _stepped(rule, kernel, device, weight_decay=0.0)) / LR
    return x - LR * (u + WEIGHT_DECAY * torch.where(u * x >= 0, x, 0))
