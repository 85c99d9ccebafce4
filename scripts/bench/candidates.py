"""The optimizers that bench/step.py compares; each is tried on tiny tensors first, and left out with the reason.

All decay with 0.1 and step with a learning rate so small that a thousand steps change no weight's sign to speak of.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.traffic import Traffic

LR, DECAY = 1e-6, 0.1
COPY = 1 << 30  # bytes that the copy reads at once: far more than any cache holds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ELEMENTWISE, MATRIX = "element-wise", "matrix"


class Candidate(NamedTuple):
    """One row of the table.

    Attributes:
        make: gets the parameters; what it returns has ``step()`` and ``state``.
        device, dtype: where it makes sense; None is anywhere.
        temporaries: what a step needs for a while, to plan memory: "none", "tensor" or "full" for whole copies.
        private: it spoils its tensors, and shares them only with others that do.
        kernel: a ``kernel=`` of hf_cwd whose choice is worth a note.
    """

    make: Callable[[list[Tensor]], Any]
    family: str = ELEMENTWISE
    device: str | None = None
    dtype: str | None = None
    temporaries: str = "none"
    private: bool = False
    kernel: str | None = None


class Logged:
    """An optimizer of hf_cwd in a step that is logged: it collects its statistics, and they are read."""

    def __init__(self, params: list[Tensor], name: str, **options: Any) -> None:
        from hf_cwd import StepStatistics

        self.collect, self.optimizer = StepStatistics, _cwd(name, **options)(params)
        self.state = self.optimizer.state

    def step(self) -> None:
        self.optimizer.statistics = statistics = self.collect()
        self.optimizer.step()
        statistics.read()


class Copy:
    """A copy on the device that moves as many bytes as AdamW's step: half of them read, half written."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.bytes = 7 * sum(p.nbytes for p in params)  # 4 reads and 3 writes
        half = self.bytes // 2
        self.source = torch.ones(min(half, COPY), dtype=torch.uint8, device=params[0].device)
        self.target = torch.empty_like(self.source)
        self.times, self.rest = divmod(half, len(self.source)) if half else (0, 0)

    def step(self) -> None:
        for _ in range(self.times):
            self.target.copy_(self.source)
        if self.rest:
            self.target[: self.rest].copy_(self.source[: self.rest])


def _torch(name: str, **options: Any) -> Callable[[list[Tensor]], Any]:
    return lambda params: getattr(torch.optim, name)(params, lr=LR, weight_decay=DECAY, **options)


def _cwd(name: str, **options: Any) -> Callable[[list[Tensor]], Any]:
    def make(params: list[Tensor]) -> Any:
        import hf_cwd

        return getattr(hf_cwd, name)(params, lr=LR, weight_decay=DECAY, **options)

    return make


def _theirs(module: str, name: str, group: dict[str, Any] | None = None, **options: Any) -> Callable:
    """An optimizer of another package; ``group`` are keys of the only parameter group."""

    def make(params: list[Tensor]) -> Any:
        cls = getattr(importlib.import_module(module), name)
        known = inspect.signature(cls).parameters
        # Cautious Weight Decay where the package has it, so that the work is the same.
        cautious = {key: True for key in ("cautious_wd",) if key in known}
        given = params if group is None else [{"params": params, **group}]
        return cls(given, lr=LR, weight_decay=DECAY, **cautious, **options)

    return make


def _matrix(make: Callable[[list[Tensor]], Any], kernel: str | None = None) -> Candidate:
    """An optimizer of matrices only; each keeps a copy of the tensor that it works on."""
    return Candidate(make, family=MATRIX, temporaries="tensor", kernel=kernel)


CANDIDATES: dict[str, Candidate] = {
    "torch_adamw_fused": Candidate(_torch("AdamW", fused=True)),
    "torch_adamw_fused_again": Candidate(_torch("AdamW", fused=True)),
    "floor_adamw": Candidate(lambda params: Traffic(params, 2), device="cpu", dtype="fp32", private=True),
    "floor_lion": Candidate(lambda params: Traffic(params, 1), device="cpu", dtype="fp32", private=True),
    "copy": Candidate(Copy, device="cuda"),
    "torch_adamw_foreach": Candidate(_torch("AdamW", foreach=True), temporaries="full"),
    "torch_adamw_loop": Candidate(_torch("AdamW", foreach=False), temporaries="tensor"),
    "torch_sgd_fused": Candidate(_torch("SGD", fused=True, momentum=0.9)),
    "cwd_adamw": Candidate(_cwd("CWDAdamW"), kernel="auto"),
    "cwd_adamw_off": Candidate(_cwd("CWDAdamW", cautious=False), kernel="auto"),
    "cwd_adamw_logged": Candidate(lambda params: Logged(params, "CWDAdamW"), kernel="auto"),
    "cwd_adamw_c": Candidate(_cwd("CWDAdamW", kernel="c"), device="cpu"),
    "cwd_adamw_triton": Candidate(_cwd("CWDAdamW", kernel="triton"), device="cuda"),
    "cwd_adamw_eager": Candidate(_cwd("CWDAdamW", kernel="eager")),
    "cwd_adamw_remainder": Candidate(_cwd("CWDAdamW", master="remainder"), dtype="bf16", kernel="auto"),
    "cwd_adamw_fp32_states": Candidate(_cwd("CWDAdamW", state_dtype="float32"), dtype="bf16", kernel="auto"),
    "cwd_adamw_capturable": Candidate(_cwd("CWDAdamW", capturable=True), device="cuda", kernel="auto"),
    "cwd_lion": Candidate(_cwd("CWDLion"), kernel="auto"),
    "cwd_lion_off": Candidate(_cwd("CWDLion", cautious=False), kernel="auto"),
    "cwd_lion_logged": Candidate(lambda params: Logged(params, "CWDLion"), kernel="auto"),
    "cwd_lion_eager": Candidate(_cwd("CWDLion", kernel="eager")),
    "cwd_sgd": Candidate(_cwd("CWDSGD", momentum=0.9), kernel="auto"),
    "cwd_sgd_eager": Candidate(_cwd("CWDSGD", momentum=0.9, kernel="eager")),
    "deepspeed_adam": Candidate(_theirs("deepspeed.ops.adam", "DeepSpeedCPUAdam"), device="cpu"),
    "deepspeed_lion": Candidate(_theirs("deepspeed.ops.lion", "DeepSpeedCPULion"), device="cpu"),
    "lion_pytorch": Candidate(_theirs("lion_pytorch", "Lion"), temporaries="tensor"),
    "pytorch_optimizer_adamw": Candidate(_theirs("pytorch_optimizer", "AdamW"), temporaries="full"),
    "pytorch_optimizer_lion": Candidate(_theirs("pytorch_optimizer", "Lion"), temporaries="full"),
    "dion_adamw": Candidate(_theirs("dion", "Muon", {"algorithm": "adamw"}), temporaries="full"),
    "dion_lion": Candidate(_theirs("dion", "Muon", {"algorithm": "lion"}), temporaries="full"),
    "torch_muon": _matrix(_torch("Muon", adjust_lr_fn="match_rms_adamw")),
    "torch_muon_again": _matrix(_torch("Muon", adjust_lr_fn="match_rms_adamw")),
    "cwd_muon": _matrix(_cwd("CWDMuon"), kernel="auto"),
    "cwd_muon_bf16": _matrix(_cwd("CWDMuon", ns_dtype="bfloat16"), kernel="auto"),
    "cwd_muon_off": _matrix(_cwd("CWDMuon", ns_dtype="bfloat16", cautious=False), kernel="auto"),
    "cwd_muon_logged": _matrix(lambda params: Logged(params, "CWDMuon", ns_dtype="bfloat16"), kernel="auto"),
    "cwd_muon_eager": _matrix(_cwd("CWDMuon", ns_dtype="bfloat16", kernel="eager")),
    "dion_muon": _matrix(_theirs("dion", "Muon", nesterov=True, adjust_lr="rms_norm")),
    "pytorch_optimizer_muon": _matrix(_theirs("pytorch_optimizer", "Muon", {"use_muon": True}, use_adjusted_lr=True)),
}
BASELINES = {ELEMENTWISE: "torch_adamw_fused", MATRIX: "torch_muon"}
AGAIN = "{}_again"


def candidates() -> dict[str, Candidate]:
    """All of them, with a CWDMuon for each form of the iteration that the rule offers."""
    from hf_cwd.rules import RULES

    forms = getattr(RULES["muon"].hyperparameters.get("ns"), "choices", ())
    return CANDIDATES | {
        f"cwd_muon_{form}": _matrix(_cwd("CWDMuon", ns_dtype="bfloat16", ns=form), kernel="auto")
        for form in forms
        if form != "auto"  # cwd_muon_bf16
    }


def states(optimizer: Any, p: Tensor) -> dict[str, Tensor]:
    """The tensors of an optimizer's state that a step reads and writes whole; a step number is none."""
    found = optimizer.state.get(p, {}).items()
    return {
        key: value
        for key, value in found
        if isinstance(value, Tensor) and key != "step" and value.numel() == p.numel() and value.device == p.device
    }


def traffic(optimizer: Any, params: Sequence[Tensor]) -> int:
    """Bytes that a step must read and write: parameters and states twice, gradients once."""
    if isinstance(optimizer, Copy):
        return optimizer.bytes
    state = sum(t.nbytes for p in params for t in states(optimizer, p).values())
    return 2 * state + sum(2 * p.nbytes + p.grad.nbytes for p in params)


def iteration_flops(params: Sequence[Tensor], steps: int = 5) -> int:
    """Floating-point operations of the plain form of Muon's iteration, by which all forms are rated."""
    sides = [sorted(p.shape) for p in params]
    return sum(steps * (4 * short**2 * long + 2 * short**3) for short, long in sides)


def try_out(candidate: Candidate, dtype: torch.dtype, device: str) -> tuple[str | None, dict[str, torch.dtype]]:
    """Two steps of tiny tensors: why the candidate cannot run here, if so, and which states it keeps."""
    shapes = [(16, 8), (8, 24)] if candidate.family == MATRIX else [(16, 8), (24,), (3, 5)]
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype, device=device)) for shape in shapes]
    for p in params:
        p.grad = torch.full_like(p, 0.01)
    try:
        optimizer = candidate.make(params)
        optimizer.step()
        optimizer.step()
        if not candidate.private and not all(math.isfinite(p.detach().sum().item()) for p in params):
            return "its step leaves no finite numbers", {}
        return None, {key: value.dtype for key, value in states(optimizer, params[0]).items()}
    except ModuleNotFoundError as error:
        return f"not installed ({error.name})", {}
    except Exception as error:  # whatever a package of somebody else's raises is its reason
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}", {}


def kernel_of(candidate: Candidate, device: str) -> str | None:
    """The kernel that ``kernel=`` stands for on a device."""
    if candidate.kernel is None:
        return None
    from hf_cwd import kernels

    return kernels.select(candidate.kernel, torch.device(device)).__name__.rpartition(".")[2]
