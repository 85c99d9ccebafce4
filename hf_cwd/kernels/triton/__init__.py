"""Fused kernels for GPUs, in Triton: one launch steps all tensors of one combination of dtypes, whatever their groups.

Nothing here waits for the device. A changed hyper-parameter compiles nothing again. While only hyper-parameters, step
numbers or gradients' addresses change, a step sends one small copy to the device. A twin of
:mod:`hf_cwd.kernels.eager`, see :class:`hf_cwd.kernels.interface.Row`; with ``TRITON_INTERPRET=1`` it also
runs on a CPU, for tests.
"""

import functools
import os
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_cwd.kernels.interface import COLUMNS, Item, Sums, Workspace
from hf_cwd.kernels.triton import tables
from hf_cwd.rules import adamw, lion, muon, sgd
from hf_cwd.rules.base import Rule

# Elements of a chunk, and warps of the program that steps it: each thread has 16 bytes of a bfloat16 tensor. On an H100
# that is the best for all operations together, of chunks of 1024 to 8192 and 4 to 16 warps. Programs that step several
# chunks gain 3 % where everything is bfloat16, and lose 7 % elsewhere.
BLOCK = 1024
WARPS = 4

OLDEST = (3, 6)  # of Triton: before it div_rn and sqrt_rn flush denormals (3.6 to 3.9 do not)
CAPABILITY = (8, 0)  # the least that Triton supports of NVIDIA's
NUMBERS = (torch.float32, torch.bfloat16, torch.float16)
OPERATIONS = {adamw.direction: "adamw", lion.direction: "lion", sgd.direction: "momentum", muon.direction: "momentum"}
STATES = {adamw.direction: 2, lion.direction: 1, sgd.direction: 1, muon.direction: 1}


def unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot run on a device; None if they can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        return "the Triton kernels are for CUDA and ROCm devices"
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"Triton {triton.__version__} is older than {OLDEST[0]}.{OLDEST[1]}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < CAPABILITY:
        return "Triton needs a GPU of compute capability 8.0 or newer"
    return None


def refusal(rule: Rule, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why a rule cannot run on these dtypes, see :class:`hf_cwd.kernels.interface.Kernel`."""
    if rule.direction not in OPERATIONS:
        return f"the rule {rule.name}, which has no fused form"
    param, grad, *others = dtypes
    states, outs = others[: STATES[rule.direction]], others[STATES[rule.direction] :]
    named = [("parameters", param), ("gradients", grad)]
    named += [("states", dtype) for dtype in states] + [("directions", dtype) for dtype in outs]
    return _refused(named) or ("states of different dtypes" if len(set(states)) > 1 else None)


def refusal_to_apply(dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why given directions cannot be applied, see :class:`hf_cwd.kernels.interface.Kernel`."""
    return _refused(list(zip(("parameters", "directions"), dtypes, strict=True)))


def _refused(named: Sequence[tuple[str, torch.dtype]]) -> str | None:
    refused = (f"{str(dtype).removeprefix('torch.')} {name}" for name, dtype in named if dtype not in NUMBERS)
    return next(refused, None)


def update(
    rule: Rule, items: Sequence[Item], sums: Sums | None, workspace: Workspace, last: tables.Written | None
) -> tables.Written | None:
    """One step of an element-wise rule, see :class:`hf_cwd.kernels.interface.Kernel`."""
    if not items:
        return None
    device, operation, scales = items[0].param.device, OPERATIONS[rule.direction], [1.0] * len(items)
    with _on(device):
        table = None if last is None or _capturing(device) else last.again(rule, items)
        if table is not None:
            _launches(operation, table, items, scales, sums)
            return last
    tasks = [
        (i.param, i.grad, *i.buffers) if i.remainder is None else (i.param, i.grad, *i.buffers, i.remainder)
        for i in items
    ]
    new = tables.rows(rule, items)
    table = _run(operation, rule, items, tasks, new, scales, sums, workspace)
    return tables.Written.of(table, new.places) if table.is_aligned and not _capturing(device) else last


def directions(rule: Rule, items: Sequence[Item], outs: Sequence[Tensor], workspace: Workspace) -> None:
    """The directions before the matrix stage, see :class:`hf_cwd.kernels.interface.Kernel`."""
    tasks = [(u, item.grad, *item.buffers) for u, item in zip(outs, items, strict=True)]
    if items:
        _run("directions", rule, items, tasks, tables.rows(rule, items), [1.0] * len(items), None, workspace)


def apply(
    items: Sequence[Item],
    directions: Sequence[Tensor],
    scales: Sequence[float],
    sums: Sums | None,
    workspace: Workspace,
) -> None:
    """Decay, and apply directions that are known, see :class:`hf_cwd.kernels.interface.Kernel`."""
    tasks = [
        (item.param, u) if item.remainder is None else (item.param, u, item.remainder)
        for item, u in zip(items, directions, strict=True)
    ]
    if items:
        _run("apply", "any rule", items, tasks, tables.rows_to_apply(items, scales), scales, sums, workspace)


def _run(
    operation: str,
    owner: Hashable,
    items: Sequence[Item],
    tasks: Sequence[tuple[Tensor, ...]],
    new: tables.Rows,
    scales: Sequence[float],
    sums: Sums | None,
    workspace: Workspace,
) -> tables.Table:
    """Launches an operation on all tasks: x (or the output), the gradient (or the direction), states, remainder.

    Returns the table that it wrote.

    Args:
        owner: each has tables of its own: one that a rule goes on with must not be written for another one's tensors.
        new: the rows of the items.
    """
    device = tasks[0][0].device
    own = workspace.tables.setdefault((operation, owner, device), tables.Tables())
    with _on(device):
        table = own.written(tasks, new, block=BLOCK, capturing=_capturing(device))
        _launches(operation, table, items, scales, sums)
    return table


def _on(device: torch.device) -> AbstractContextManager:
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _launches(
    operation: str, table: tables.Table, items: Sequence[Item], scales: Sequence[float], sums: Sums | None
) -> None:
    if table.is_computed:
        kernels().fill_rows[(table.used,)](table.sources, table.numbers, table.templates, table.rows, **_EXACT)
    numbers = None
    if sums is not None:
        numbers = torch.zeros(len(items), tables.PLACES, COLUMNS, dtype=torch.float64, device=table.device)
    for launch in table.launches:
        _launch(operation, launch, table.rows, numbers)
    if sums is not None:
        sums.add([items[k] for k in table.order], [scales[k] for k in table.order], numbers.sum(1))


# No contraction of a product and a sum: where one is meant the kernels say so.
_EXACT = {"enable_fp_fusion": False}


def _launch(operation: str, launch: tables.Launch, rows: Tensor, numbers: Tensor | None) -> None:
    x, g, *states = launch.dtypes
    remainder = torch.int16 in states
    states = states[: len(states) - remainder]
    kernels().walk[(len(launch.places),)](
        *(launch.tensors, launch.places, rows, None if numbers is None else numbers[launch.first :]),
        OP=operation,
        X=_type(torch.int16 if remainder else x),
        G=_type(g),
        S=_type(states[0] if states else x),
        STATES=len(states),
        REMAINDER=remainder,
        SUM=numbers is not None,
        VECTOR=vector(launch.dtypes) if launch.aligned else 1,
        BLOCK=BLOCK,
        num_warps=WARPS,
        **_EXACT,
    )


def vector(dtypes: Sequence[torch.dtype]) -> int:
    """How many elements fill 16 bytes of the widest dtype.

    A thread then has the same elements of all tensors. With 16 bytes of each, what it has of bfloat16 tensors would
    have to be exchanged with other threads to meet float32 ones.
    """
    return tables.ALIGNMENT // max(dtype.itemsize for dtype in dtypes)


@functools.cache
def kernels() -> ModuleType:
    """The module of the kernels themselves. It imports Triton, and so is imported when they are needed."""
    from hf_cwd.kernels.triton import ops

    return ops


@functools.cache
def _type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))
