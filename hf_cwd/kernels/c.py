"""The fused CPU kernel: cwd.c through ctypes. One pass over memory a step, in torch's own OpenMP threads."""

import contextlib
import ctypes
import os
import sys
from array import array
from collections.abc import Sequence
from functools import cache as once
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_cwd.kernels import build
from hf_cwd.kernels.interface import COLUMNS, Item, RowOf, Sums, Workspace, apply_row, row_of
from hf_cwd.rules import adamw, lion, muon, sgd
from hf_cwd.rules.base import Rule

# As the enums of cwd.c.
ADAMW, LION, MOMENTUM, DIRECTIONS, APPLY = range(5)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MASTER = 3
LEVELS = ("baseline", "x86-64-v3", "x86-64-v4")

OPERATIONS = {adamw.direction: ADAMW, lion.direction: LION, sgd.direction: MOMENTUM, muon.direction: MOMENTUM}


class _Job(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("op", "x", "g", "m", "v", "sum", "level", "threads")),
        ("tensors", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("tensor", "rows", "sums")),
        ("next", ctypes.c_int64),
    )


@once
def _load() -> ctypes.CDLL | str:
    try:
        library = ctypes.CDLL(str(build.library()))
    except (build.BuildError, OSError) as error:
        return str(error)
    library.cwd_run.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    library.cwd_run.restype = None
    return library


@once
def _level() -> int:
    library = _load()
    return -1 if isinstance(library, str) else library.cwd_level()


def unavailable(device: torch.device) -> str | None:
    """Why this kernel cannot run on a device; None if it can. Builds the library if there is none yet."""
    if device.type != "cpu":
        return "it runs on a CPU only"
    if sys.platform == "win32":
        return "it is not built on Windows"
    library = _load()
    if isinstance(library, str):
        return library
    return "this processor has no fused multiply-add" if _level() < 0 else None


@once
def _openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch brought; None if it brought none that has it.

    A runtime of our own would be a second one: each keeps its threads spinning for a while after its work, on the
    cores that the other one's threads need.
    """
    for name in (None, "libgomp.so.1", "libiomp5.so", "libomp.so"):
        with contextlib.suppress(OSError, AttributeError):
            loaded = ctypes.CDLL(name, mode=os.RTLD_NOW | (os.RTLD_NOLOAD if name else 0))
            return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value
    return None


_forked = False


def _after_fork() -> None:
    # The runtime still counts on the threads of the parent, which are not in the child: it would wait for them.
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """How many threads the next call uses: torch's number, or 1 in a forked process or without OpenMP."""
    return 1 if _forked or _openmp() is None else torch.get_num_threads()


def about() -> str:
    """What runs here, for a line of log."""
    count = threads()
    return f"{LEVELS[max(0, _level())]}, {count} thread{'s' * (count != 1)}"


def refusal(rule: Rule, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """See :class:`hf_cwd.kernels.interface.Kernel`."""
    if rule.direction not in OPERATIONS:
        return f"the rule {rule.name}"
    return _refused(("parameters", "gradients", *("states",) * (len(dtypes) - 2)), dtypes)


def refusal_to_apply(dtypes: tuple[torch.dtype, ...]) -> str | None:
    """See :class:`hf_cwd.kernels.interface.Kernel`."""
    return _refused(("parameters", "directions"), dtypes)


def _refused(names: Sequence[str], dtypes: Sequence[torch.dtype]) -> str | None:
    refused = (f"{str(t).removeprefix('torch.')} {what}" for what, t in zip(names, dtypes, strict=True))
    return next((text for text, t in zip(refused, dtypes, strict=True) if t not in DTYPES), None)


class _Work(NamedTuple):
    """What one operation does with an item.

    Attributes:
        param: is written: the parameter, or the direction.
        second: is read: the gradient, or the given direction.
        buffers, remainder: are written, if there are any.
        scale: on the direction.
    """

    item: Item
    param: Tensor
    second: Tensor
    buffers: tuple[Tensor, ...]
    remainder: Tensor | None
    scale: float = 1.0


def update(
    rule: Rule, items: Sequence[Item], sums: Sums | None, workspace: Workspace, last: "_Tables | None"
) -> "_Tables":
    """See :class:`hf_cwd.kernels.interface.Kernel`."""
    del workspace
    if last is None:
        last = _Tables([_Work(item, item.param, item.grad, item.buffers, item.remainder) for item in items])
    else:
        last.renew(items)
    last.run(OPERATIONS[rule.direction], row_of(rule), sums)
    return last


def directions(rule: Rule, items: Sequence[Item], outs: Sequence[Tensor], workspace: Workspace) -> None:
    """See :class:`hf_cwd.kernels.interface.Kernel`."""
    del workspace
    works = [_Work(item, u, item.grad, item.buffers, None) for item, u in zip(items, outs, strict=True)]
    _Tables(works).run(DIRECTIONS, row_of(rule), None)


def apply(
    items: Sequence[Item],
    directions: Sequence[Tensor],
    scales: Sequence[float],
    sums: Sums | None,
    workspace: Workspace,
) -> None:
    """See :class:`hf_cwd.kernels.interface.Kernel`."""
    del workspace
    given = zip(items, directions, scales, strict=True)
    _Tables([_Work(item, item.param, u, (), item.remainder, scale) for item, u, scale in given]).run(
        APPLY, apply_row, sums
    )


WORDS, SECOND = 8, 1  # of a tensor in a table, and which of them is the address of the gradient or the direction


class _Tables:
    """What the library reads of some works: a table for each combination of dtypes, and which works share a row.

    Args:
        works: each is one tensor of a table.
    """

    def __init__(self, works: Sequence[_Work]) -> None:
        self.items, self.scales = [work.item for work in works], [work.scale for work in works]
        indices: dict[Any, int] = {}
        self.samples: list[int] = []  # a work of each row
        self.tables: dict[Any, array[int]] = {}
        self.numbers: dict[Any, list[int]] = {}  # of the works in each table
        for number, (item, param, second, buffers, remainder, scale) in enumerate(works):
            index = indices.setdefault((id(item.settings), item.step, scale), len(self.samples))
            if index == len(self.samples):
                self.samples.append(number)
            dtypes = (param.dtype, second.dtype, tuple(t.dtype for t in buffers), remainder is not None)
            self.numbers.setdefault(dtypes, []).append(number)
            self.tables.setdefault(dtypes, array("q")).extend(
                (
                    param.data_ptr(),
                    second.data_ptr(),
                    buffers[0].data_ptr() if buffers else 0,
                    buffers[1].data_ptr() if len(buffers) > 1 else 0,
                    remainder.data_ptr() if remainder is not None else 0,
                    param.numel(),
                    index,
                    0,
                )
            )

    def renew(self, items: Sequence[Item]) -> None:
        """Takes the gradients, settings and steps of the same items in a later step."""
        self.items = items
        gradients = [item.grad.data_ptr() for item in items]
        for dtypes, table in self.tables.items():
            table[SECOND::WORDS] = array("q", [gradients[number] for number in self.numbers[dtypes]])

    def run(self, op: int, row_of: RowOf, sums: Sums | None) -> None:
        """One operation on all works: one call of the library for each table."""
        samples = [(self.items[number], self.scales[number]) for number in self.samples]
        rows = array("f", (x for item, scale in samples for x in row_of(item.settings, item.step, scale)))
        for (param_dtype, second_dtype, states, is_master), table in self.tables.items():
            numbers = self.numbers[param_dtype, second_dtype, states, is_master]
            room = None if sums is None else _room([self.items[number] for number in numbers])
            job = _Job(
                op if states else APPLY,  # without a buffer the direction is the gradient
                MASTER if is_master else DTYPES[param_dtype],
                DTYPES[second_dtype],
                *([DTYPES[t] for t in states] + [0, 0])[:2],
                room is not None,
                _level(),
                threads(),
                len(numbers),
                table.buffer_info()[0],
                rows.buffer_info()[0],
                None if room is None else room.data_ptr(),
            )
            _load().cwd_run(ctypes.byref(job), _openmp())
            if sums is not None:
                items, scales = zip(*((self.items[k], self.scales[k]) for k in numbers), strict=True)
                sums.add(items, scales, room[: len(items)].clone())


def _room(items: Sequence[Item]) -> Tensor:
    """Memory for the sums of each item, and of each chunk behind them."""
    chunk = ctypes.c_int.in_dll(_load(), "cwd_chunk").value
    chunks = sum(-(-item.param.numel() // chunk) for item in items)
    return torch.empty(len(items) + chunks, COLUMNS, dtype=torch.float64)
