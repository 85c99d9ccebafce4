"""Which parts of a tensor a rank holds, as rectangles. Arithmetic only: no tensor, no process group."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, prod
from typing import NamedTuple, Protocol

from hf_cwd.newton_schulz.matrices import MatrixLayout

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """A rectangle of a full tensor, and where it lies in the rank's local tensor.

    Attributes:
        start: its first index in the full tensor, one number a dimension.
        size: its size.
        offset: the element of the local tensor, contiguous and flattened, where it starts.
        strides: the local tensor's strides along its dimensions.
    """

    start: Shape
    size: Shape
    offset: int
    strides: Shape


class Segment(NamedTuple):
    """The part of one matrix that lies in one piece.

    Attributes:
        matrix: which of the parameter's matrices, in the order of :func:`matrix_shapes`.
        start: its first index in the matrix, whose rows or columns may be several dimensions, as a convolution's are.
        size: its size, likewise.
        offset, strides: where it lies in the local tensor, see :class:`Piece`.
    """

    matrix: int
    start: Shape
    size: Shape
    offset: int
    strides: Shape

    @property
    def numel(self) -> int:
        return prod(self.size)

    @property
    def is_contiguous(self) -> bool:
        """Whether it lies at the beginning of the local tensor, row by row."""
        return self.offset == 0 and self.strides == tuple(prod(self.size[i + 1 :]) for i in range(len(self.size)))


class Replicate(NamedTuple):
    """Each rank of this mesh dimension holds the same."""


class Shard(NamedTuple):
    """Cut along ``dim`` as torch.chunk does: the last parts may be smaller, or empty."""

    dim: int


class StridedShard(NamedTuple):
    """Cut into ``split_factor`` chunks first, each of which is then cut as :class:`Shard` does.

    torch's ``_StridedShard``: FSDP on top of tensor parallelism, and packed projections (gate beside up) under tensor
    parallelism. A rank holds a part of every chunk, which need not lie together.
    """

    dim: int
    split_factor: int


Placement = Replicate | Shard | StridedShard


class Sharding(Protocol):
    """A layout of tensors over ranks. Hashable: what it answers depends on its own value only."""

    ranks: Sequence[int]

    def holders(self, shape: Shape) -> Sequence[int]:
        """The ranks that may hold a part of a tensor of ``shape``."""

    def pieces(self, shape: Shape, rank: int) -> tuple[Piece, ...]:
        """What ``rank`` holds of a tensor of ``shape``; those of the ranks of a replica tile the tensor."""

    def replica(self, rank: int) -> int:
        """The number of the copy of the tensor, from 0, that ``rank`` holds a part of."""


@dataclass(frozen=True)
class Mesh:
    """Ranks in an n-dimensional mesh, and what each dimension does with a tensor: torch's DeviceMesh and placements.

    Placements apply from left to right, each to what the ones before it left. Dimensions of size 1 are dropped.

    Attributes:
        shape: size of each mesh dimension.
        ranks: the ranks in row-major order of the mesh.
        placements: one for each mesh dimension.

    Example:
        >>> from hf_cwd.distributed.geometry import Mesh, Replicate, Shard
        >>> hsdp = Mesh((2, 3), tuple(range(6)), (Replicate(), Shard(0)))
        >>> [(p.start, p.size) for p in hsdp.pieces((5, 8), 4)]
        [((2, 0), (2, 8))]
        >>> hsdp.replica(4)
        1
    """

    shape: Shape
    ranks: tuple[int, ...]
    placements: tuple[Placement, ...]

    def __post_init__(self) -> None:
        if prod(self.shape) != len(self.ranks) or len(self.shape) != len(self.placements):
            raise ValueError(f"{len(self.ranks)} ranks and {len(self.placements)} placements on a mesh {self.shape}")
        kept = [i for i, size in enumerate(self.shape) if size > 1]
        object.__setattr__(self, "shape", tuple(self.shape[i] for i in kept))
        object.__setattr__(self, "placements", tuple(self.placements[i] for i in kept))
        object.__setattr__(self, "_position", {rank: i for i, rank in enumerate(self.ranks)})
        object.__setattr__(self, "_hash", hash((self.shape, self.ranks, self.placements)))  # it may have 1000s of ranks

    def __hash__(self) -> int:
        return self._hash

    def coordinates(self, rank: int) -> Shape:
        index, result = self._position[rank], []
        for size in reversed(self.shape):
            index, coordinate = divmod(index, size)
            result.append(coordinate)
        return tuple(reversed(result))

    def holders(self, shape: Shape) -> tuple[int, ...]:
        return self.ranks

    def replica(self, rank: int) -> int:
        number = 0
        for size, coordinate, placement in zip(self.shape, self.coordinates(rank), self.placements, strict=True):
            if isinstance(placement, Replicate):
                number = number * size + coordinate
        return number

    def pieces(self, shape: Shape, rank: int) -> tuple[Piece, ...]:
        spans = [[(0, size)] for size in shape]
        for size, coordinate, placement in zip(self.shape, self.coordinates(rank), self.placements, strict=True):
            if isinstance(placement, Shard):
                spans[placement.dim] = _chunk(spans[placement.dim], size, coordinate)
            elif isinstance(placement, StridedShard):
                old, factor = spans[placement.dim], placement.split_factor
                parts = (_chunk(_chunk(old, factor, i), size, coordinate) for i in range(factor))
                spans[placement.dim] = _merged(itertools.chain.from_iterable(parts))
        local = [sum(stop - start for start, stop in dimension) for dimension in spans]
        strides = tuple(prod(local[i + 1 :]) for i in range(len(local)))
        # A dimension of which several spans are held: each with the place in the local tensor where it starts.
        placed = [_placed(dimension, stride) for dimension, stride in zip(spans, strides, strict=True)]
        return tuple(
            Piece(tuple(s for s, _, _ in box), tuple(n for _, n, _ in box), sum(o for _, _, o in box), strides)
            for box in itertools.product(*placed)
            if all(n for _, n, _ in box)
        )


def everywhere(ranks: Sequence[int]) -> Mesh:
    """Every rank holds the whole tensor, as under DDP."""
    return Mesh((len(ranks),), tuple(ranks), (Replicate(),))


def matrix_shapes(shape: Shape, layout: MatrixLayout) -> list[tuple[int, int]]:
    """(rows, columns) of each matrix in a parameter: of each member of a stack the matrices fused into it, in order."""
    stack, outs, ins = _axes(shape, layout)
    columns = prod(shape[i] for i in ins)
    rows = [layout.periods * size for size in layout.sizes] or [prod(shape[i] for i in outs)]
    return [(r, columns) for r in rows] * prod(shape[i] for i in stack)


def inner_shape(shape: Shape, layout: MatrixLayout) -> Shape:
    """Sizes of a matrix's dimensions after the first, see :class:`Segment`; a linear layer's has one, its columns."""
    _, outs, ins = _axes(shape, layout)
    return tuple(shape[i] for i in (*outs[1:], *ins))


def segments(shape: Shape, layout: MatrixLayout, piece: Piece) -> Iterator[Segment]:
    """The parts of the parameter's matrices that lie in a piece of it."""
    stack, (out, *more), ins = _axes(shape, layout)
    inner = (*more, *ins)
    sizes = layout.sizes or (shape[out],)
    period = sum(sizes)
    first, last = piece.start[out], piece.start[out] + piece.size[out]
    strides = tuple(piece.strides[i] for i in (out, *inner))
    inner_start, inner_size = tuple(piece.start[i] for i in inner), tuple(piece.size[i] for i in inner)
    for member in itertools.product(*(range(piece.size[i]) for i in stack)):
        number = offset = 0
        for i, inside in zip(stack, member, strict=True):
            number = number * shape[i] + piece.start[i] + inside
            offset += inside * piece.strides[i]
        for p in range(first // period, ceil(last / period)):
            low = p * period
            for part, size in enumerate(sizes):
                start, stop = max(first, low), min(last, low + size)
                if start < stop:
                    yield Segment(
                        number * len(sizes) + part,
                        (p * size + start - low, *inner_start),
                        (stop - start, *inner_size),
                        piece.offset + offset + (start - first) * piece.strides[out],
                        strides,
                    )
                low += size


@cache
def held(shape: Shape, layout: MatrixLayout, sharding: Sharding, rank: int) -> dict[int, tuple[Segment, ...]]:
    """What ``rank`` holds of each matrix of a parameter; matrices of which it holds nothing are left out."""
    result: dict[int, list[Segment]] = {}
    for piece in sharding.pieces(shape, rank):
        for segment in segments(shape, layout, piece):
            result.setdefault(segment.matrix, []).append(segment)
    return {matrix: tuple(parts) for matrix, parts in result.items()}


@cache
def check(shape: Shape, sharding: Sharding) -> None:
    """Raises ValueError where the pieces of some replica do not tile the tensor.

    Elements have different weights: one that is missing and another that is held twice do not cancel.
    """
    weights = random.Random(0)
    sums = [list(itertools.accumulate((weights.getrandbits(62) for _ in range(n)), initial=0)) for n in shape]
    copies: dict[int, int] = {}
    for rank in sharding.ranks:
        pieces, replica = sharding.pieces(shape, rank), sharding.replica(rank)
        for start, size, _, _ in pieces:
            if any(first < 0 or first + n > whole for first, n, whole in zip(start, size, shape, strict=True)):
                raise ValueError(f"rank {rank} holds {size} from {start} of a tensor of shape {shape}")
        weight = sum(prod(s[a + n] - s[a] for s, a, n in zip(sums, p.start, p.size, strict=True)) for p in pieces)
        copies[replica] = copies.get(replica, 0) + weight
    wrong = [replica for replica, weight in copies.items() if weight != prod(s[-1] for s in sums)]
    if wrong:
        raise ValueError(f"the parts that ranks hold of shape {shape} do not tile it in replicas {wrong}")


def _axes(shape: Shape, layout: MatrixLayout) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """The dimensions of a parameter that count its stack, its output and its input."""
    n = len(shape)
    stack, first, second = (
        ((), (0,), tuple(range(1, n))) if layout.flattened else (tuple(range(n - 2)), (n - 2,), (n - 1,))
    )
    return (stack, second, first) if layout.transposed else (stack, first, second)


def _chunk(spans: Sequence[tuple[int, int]], parts: int, index: int) -> list[tuple[int, int]]:
    """The ``index``-th of ``parts`` chunks of the elements in ``spans``."""
    size = ceil(sum(stop - start for start, stop in spans) / parts)
    low, high = size * index, size * (index + 1)
    result, place = [], 0
    for start, stop in spans:
        inside = (max(start, start + low - place), min(stop, start + high - place))
        if inside[0] < inside[1]:
            result.append(inside)
        place += stop - start
    return result


def _merged(spans: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for start, stop in spans:
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return result


def _placed(spans: Sequence[tuple[int, int]], stride: int) -> list[tuple[int, int, int]]:
    """(start, size, offset in the local tensor) of each span of a dimension."""
    result, place = [], 0
    for start, stop in spans:
        result.append((start, stop - start, place * stride))
        place += stop - start
    return result
