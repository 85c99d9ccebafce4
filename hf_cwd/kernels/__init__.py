"""Kernels: how a rule and the decay walk over memory. ``eager`` is the specification; faster ones are twins of it."""

from types import ModuleType

import torch

from hf_cwd.kernels import eager


def select(name: str, device: torch.device) -> ModuleType:
    """The kernel for a group's ``kernel`` key on a device. ``"auto"`` is the fastest that runs there."""
    del name, device  # eager is the only one so far and runs everywhere; COMMON["kernel"] lists the valid names
    return eager
