"""What the Triton kernels find on the device: one table of addresses, lengths and rows for all tensors of a call.

A table stays as long as the tensors' dtypes, lengths and alignments do. What has changed since the last step, the
rows and the addresses of gradients as a rule, is written into a copy on the host, which then travels at once.
"""

import functools
import operator
from array import array
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from copy import copy
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from hf_cwd.kernels import interface
from hf_cwd.kernels.interface import Item, RowOf
from hf_cwd.rules.base import Rule

# As in triton_ops.py, which is not imported here since it needs Triton.
WORDS, GRADIENT, LENGTH, ROW, FIELDS, SOURCES, PLACES = 8, 1, 6, 7, 16, 8, 64
ALIGNMENT = 16  # bytes
LR_KINDS = {torch.float32: 1, torch.float64: 2}

# Tables that are kept for each operation: a tensor without a gradient now and then changes the layout and back.
KEPT = 8


class Rows(NamedTuple):
    """The rows of a call.

    Attributes:
        rows: each different one once.
        places: the number of each item's row.
        sources, numbers: three and five words for each row if any of them is computed on the device, else empty; see
            :func:`hf_cwd.kernels.triton.ops.fill_rows`. ``rows`` holds templates then.
    """

    rows: list[interface.Row]
    places: list[int]
    sources: list[tuple[int, int, int]]
    numbers: list[tuple[float, ...]]


def rows(rule: Rule, items: Sequence[Item]) -> Rows:
    """The rows by which a rule steps items, or computes their directions."""
    return _rows(interface.row_of(rule), items, [item.step for item in items], [1.0] * len(items))


def rows_to_apply(items: Sequence[Item], scales: Sequence[float]) -> Rows:
    """The rows by which items are decayed, and given directions applied with these scales. Steps do not matter."""
    return _rows(interface.apply_row, items, [1] * len(items), scales)


def _rows(row_of: RowOf, items: Sequence[Item], steps: Sequence[int | Tensor], scales: Sequence[float]) -> Rows:
    # A few hundred items have a few settings, one object for each group; groups that are alike may part later.
    names = [(id(item.settings), step, scale) for item, step, scale in zip(items, steps, scales, strict=True)]
    first = {name: number for number, name in reversed(list(enumerate(names)))}
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    keys = [(items[first[name]].settings, *name[1:]) for name in numbers]
    return made(row_of, keys, [numbers[name] for name in names])


def made(row_of: RowOf, keys: Sequence[tuple[interface.Settings, int | Tensor, float]], places: list[int]) -> Rows:
    """The rows of these settings, steps and scales on the direction."""
    if not any(isinstance(step, Tensor) or isinstance(given.lr, Tensor) for given, step, _ in keys):
        return Rows([row_of(*key) for key in keys], places, [], [])
    templates: dict[Hashable, interface.Row] = {}
    result = Rows([], places, [], [])
    for given, step, scale in keys:
        key = (id(given), None if isinstance(step, Tensor) else step, scale)
        if key not in templates:
            templates[key] = _template(row_of, given, step, scale)
        result.rows.append(templates[key])
        result.sources.append(_sources(given, step))
        result.numbers.append(_numbers(given, scale))
    return result


def _template(row_of: RowOf, settings: interface.Settings, step: int | Tensor, scale: float) -> interface.Row:
    if not isinstance(step, Tensor) and not isinstance(settings.lr, Tensor):
        return row_of(settings, step, scale)
    unit = settings._replace(lr=1.0, weight_decay=float(settings.weight_decay != 0))
    return row_of(unit, 2 if isinstance(step, Tensor) else step, 1.0)


def _sources(settings: interface.Settings, step: int | Tensor) -> tuple[int, int, int]:
    step_at = step.data_ptr() if isinstance(step, Tensor) else 0
    if not isinstance(settings.lr, Tensor):
        return step_at, 0 if step_at else -1, 0
    if settings.lr.dtype not in LR_KINDS:
        raise ValueError(f"lr is a tensor of {settings.lr.dtype} on the device: make it float32")
    return step_at, LR_KINDS[settings.lr.dtype], settings.lr.data_ptr()


def _numbers(settings: interface.Settings, scale: float) -> tuple[float, ...]:
    lr = 0.0 if isinstance(settings.lr, Tensor) else settings.lr
    return (lr, scale, settings.weight_decay, *dict(settings.hyper).get("betas", (0.0, 0.0)))


class Launch(NamedTuple):
    """The tensors of a call that one launch steps.

    Attributes:
        dtypes: of one item's tensors.
        aligned: whether all addresses are multiples of 16.
        tensors: their words.
        places: int32 (chunks, 2): a tensor, and a chunk of it.
        first: how many of the table's tensors stand before these.
    """

    dtypes: tuple[torch.dtype, ...]
    aligned: bool
    tensors: Tensor
    places: Tensor
    first: int


class Table:
    """The table of one layout: what does not change in it, and the ways to what does.

    Attributes:
        order: the number in the call of each of the table's tensors.
        is_aligned: whether all addresses are multiples of 16.
    """

    def __init__(
        self, tasks: Sequence[Sequence[Tensor]], misaligned: Sequence[int], *, block: int, computed: bool
    ) -> None:
        count, self.device = len(tasks), tasks[0][0].device
        starts = [0, *accumulate(len(task) for task in tasks)]
        odd = {bisect_right(starts, place) - 1 for place in misaligned}
        groups: dict[tuple[tuple[torch.dtype, ...], bool], list[int]] = {}
        for number, task in enumerate(tasks):
            groups.setdefault((tuple(t.dtype for t in task), number not in odd), []).append(number)

        order = [number for members in groups.values() for number in members]
        lengths = torch.tensor([tasks[number][0].numel() for number in order])
        self.order, self._order = order, torch.tensor(order)
        self.is_aligned = not odd
        # Where the words of addresses are, and which of the call's addresses belong there.
        words = [(place, j) for place, number in enumerate(order) for j in range(len(tasks[number]))]
        self._targets = torch.tensor([place * WORDS + j for place, j in words])
        self._addresses = torch.tensor([starts[order[place]] + j for place, j in words])

        self._groups, self._sizes = list(groups), [len(members) for members in groups.values()]
        self._places = [self._sent(_places(part, block)) for part in lengths.split(self._sizes)]
        self._ends = [count * WORDS, count * (WORDS + FIELDS // 2), count * (WORDS + FIELDS // 2 + SOURCES * computed)]
        self.host = torch.zeros(self._ends[-1], dtype=torch.int64)
        self.host[: self._ends[0]].view(-1, WORDS)[:, LENGTH] = lengths
        self._spare: Tensor | None = None
        self._is_captured = False
        self._on_device()

    def _on_device(self) -> None:
        first, second, end = self._ends
        self.is_computed, self.used = end > second, 0
        self.words = torch.empty(end, dtype=torch.int64, device=self.device)
        self.sources = self.words[second:]
        self.numbers = self.sources.view(torch.float64)
        self.templates = self.rows = self.words[first:second].view(torch.float32)
        if self.is_computed:
            self.rows = torch.empty_like(self.rows)
        parts = self.words[:first].view(-1, WORDS).split(self._sizes)
        firsts = [0, *accumulate(self._sizes[:-1])]
        self.launches = [
            Launch(*group, tensors, places, first)
            for group, tensors, places, first in zip(self._groups, parts, self._places, firsts, strict=True)
            if len(places)
        ]

    def write(self, addresses: "array[int]", new: Rows) -> None:
        """Brings the table up to date with the addresses of all of the call's tensors."""
        self.host[self._targets] = torch.frombuffer(addresses, dtype=torch.int64)[self._addresses]
        self.host[: self._ends[0]].view(-1, WORDS)[:, ROW] = torch.tensor(new.places)[self._order]
        self._send(new)

    def rewrite(self, gradients: "array[int]", new: Rows) -> None:
        """Brings the table up to date with gradients' addresses and rows, where all else is as it was."""
        addresses = torch.frombuffer(gradients, dtype=torch.int64)[self._order]
        self.host[: self._ends[0]].view(-1, WORDS)[:, GRADIENT] = addresses
        self._send(new)

    def _send(self, new: Rows) -> None:
        first, second, _ = self._ends
        rows = torch.tensor(new.rows, dtype=torch.float32)
        self.host[first:second].view(torch.float32).view(-1, FIELDS)[: len(rows)] = rows
        if new.sources:
            sources = self.host[second:].view(-1, SOURCES)[: len(new.sources)]
            sources[:, :3] = torch.tensor(new.sources)
            sources[:, 3:] = torch.tensor(new.numbers, dtype=torch.float64).view(torch.int64)
        self.used = len(new.rows)
        is_new = self.device.type != "cpu" and not self._is_captured
        self.words.copy_(self._pinned() if is_new else self.host, non_blocking=True)

    def _pinned(self) -> Tensor:
        """A pinned copy of the host's table.

        A new one each time: the allocator gives memory again only after the copy to the device has been made.
        """
        return torch.empty(self.host.shape, dtype=torch.int64, pin_memory=True).copy_(self.host)

    def _sent(self, tensor: Tensor) -> Tensor:
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def captured(self) -> "Table":
        """A table for a step that is being captured into a CUDA graph.

        Its replays copy from the same host memory to the same place on the device, so both belong to it alone.
        """
        table = copy(self)
        table.host = self._pinned() if self._spare is None else self._spare.copy_(self.host)
        self._spare, table._is_captured = None, True
        table._on_device()
        return table

    def keep_spare(self) -> None:
        """Pinned memory cannot be had while a graph is being captured."""
        if self._spare is None and self.device.type != "cpu":
            self._spare = self._pinned()


def _places(lengths: Tensor, block: int) -> Tensor:
    chunks = (lengths + block - 1) // block
    tensor = torch.arange(len(lengths)).repeat_interleave(chunks)
    first = (chunks.cumsum(0) - chunks)[tensor]
    return torch.stack([tensor, torch.arange(len(tensor)) - first], 1).to(torch.int32)


class Tables:
    """The tables of one operation of one optimizer on one device."""

    def __init__(self) -> None:
        self._tables: dict[Hashable, Table] = {}
        self._captured: list[Table] = []  # for as long as the graphs may be replayed

    def written(self, tasks: Sequence[Sequence[Tensor]], new: Rows, *, block: int, capturing: bool) -> Table:
        """The table for these tensors, whose addresses may be others than those of the last call."""
        tensors = [t for task in tasks for t in task]
        addresses = array("q", [t.data_ptr() for t in tensors])
        misaligned = torch.frombuffer(addresses, dtype=torch.int64).bitwise_and(ALIGNMENT - 1).nonzero()
        misaligned = tuple(misaligned.view(-1).tolist())
        key = (
            *(tuple([t.dtype for t in tensors]), tuple(map(len, tasks)), tuple([task[0].numel() for task in tasks])),
            *(misaligned, bool(new.sources), block),
        )
        table = self._tables.get(key)
        if table is None:
            if len(self._tables) >= KEPT:
                del self._tables[next(iter(self._tables))]
            table = self._tables[key] = Table(tasks, misaligned, block=block, computed=bool(new.sources))
        if capturing:
            table = table.captured()
            self._captured.append(table)
        elif new.sources:
            table.keep_spare()
        table.write(addresses, new)
        return table


class Written(NamedTuple):
    """A table that holds some items, none of whose tensors lies badly, and an item of each of its rows."""

    table: Table
    places: list[int]
    samples: list[int]

    @classmethod
    def of(cls, table: Table, places: list[int]) -> "Written":
        sample = {place: item for item, place in reversed(list(enumerate(places)))}
        return cls(table, places, [sample[place] for place in range(len(sample))])

    def again(self, rule: Rule, items: Sequence[Item]) -> Table | None:
        """The table for other gradients, steps and settings of the same items.

        None where that takes another table. What is done here for each item is part of every step's time.
        """
        gradients = array("q", [item.grad.data_ptr() for item in items])
        if functools.reduce(operator.or_, gradients) % ALIGNMENT:
            return None
        keys = [(items[k].settings, items[k].step, 1.0) for k in self.samples]
        self.table.rewrite(gradients, made(interface.row_of(rule), keys, self.places))
        return self.table
