"""The matrices in a parameter: fused projections, stacks of experts, transposed and convolutional weights."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class MatrixLayout:
    """How a parameter of two or more dimensions holds matrices ``(out_features, in_features)``.

    By default the last two dimensions are one matrix. Dimensions before them are a stack of independent matrices.

    Attributes:
        sizes: the out_features of each matrix that is fused into the parameter, in order; empty for one matrix.
        periods: how many times the pattern of ``sizes`` repeats along the output dimension. A matrix has rows in every
            period: ``sizes=(d, d, d), periods=heads`` is q, k, v interleaved by head.
        transposed: whether the last dimension is the output, as in ``x @ weight``.
        flattened: whether all dimensions but the first are the input, as in a convolution.

    Example:
        >>> import torch
        >>> from hf_cwd.newton_schulz.matrices import MatrixLayout
        >>> qkv = torch.arange(6.0).view(6, 1)
        >>> [m.flatten().tolist() for m in MatrixLayout(sizes=(1, 1, 1), periods=2).matrices(qkv)]
        [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    """

    sizes: tuple[int, ...] = ()
    periods: int = 1
    transposed: bool = False
    flattened: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))  # a list if a state dict was saved as JSON

    def check(self, shape: Sequence[int]) -> None:
        """Raises ValueError if a parameter of this shape cannot have this layout."""
        if len(shape) < 2:
            raise ValueError(f"shape {tuple(shape)} holds no matrix")
        if self.periods < 1 or any(size < 1 for size in self.sizes):
            raise ValueError(f"sizes {self.sizes} and periods {self.periods} must be positive")
        if self.transposed and self.flattened and (self.sizes or self.periods > 1):
            raise ValueError("sizes and periods are not supported with both transposed and flattened")
        rows = shape[0] if self.flattened else shape[-1] if self.transposed else shape[-2]
        if rows % self.periods or (self.sizes and rows != self.periods * sum(self.sizes)):
            expected = " + ".join(map(str, self.sizes)) or "..."
            expected = f"{self.periods} x ({expected})" if self.periods > 1 else expected
            raise ValueError(f"shape {tuple(shape)} has {rows} output features, not {expected}")

    def count(self, shape: Sequence[int]) -> int:
        """The number of matrices in a parameter of this shape."""
        return max(1, len(self.sizes)) * (1 if self.flattened else prod(shape[:-2]))

    def matrices(self, tensor: Tensor) -> list[Tensor]:
        """The matrices as ``(..., out_features, in_features)``: views if the memory order allows, else copies."""
        x = tensor.flatten(1) if self.flattened else tensor
        x = x.mT if self.transposed else x
        x = x.unflatten(-2, (self.periods, x.size(-2) // self.periods))
        return [block.flatten(-3, -2) for block in (x.split(list(self.sizes), dim=-2) if self.sizes else (x,))]

    def as_group_value(self) -> dict[str, Any]:
        """The fields as a dict of plain Python values, so that state dicts load with ``weights_only=True``."""
        return asdict(self)
