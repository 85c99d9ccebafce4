"""Flattened tensors on a line that is cut into parts, as DeepSpeed's ZeRO lays them out. Arithmetic only."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple

from hf_cwd.distributed.geometry import Piece, Shape


@dataclass(frozen=True)
class FlatSharding:
    """A flattened tensor that begins at element ``begin`` of a line, which is cut into parts: each rank has one.

    Attributes:
        world: number of ranks.
        part: elements of the line that a rank has.
        begin: where the tensor begins.

    Example:
        >>> from hf_cwd.distributed.flat_geometry import FlatSharding
        >>> [(p.start, p.size) for p in FlatSharding(world=2, part=7).pieces((4, 3), 0)]
        [((0, 0), (2, 3)), ((2, 0), (1, 1))]
    """

    world: int
    part: int
    begin: int = 0

    @property
    def ranks(self) -> range:
        return range(self.world)

    def holders(self, shape: Shape) -> range:
        return range(self.begin // self.part, ceil((self.begin + prod(shape)) / self.part)) if prod(shape) else range(0)

    def replica(self, rank: int) -> int:
        return 0

    def span(self, shape: Shape, rank: int) -> tuple[int, int]:
        """The first element of the flattened tensor that ``rank`` has, and the one after its last."""
        first, last = rank * self.part - self.begin, (rank + 1) * self.part - self.begin
        start = min(max(first, 0), prod(shape))
        return start, max(min(last, prod(shape)), start)

    def offset(self, rank: int) -> int:
        """Where in the rank's part of the line the tensor's own part begins."""
        return max(self.begin - rank * self.part, 0)

    def pieces(self, shape: Shape, rank: int) -> tuple[Piece, ...]:
        start, stop = self.span(shape, rank)
        strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        shift = self.offset(rank) - start
        return tuple(
            Piece(first, size, shift + sum(a * b for a, b in zip(first, strides, strict=True)), strides)
            for first, size in _rectangles(shape, start, stop)
        )


def _rectangles(shape: Shape, start: int, stop: int) -> list[tuple[Shape, Shape]]:
    """(start, size) of the fewest rectangles that elements ``start`` to ``stop`` of a flattened tensor make."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    row = prod(shape[1:])
    first, last = ceil(start / row), stop // row  # whole rows
    if first > last:  # within one row
        return _in_row(shape, last, start, stop)
    result = _in_row(shape, first - 1, start, first * row)
    if first < last:
        result.append(((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])))
    return result + _in_row(shape, last, last * row, stop)


def _in_row(shape: Shape, index: int, start: int, stop: int) -> list[tuple[Shape, Shape]]:
    row = prod(shape[1:])
    found = _rectangles(shape[1:], start - index * row, stop - index * row)
    return [((index, *first), (1, *size)) for first, size in found]


class ShardedParam(NamedTuple):
    """A parameter of which parts lie in flat shards.

    Attributes:
        name: for messages.
        shape: of the full parameter.
        sharding: which rank holds what of it.
        offset: where in each rank's flat tensor the rank's part of the line begins.
    """

    name: str
    shape: Shape
    sharding: FlatSharding
    offset: int


def stages_1_2(shapes: Sequence[tuple[str, Shape]], world: int) -> list[ShardedParam]:
    """The parameters of one group, in order, as stages 1 and 2 lay them out: in one flat tensor."""
    align = 2 * world  # parts begin at multiples of 4 bytes, in 16 bits an element
    part = ceil(sum(prod(shape) for _, shape in shapes) / align) * 2
    result, begin = [], 0
    for name, shape in shapes:
        result.append(ShardedParam(name, shape, FlatSharding(world, part, begin), 0))
        begin += prod(shape)
    return result


def stage_3(shapes: Sequence[tuple[str, Shape]], world: int, sub_group_size: int) -> list[list[ShardedParam]]:
    """The parameters of one group, in order, as stage 3 lays them out: in a flat tensor for each sub-group."""
    result: list[list[ShardedParam]] = [[]]
    offset = 0
    for name, shape in shapes:
        if offset >= sub_group_size:
            result.append([])
            offset = 0
        part = ceil(prod(shape) / world)
        result[-1].append(ShardedParam(name, shape, FlatSharding(world, part), offset))
        offset += part
    return result
