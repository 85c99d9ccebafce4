"""The machine that a benchmark ran on, and how much memory a piece of work takes on it."""

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    wide = next((name for name in ("avx512f", "avx2", "asimd") if re.search(rf"\b{name}\b", text)), "")
    return f"{found[1].strip() if found else platform.machine()} {wide}".strip()


def machine(device: str, *packages: str) -> dict[str, Any]:
    """What figures depend on. ``threads`` is that of this process."""
    found: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_meminfo("MemTotal") / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }
    found |= {name: version(name) for name in ("torch", "triton", *packages)}
    found |= {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "KMP_", "GOMP_"))}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda or torch.version.hip, "driver": _driver()}
    return found


def described(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value if value is not None else 'none'}" for name, value in found.items())


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip()


def _meminfo(name: str) -> int:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0
    return int(re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE)[1]) * 1024


def available(device: str) -> int:
    """Bytes that new tensors can have."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else _meminfo("MemAvailable")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _status(name: str) -> int:
    return int(re.search(rf"^{name}:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)[1]) * 1024


def resident(device: str) -> int | None:
    """Bytes in use; see :class:`Peak`."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        return _status("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None


class Peak:
    """The most memory that was in use at once since :meth:`start`, above what was in use then, in bytes.

    On a GPU torch's allocator knows. On Linux it is the peak of the resident set, which the kernel resets on request,
    after the C library was told to hand back what it keeps of freed memory; None where that cannot be had. Pages are
    counted when they are written, in batches of up to 64 per thread, so that it is right to about 1 MB.
    """

    def __init__(self, device: str) -> None:
        self.device, self.before = device, None

    def start(self) -> None:
        self.before = resident(self.device)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif self.before is not None:
            try:
                CLEAR.write_text("5")
            except OSError:
                self.before = None

    def stop(self) -> int | None:
        if self.before is None:
            return None
        if self.device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.before
        return max(0, _status("VmHWM") - self.before)


def peak_of(run: Callable[[], Any], device: str) -> int | None:
    """Bytes that ``run`` needs for a while, see :class:`Peak`."""
    peak = Peak(device)
    peak.start()
    run()
    return peak.stop()
