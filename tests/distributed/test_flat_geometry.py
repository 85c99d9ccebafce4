"""What lies in flat tensors, against numbered elements that are laid out and cut by hand."""

import random
from math import ceil, prod

import pytest
import torch

from hf_cwd.distributed.deepspeed_zero import FlatShard, Fragment
from hf_cwd.distributed.flat_geometry import FlatSharding, ShardedParam, stage_3, stages_1_2
from hf_cwd.distributed.geometry import check, held, matrix_shapes
from hf_cwd.newton_schulz.matrices import MatrixLayout

SEEDS = range(20)


def numbers(shape, start=0):
    return start + torch.arange(prod(shape)).view(shape)


def random_shape(draw):
    return tuple(draw.randint(1, 6) for _ in range(draw.randint(1, 4)))


def random_layout(draw, shape):
    if len(shape) < 2:
        return MatrixLayout()
    choices = [
        MatrixLayout(),
        MatrixLayout(transposed=True),
        MatrixLayout(flattened=True),
        MatrixLayout(transposed=True, flattened=True),
    ]
    rows = shape[-2]
    first = draw.randint(1, rows)
    if first < rows:
        choices += [MatrixLayout(sizes=(first, rows - first))]
    choices += [MatrixLayout(sizes=(1,), periods=rows)]
    return draw.choice(choices)


@pytest.mark.parametrize("seed", SEEDS)
def test_pieces_are_the_part_of_the_line(seed):
    draw = random.Random(seed)
    for _ in range(50):
        shape, world, begin = random_shape(draw), draw.randint(1, 5), draw.randint(0, 40)
        part = ceil((begin + prod(shape)) / world) + draw.randint(0, 3)
        line, full = FlatSharding(world, part, begin), numbers(shape, 1)
        flat = torch.zeros(world * part, dtype=torch.long)
        flat[begin : begin + prod(shape)] = full.flatten()
        check(shape, line)
        for rank, local in enumerate(flat.split(part)):
            seen = torch.zeros_like(local)
            for piece in line.pieces(shape, rank):
                there = full[tuple(slice(a, a + n) for a, n in zip(piece.start, piece.size, strict=True))]
                assert torch.equal(
                    there, local.as_strided(piece.size, piece.strides, local.storage_offset() + piece.offset)
                )
                seen.as_strided(piece.size, piece.strides, piece.offset).add_(1)
            assert torch.equal(seen, (local > 0).long()), "each element once, and no padding"
            assert (rank in line.holders(shape)) == bool((local > 0).any())
            start, stop = line.span(shape, rank)
            assert torch.equal(full.flatten()[start:stop], local[local > 0])
            assert start == stop or line.offset(rank) == int((local > 0).nonzero()[0])


@pytest.mark.parametrize("seed", SEEDS)
def test_few_pieces(seed):
    """A range is at most 2 n - 1 rectangles of a tensor in n dimensions."""
    draw = random.Random(seed)
    for _ in range(50):
        shape = random_shape(draw)
        line = FlatSharding(world=4, part=ceil(prod(shape) / 4))
        assert max(len(line.pieces(shape, rank)) for rank in range(4)) <= 2 * len(shape) - 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", [2, 3])
def test_matrices_are_put_together(seed, stage):
    """From every rank's flat tensor to each matrix of each parameter of a group."""
    draw = random.Random(seed)
    world = draw.randint(1, 4)
    shapes = [(f"p{i}", random_shape(draw)) for i in range(draw.randint(1, 6))]
    layouts = [random_layout(draw, shape) for _, shape in shapes]
    fulls = [numbers(shape, 1000 * (i + 1)) for i, (_, shape) in enumerate(shapes)]
    if stage == 2:
        groups = [stages_1_2(shapes, world)]
        line = torch.cat([full.flatten() for full in fulls])
        part = ceil(len(line) / (2 * world)) * 2
        flats = [torch.cat([line, torch.zeros(world * part - len(line), dtype=torch.long)]).split(part)]
    else:
        groups = stage_3(shapes, world, sub_group_size=draw.randint(1, 60))
        flats, left = [], list(fulls)
        for group in groups:
            own = [left.pop(0).flatten() for _ in group]
            padded = [torch.cat([p, torch.zeros(-len(p) % world, dtype=torch.long)]) for p in own]
            flats.append([torch.cat([p.chunk(world)[rank] for p in padded]) for rank in range(world)])
    assert [param.name for group in groups for param in group] == [name for name, _ in shapes]
    placed = [(param, ranks) for group, ranks in zip(groups, flats, strict=True) for param in group]
    for (param, ranks), layout, full in zip(placed, layouts, fulls, strict=True):
        if full.ndim > 1:
            check_matrices(param, ranks, layout, full)


def check_matrices(param, ranks, layout, full):
    """Each element of a matrix lies on one rank, in that matrix."""
    blocks = [b if b.ndim > 2 else b.unsqueeze(0) for b in layout.matrices(full)]
    wanted = [block.flatten(0, -3)[k] for k in range(len(blocks[0].flatten(0, -3))) for block in blocks]
    assert [tuple(m.shape) for m in wanted] == matrix_shapes(param.shape, layout)
    found = [torch.zeros_like(m).flatten() for m in wanted]
    where = [{int(v): i for i, v in enumerate(m.flatten())} for m in wanted]
    for rank, local in enumerate(ranks):
        for matrix, segments in held(param.shape, layout, param.sharding, rank).items():
            for s in segments:
                place = local.storage_offset() + s.offset + param.offset
                for value in local.as_strided(s.size, s.strides, place).flatten().tolist():
                    found[matrix][where[matrix][value]] += value
    for m, f in zip(wanted, found, strict=True):
        assert torch.equal(m.flatten(), f)


def test_sub_groups_are_closed_once_they_are_full():
    shapes = [("a", (10, 10)), ("b", (4,)), ("c", (10, 10)), ("d", (2, 2))]
    groups = stage_3(shapes, world=2, sub_group_size=54)
    assert [[param.name for param in group] for group in groups] == [["a", "b", "c"], ["d"]]
    assert [param.offset for param in groups[0]] == [0, 50, 52]
    assert [len(group) for group in stage_3(shapes, world=2, sub_group_size=10**9)] == [4]
    exactly = stage_3([("a", (4,)), ("b", (4,))], 1, 4)
    assert [[held.name for held in group] for group in exactly] == [["a"], ["b"]]


def test_fragments_and_extents():
    """Padding between fragments is not part of any; neighbours make one extent."""
    params = tuple(ShardedParam(name, (3,), FlatSharding(1, 3), 0) for name in "abc")
    shard = FlatShard(params, (Fragment(0, 0, 3), Fragment(1, 3, 3), Fragment(2, 8, 3)), (), torch.device("cpu"))
    flat = torch.arange(12)
    assert [part.tolist() for part in shard.cut(flat)] == [[0, 1, 2], [3, 4, 5], [8, 9, 10]]
    assert shard.extents == ((0, 6), (8, 3))
    assert shard.numel == 9
    assert FlatShard((), (), (), torch.device("cpu")).cut(flat) == []
