"""The least that an element-wise step can cost on a CPU: its reads and writes, without its arithmetic."""

import ctypes
import functools
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from hf_cwd.kernels.build import compiler

SOURCE = Path(__file__).with_name("traffic.c")


class Traffic:
    """Reads and writes what a step of AdamW (two states) or Lion (one) does, of float32 tensors on a CPU.

    What it leaves in them means nothing.
    """

    def __init__(self, params: Sequence[Tensor], states: int) -> None:
        self.params, self.states, self.library = list(params), states, _library()
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def step(self) -> None:
        params = [p for p in self.params if p.grad is not None]
        for p in params:
            if p not in self.state:
                self.state[p] = {f"state {k}": torch.zeros_like(p) for k in range(self.states)}
        tensors = [(p, p.grad, *self.state[p].values()) for p in params]
        addresses = array("q", [t.data_ptr() for some in tensors for t in some])
        numels = array("q", [p.numel() for p in params])
        given = (2 + self.states, len(params), addresses.buffer_info()[0], numels.buffer_info()[0])
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda first: self.library.traffic(*given, first, threads), range(threads)))


@functools.cache
def _library() -> ctypes.CDLL:
    """Raises hf_cwd.kernels.build.BuildError without a compiler."""
    flags = ["-O3", "-march=native", "-fPIC", "-shared"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "traffic.so"
        subprocess.run([*compiler(), *flags, str(SOURCE), "-o", str(target)], check=True, timeout=120)
        library = ctypes.CDLL(str(target))
    number, address = ctypes.c_int64, ctypes.c_void_p
    library.traffic.argtypes = (ctypes.c_int, number, address, address, number, number)
    library.traffic.restype = None
    return library
