"""Pieces and segments against tensors of element numbers that torch itself cuts, alone and in a process group."""

import json
import multiprocessing
import random
import sys
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, distribute_tensor

from hf_cwd.distributed import dtensor, geometry
from hf_cwd.distributed.geometry import Mesh, Piece, Segment, check, everywhere, held, matrix_shapes
from hf_cwd.newton_schulz.matrices import MatrixLayout
from tests.distributed import brute
from tests.distributed.brute import SS, Param, R, S, random_mesh, random_param, random_placement, run


def mesh_of(param):
    ours = {"Replicate": geometry.Replicate, "Shard": geometry.Shard, "_StridedShard": geometry.StridedShard}
    return Mesh(
        param.mesh,
        param.ranks,
        tuple(
            ours[type(p).__name__](*(getattr(p, name) for name in ("dim", "split_factor") if hasattr(p, name)))
            for p in param.placements
        ),
    )


def assert_holds(param, rank, local):
    """That the pieces of a rank are its local tensor, each element once and in its place."""
    full, seen = brute.numbers(param.shape), torch.zeros(local.numel(), dtype=torch.long)
    strides = tuple(prod(local.shape[i + 1 :]) for i in range(local.dim()))
    flat = local.flatten().clone()  # as_strided counts from the start of the storage
    for piece in mesh_of(param).pieces(param.shape, rank):
        assert isinstance(piece, Piece)
        there = full[tuple(slice(a, a + n) for a, n in zip(piece.start, piece.size, strict=True))]
        assert there.shape == piece.size, "inside of the tensor"
        assert piece.strides == strides
        assert there.equal(flat.as_strided(piece.size, piece.strides, piece.offset))
        seen.as_strided(piece.size, piece.strides, piece.offset).add_(1)
    assert (seen == 1).all()


@pytest.mark.parametrize("seed", range(8))
def test_torch_cuts_alike(seed):
    draw = random.Random(seed)
    for _ in range(50):
        param = random_param(draw)
        replica = brute.replicas_of(param)
        for rank, local in brute.locals_of(param).items():
            assert_holds(param, rank, local)
            assert mesh_of(param).replica(rank) == replica[rank], param
        check(param.shape, mesh_of(param))


def rows(*spans, columns=2, offset=0):
    """Pieces of whole rows that follow each other in the local tensor."""
    result = []
    for start_, stop in spans:
        result.append(Piece((start_, 0), (stop - start_, columns), offset, (columns, 1)))
        offset += (stop - start_) * columns
    return tuple(result)


@pytest.mark.parametrize(
    ("shape", "mesh", "placements", "rank", "expected"),
    [
        pytest.param((8, 2), (2,), [SS(0, 2)], 1, rows((2, 4), (6, 8)), id="packed gate_up, tp2"),
        pytest.param(
            (2, 8),
            *((2,), [SS(1, 2)], 0),
            (Piece((0, 0), (2, 2), 0, (4, 1)), Piece((0, 4), (2, 2), 2, (4, 1))),
            id="packed gate_up, transposed, tp2",
        ),
        pytest.param((8, 2), (2, 2), [SS(0, 2), S(0)], 1, rows((4, 6)), id="fsdp2 x tp2"),
        pytest.param((8, 2), (2, 2), [SS(0, 2), S(0)], 2, rows((2, 4)), id="fsdp2 x tp2, the other way"),
        pytest.param((16, 2), (2, 2), [SS(0, 4), SS(0, 2)], 3, rows((6, 8), (14, 16)), id="packed, fsdp2 x tp2"),
        pytest.param((5, 2), (2,), [S(0)], 1, rows((3, 5)), id="uneven"),
        pytest.param((1, 2), (2,), [S(0)], 1, (), id="empty"),
        pytest.param((4, 2), (2,), [SS(0, 1)], 1, rows((2, 4)), id="split into one"),
        pytest.param((2, 2), (2,), [SS(0, 2)], 0, rows((0, 2)), id="neighbours are one rectangle"),
        pytest.param((4, 2), (1,), [SS(0, 2)], 0, rows((0, 4)), id="one rank holds one rectangle"),
        pytest.param((4, 2), (2, 2), [R, S(0)], 3, rows((2, 4)), id="hsdp"),
        pytest.param(*((4, 3, 2), (2,), [S(0)], 1), (Piece((2, 0, 0), (2, 3, 2), 0, (6, 2, 1)),), id="whole experts"),
        pytest.param(
            *((4, 4, 2), (2, 2), [S(0), SS(1, 2)], 2),
            (Piece((2, 0, 0), (2, 1, 2), 0, (4, 2, 1)), Piece((2, 2, 0), (2, 1, 2), 2, (4, 2, 1))),
            id="packed experts, ep2 x tp2",
        ),
    ],
)
def test_by_hand(shape, mesh, placements, rank, expected):
    param = Param(shape, mesh, tuple(range(prod(mesh))), tuple(placements))
    assert mesh_of(param).pieces(shape, rank) == expected
    assert_holds(param, rank, brute.locals_of(param)[rank])


# What the sweep over placements meets: stacks, fused and interleaved projections, transposed ones, convolutions.
LAYOUTS = [
    ((7, 5), MatrixLayout()),
    ((5, 7), MatrixLayout(transposed=True)),
    ((12, 3), MatrixLayout((3, 4, 5))),
    ((3, 12), MatrixLayout((8, 2, 2), transposed=True)),
    ((12, 2), MatrixLayout((1, 1, 1), 4)),
    ((18, 2), MatrixLayout((2, 1), 6)),
    ((2, 12), MatrixLayout((1, 2), 4, transposed=True)),
    ((3, 8, 2), MatrixLayout((4, 4))),
    ((4, 2, 6), MatrixLayout((3, 3), transposed=True)),
    ((2, 3, 8, 2), MatrixLayout((1, 1), 4)),
    ((3, 5, 4), MatrixLayout()),
    ((6, 3, 2), MatrixLayout(flattened=True)),
    ((6, 2, 3, 2), MatrixLayout((2, 4), flattened=True)),
    ((6, 4, 2), MatrixLayout((3, 3), flattened=True)),
    ((4, 2, 3), MatrixLayout(transposed=True, flattened=True)),  # XLNet: (hidden, heads, head size)
    ((0, 4), MatrixLayout()),
    ((4, 0), MatrixLayout((2, 2))),
    ((0, 4, 3), MatrixLayout()),
]


def rebuilt(shape, layout, sharding, local):
    """The matrices of each replica, put together from what the segments find in the local tensors."""
    # A segment knows the dimensions of a matrix that has several for its rows or columns.
    first, second = ((shape[0],), shape[1:]) if layout.flattened else (shape[-2:-1], shape[-1:])
    dims = (*second, *first) if layout.transposed else (*first, *second)
    empty = [torch.full((r, *dims[1:]) if layout.sizes else dims, -1) for r, _ in matrix_shapes(shape, layout)]
    copies = {}
    for rank in sharding.ranks:
        matrices = copies.setdefault(sharding.replica(rank), [matrix.clone() for matrix in empty])
        for number, parts in held(shape, layout, sharding, rank).items():
            assert parts
            for part in parts:
                assert isinstance(part, Segment)
                assert (part.matrix, part.numel) == (number, prod(part.size))
                assert part.numel
                inside = tuple(slice(a, a + n) for a, n in zip(part.start, part.size, strict=True))
                place = matrices[number][inside]
                assert place.shape == part.size
                assert (place == -1).all(), "twice"
                place.copy_(local[rank].flatten().clone().as_strided(part.size, part.strides, part.offset))
    return [[m.view(s) for m, s in zip(c, matrix_shapes(shape, layout), strict=True)] for c in copies.values()]


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS, ids=str)
def test_segments_rebuild_every_matrix(shape, layout):
    draw, expected = random.Random(str((shape, layout))), brute.matrices_of(shape, layout)
    assert matrix_shapes(shape, layout) == [tuple(matrix.shape) for matrix in expected]
    fixed = [(S(d),) for d in range(len(shape))] + [(SS(d, 2),) for d in range(len(shape))]
    cases = [Param(shape, (2,), (1, 0), placements) for placements in fixed]
    cases += [Param(shape, *random_mesh(draw, len(shape))) for _ in range(30)]
    for param in cases:
        for matrices in rebuilt(shape, layout, mesh_of(param), brute.locals_of(param)):
            assert all(a.equal(b) for a, b in zip(matrices, expected, strict=True)), param


class Broken:
    """A layout that tells its own pieces: one list for each rank."""

    def __init__(self, *told, replicas=None):
        self.ranks, self.told, self.replicas = tuple(range(len(told))), told, replicas or [0] * len(told)

    def pieces(self, shape, rank):
        return self.told[rank]

    def replica(self, rank):
        return self.replicas[rank]


TILES = {
    "something is missing": Broken(rows((0, 2)), rows((3, 4))),
    "a part is held twice": Broken(rows((0, 2)), rows((1, 4))),
    "missing and twice, which cancel": Broken(rows((0, 2)), rows((0, 2))),
    "outside": Broken(rows((0, 2)), rows((3, 5))),
    "one replica only is whole": Broken(rows((0, 4)), rows((0, 3)), replicas=[0, 1]),
    "a replica has what another lacks": Broken(rows((0, 4)), rows((0, 4)), rows(), replicas=[0, 0, 1]),
}


@pytest.mark.parametrize("name", TILES)
def test_what_does_not_tile_is_refused(name):
    with pytest.raises(ValueError, match=r"\(4, 2\)"):
        check((4, 2), TILES[name])


def test_what_tiles_is_taken():
    check((4, 2), Broken(rows((0, 1), (3, 4)), rows((1, 3))))
    check((4, 2), Broken(rows((0, 4)), rows((1, 4)), rows((0, 1)), replicas=[1, 0, 0]))
    check((0, 2), Broken((), ()))


def test_meshes_are_values():
    plain = Mesh((2,), (0, 1), (geometry.Shard(0),))
    with_ones = Mesh((1, 2, 1), (0, 1), (geometry.Replicate(), geometry.Shard(0), geometry.Shard(1)))
    assert with_ones == plain
    assert hash(with_ones) == hash(plain)
    others = [
        Mesh((2,), (1, 0), (geometry.Shard(0),)),
        Mesh((2,), (0, 1), (geometry.Shard(1),)),
        Mesh((2,), (0, 1), (geometry.StridedShard(0, 2),)),
        everywhere((0, 1)),
    ]
    assert len({plain, *others}) == 5
    assert everywhere((5, 3)).replica(3) == 1
    assert everywhere((5, 3)).pieces((2, 2), 3) == rows((0, 2))
    for wrong in (((2,), (0, 1, 2), (geometry.Shard(0),)), ((2,), (0, 1), ())):
        with pytest.raises(ValueError, match="on a mesh"):
            Mesh(*wrong)


# DTensors in a process group of 4. torch sorts the ranks of a group: its own collectives want them to ascend along each
# dimension of a mesh.
RANKS = 4
MESHES = [((4,), (0, 1, 2, 3)), ((2, 2), (0, 1, 2, 3)), ((2, 2), (0, 2, 1, 3)), ((2, 1, 2), (0, 2, 1, 3))]


def distributed_cases():
    """(parameter, whether its DTensor is on the rows of its mesh only)."""
    draw, cases = random.Random(4), []
    for mesh, ranks in MESHES:
        for _ in range(6):
            shape = tuple(draw.choice((1, 2, 3, 5, 8, 9)) for _ in range(draw.randint(1, 3)))
            cases.append((Param(shape, mesh, ranks, tuple(random_placement(draw, len(shape)) for _ in mesh)), False))
    cases += [(Param(shape, *MESHES[1], (SS(0, 2), S(0))), False) for shape in ((8, 2), (7, 2), (4, 6, 2))]
    return cases + [(Param((7, 3), *MESHES[2], (R, p)), True) for p in (S(0), S(1), SS(0, 2), R)]


def is_cut_once(param):
    """Parts of parts torch's full_tensor() does not put together again where they are uneven."""
    cut = [p.dim for p, size in zip(param.placements, param.mesh, strict=True) if p != R and size > 1]
    return len(set(cut)) == len(cut)


def distribute(rank, folder):
    """What each case's DTensor holds here, whether its parts make up the full tensor, and what mesh_of says of it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    meshes = {
        key: DeviceMesh("cpu", torch.tensor(key[1]).view(key[0]), mesh_dim_names=tuple("abc"[: len(key[0])]))
        for key in MESHES
    }
    found = []
    for param, only_rows in distributed_cases():
        mesh, full = meshes[param.mesh, param.ranks], brute.numbers(param.shape)
        mesh, placements = (mesh["b"], param.placements[1:]) if only_rows else (mesh, param.placements)
        tensor = distribute_tensor(full, mesh, placements, src_data_rank=None)
        read, local = dtensor.mesh_of(tensor), tensor.to_local()
        told = [[r, read.pieces(param.shape, r)] for r in read.ranks]
        replicas = [read.replica(r) for r in read.ranks]
        found.append([local.shape, local.flatten().tolist(), tensor.full_tensor().equal(full), told, replicas])
    # Complete or not there at all, whatever becomes of this process.
    Path(folder, f"{rank}.part").write_text(json.dumps(found))
    Path(folder, f"{rank}.part").rename(Path(folder, f"{rank}.json"))
    dist.destroy_process_group()


def test_real_dtensors(tmp_path):
    run("-m", "tests.distributed.test_geometry", str(tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    for number, (param, only_rows) in enumerate(distributed_cases()):
        mesh, expected = mesh_of(param), brute.locals_of(param)
        for rank in range(RANKS):
            shape, elements, is_whole, told, replicas = found[rank][number]
            local = torch.tensor(elements, dtype=torch.long).view(shape)
            assert_holds(param, rank, local)
            assert local.equal(expected[rank]), "brute.py cuts as a process group does"
            assert is_whole or not is_cut_once(param), param
            # Of a mesh' rows each rank knows its own only: the other one may hold another tensor.
            row = param.ranks.index(rank) // 2
            ranks = param.ranks[2 * row : 2 * row + 2] if only_rows else param.ranks
            # As JSON has it, without tuples.
            assert told == json.loads(json.dumps([[r, mesh.pieces(param.shape, r)] for r in ranks]))
            own = Mesh(param.mesh[1:], ranks, mesh.placements[1:]) if only_rows else mesh
            assert replicas == [own.replica(r) for r in ranks]


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")  # torch is imported once
    processes = [context.Process(target=distribute, args=(rank, sys.argv[1])) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
