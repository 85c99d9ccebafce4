"""Page-locked memory between the CPU and an accelerator, used again and again."""

import torch
from torch import Tensor


class Staging:
    """One stretch of memory for each use, which grows as needed: locking pages takes longer than copying them.

    Copies from and to it must be over before it is asked for again; those that block are.
    """

    def __init__(self) -> None:
        self._memory: dict[object, Tensor] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"_memory": {}}

    def tensor(self, use: object, numel: int, dtype: torch.dtype) -> Tensor:
        """A tensor in one dimension, with any numbers in it; valid until the next call for the same use."""
        size = numel * dtype.itemsize
        memory = self._memory.get(use)
        if memory is None or memory.numel() < size:
            self._memory.pop(use, None)
            del memory  # frees the old one before there is a new one
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=torch.accelerator.is_available())
            self._memory[use] = memory
        return memory[:size].view(dtype)
