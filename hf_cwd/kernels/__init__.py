"""Kernels: how a rule and the decay walk over memory. ``eager`` is the specification; the faster ones are its twins."""

from hf_cwd.kernels.interface import Workspace
from hf_cwd.kernels.selection import KERNELS, Call, apply, calls, can_be_kept, directions, select, unavailable, update

__all__ = [
    "KERNELS",
    "Call",
    "Workspace",
    "apply",
    "calls",
    "can_be_kept",
    "directions",
    "select",
    "unavailable",
    "update",
]
