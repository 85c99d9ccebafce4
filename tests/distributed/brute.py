"""What pieces.py and plan.py should find, counted out element by element; imports nothing from hf_cwd.distributed.

A tensor is the flat numbers of its elements; torch's own placements cut it, ``MatrixLayout.matrices`` takes it apart.
"""

import itertools
import os
import random
import subprocess
import sys
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import placement_types
from torch.distributed.tensor.placement_types import Replicate

from hf_cwd.newton_schulz.matrices import MatrixLayout

ROOT = Path(__file__).parents[2]
R, S = Replicate(), placement_types.Shard


class Param(NamedTuple):
    """A parameter on a mesh of ranks (row-major) with one of torch's placements for each mesh dimension."""

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    ranks: tuple[int, ...]
    placements: tuple[Any, ...]
    layout: MatrixLayout = MatrixLayout()
    bytes: int = 4


class Share(NamedTuple):
    """A matrix: its elements, how many of them each rank holds, and each rank's replica."""

    numel: int
    held: dict[int, int]
    replica: dict[int, int]
    bytes: int


def numbers(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(prod(shape)).view(shape)


def locals_of(param: Param) -> dict[int, Tensor]:
    """The elements that torch puts on each rank, in the shape of its local tensor."""
    parts = [numbers(param.shape)]
    for size, placement in zip(param.mesh, param.placements, strict=True):
        parts = [part for old in parts for part in _cut(old, placement, size)]
    return dict(zip(param.ranks, parts, strict=True))


def replicas_of(param: Param) -> dict[int, int]:
    """Each rank's replica: counted along the mesh dimensions that replicate, the last one fastest."""
    copying = [isinstance(placement, Replicate) for placement in param.placements]
    places = list(itertools.product(*map(range, param.mesh)))
    kept = [tuple(c for c, copies in zip(place, copying, strict=True) if copies) for place in places]
    order = sorted(set(kept))
    return {rank: order.index(own) for rank, own in zip(param.ranks, kept, strict=True)}


def matrices_of(shape: tuple[int, ...], layout: MatrixLayout) -> list[Tensor]:
    """The elements of each matrix, (rows, columns): of each member of a stack those fused into it."""
    blocks = [block.reshape(prod(block.shape[:-2]), *block.shape[-2:]) for block in layout.matrices(numbers(shape))]
    return [matrix for members in zip(*blocks, strict=True) for matrix in members]


def shares_of(param: Param) -> list[Share]:
    """Each matrix of a parameter."""
    matrices, places = matrices_of(param.shape, param.layout), locals_of(param)
    home = torch.empty(prod(param.shape), dtype=torch.long)
    for number, matrix in enumerate(matrices):
        home[matrix.flatten()] = number
    counts = {rank: home[part.flatten()].bincount(minlength=len(matrices)).tolist() for rank, part in places.items()}
    replica = replicas_of(param)
    return [
        Share(matrix.numel(), {r: c[number] for r, c in counts.items() if c[number]}, replica, param.bytes)
        for number, matrix in enumerate(matrices)
    ]


def moves(share: Share, owner: int, serves: tuple[int, ...]) -> dict[int, int]:
    """Elements that each rank receives for one matrix that ``owner`` orthogonalises for the replicas in ``serves``.

    The owner receives what it does not hold; of the others each receives what it holds.
    """
    at = {rank: count for rank, count in share.held.items() if share.replica[rank] in serves}
    within = sum(count for rank, count in at.items() if share.replica[rank] == share.replica[owner])
    assert within == share.numel, "the owner gathers inside of its replica"
    return {rank: share.numel - count if rank == owner else count for rank, count in at.items()}


def worth_sharing(share: Share, flops: int, balance: int) -> Fraction:
    """How much more it costs that each replica works for itself, on average over the choice of owners.

    A cost is all ranks' operations, and ``balance`` for each byte that any rank receives.
    """
    replicas = sorted(set(share.replica.values()))

    def traffic(owners: list[int], serves: tuple[int, ...]) -> Fraction:
        elements = sum(sum(moves(share, owner, serves).values()) for owner in owners)
        return Fraction(balance * share.bytes * elements, len(owners))

    apart, everybody = Fraction(0), [rank for rank, count in share.held.items() if count]
    for replica in replicas:
        apart += flops + traffic([rank for rank in everybody if share.replica[rank] == replica], (replica,))
    return apart - flops - traffic(everybody, tuple(replicas))


def _cut(part: Tensor, placement: Any, size: int) -> list[Tensor]:
    if isinstance(placement, Replicate):
        return [part] * size
    return placement._split_tensor(part, size, with_padding=False, contiguous=True)[0]


def SS(dim, split_factor):  # noqa: N802
    return placement_types._StridedShard(dim, split_factor=split_factor)


def random_placement(draw, dims):
    kind, dim = draw.random(), draw.randrange(dims)
    return R if kind < 0.25 else S(dim) if kind < 0.6 else SS(dim, draw.randint(2, 4))


def random_mesh(draw, dims):
    """1 to 3 mesh dimensions, also of size 1, over at most 12 ranks in any order, which need not start at 0."""
    while True:
        mesh = tuple(draw.choice((1, 2, 2, 3, 4)) for _ in range(draw.randint(1, 3)))
        if prod(mesh) <= 12:
            break
    ranks = draw.sample(range(16), prod(mesh)) if draw.random() < 0.5 else range(prod(mesh))
    return mesh, tuple(ranks), tuple(random_placement(draw, dims) for _ in mesh)


def random_param(draw):
    """1 to 4 dimensions, uneven, short and empty ones."""
    shape = tuple(draw.choice((0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 17)) for _ in range(draw.randint(1, 4)))
    while prod(shape) > 2000:
        shape = shape[1:]
    return Param(shape, *random_mesh(draw, len(shape)))


def flops(rows, columns):
    """The cheaper form: X X', its square, and their product with X, 5 times; or 3 and 2 iterations on X X'."""
    short, long = min(rows, columns), max(rows, columns)
    return min(10 * (2 * short**2 * long + short**3), 8 * short**2 * long + 28 * short**3)


def llama(layers, hidden, kv, mlp):
    return [
        (hidden, hidden),
        (kv, hidden),
        (kv, hidden),
        (hidden, hidden),
        (mlp, hidden),
        (mlp, hidden),
        (hidden, mlp),
    ] * layers


def gpt2(layers, hidden):
    return [(hidden, hidden)] * 4 * layers + [(4 * hidden, hidden), (hidden, 4 * hidden)] * layers


MODELS = {
    "SmolLM2-135M": llama(30, 576, 192, 1536),
    "Llama-3-8B": llama(32, 4096, 1024, 14336),
    "Llama-3-70B": llama(80, 8192, 1024, 28672),
    "Gemma-2-2B": llama(26, 2304, 1024, 9216),
    "GPT-2": gpt2(12, 768),
    "experts and dense": [(1024, 4096)] * 64 + llama(8, 4096, 1024, 1024),
    "squares and slivers": [(512, 512)] * 3 + [(64, 4096)] * 20,
    "one": [(768, 768)],
}


def mixed(seed):
    """Few kinds of matrices of very different shapes, in any order."""
    draw = random.Random(seed)
    world = draw.choice((2, 3, 4, 8, 16, 64))
    kinds = [
        (world * draw.choice((1, 2, 4, 16, 64)), draw.choice((8, 64, 256, 1024, 4096, 16384)))
        for _ in range(draw.randint(1, 6))
    ]
    return [draw.choice(kinds) for _ in range(draw.randint(1, 60))], world


def run(*arguments, **environment):
    """A Python process. Not that of tests.support.launching, whose import takes longer than what is run here."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
