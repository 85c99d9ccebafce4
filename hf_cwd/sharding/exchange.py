"""The one place where a matrix stage meets the layout of the parameters.

An element-wise rule never comes here. Muon's orthogonalisation needs whole matrices: the optimizer asks for rounds of
parameters, computes their directions where they lie, has :func:`on_whole_matrices` run the stage, and applies the
result where it lies. So far every rank must hold its matrices whole (one process, DDP) and repeats the work.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor


def rounds(params: Sequence[Tensor]) -> Iterator[list[int]]:
    """Which parameters to orthogonalise together, as positions: one at a time keeps extra memory at one matrix."""
    for position in range(len(params)):
        yield [position]


def on_whole_matrices(stage: Callable[[Tensor], Tensor], directions: Sequence[Tensor]) -> list[Tensor]:
    """``stage`` applied to the whole matrix that each local direction is a part of; the local parts of the results."""
    return [stage(direction) for direction in directions]
