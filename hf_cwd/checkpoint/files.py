"""Files of a checkpoint: which there are, checksums, the headers of safetensors, and putting them onto the disk."""

import json
import os
import stat
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

CHUNK = 64 * 2**20  # bytes under one checksum: an error says which of them are damaged
BUFFER = 4 * 2**20
THREADS = 4
LARGEST_HEADER = 100 * 2**20  # safetensors' own limit


class CheckpointError(ValueError):
    """A checkpoint is not what was saved, or cannot be known to be.

    Args:
        what: what is wrong with it.
        advice: what to do, where that is known.
    """

    def __init__(self, what: str, advice: str | None = None) -> None:
        super().__init__(what if advice is None else f"{what}. {advice}")
        self.what, self.advice = what, advice


@dataclass(frozen=True)
class Entry:
    """One file: its size, a CRC-32 of each ``CHUNK`` of it, and of safetensors each tensor's dtype and shape."""

    size: int
    crc32: tuple[int, ...]
    tensors: dict[str, tuple[str, tuple[int, ...]]] | None = None


def inside(directory: Path) -> dict[str, int]:
    """The size of each file under a directory, by its path with slashes.

    Raises:
        CheckpointError: one is a link that leads out, or no file at all.
    """
    found = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(directory).as_posix()
            found[relative] = regular_size(directory, relative)
    return dict(sorted(found.items()))


def regular_size(directory: Path, relative: str) -> int:
    """The size of a file that lies within a directory.

    Raises:
        CheckpointError: it is missing, a link that leads out of the directory, or no regular file.
    """
    path = directory / relative
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a link to itself
        raise CheckpointError(f"{relative} is missing") from None
    if not real.is_relative_to(directory.resolve()):
        raise CheckpointError(f"{relative} is a link that leads out of the checkpoint")
    found = real.stat()
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        raise CheckpointError(f"{relative} is not a file")
    return found.st_size


def check_relative(relative: Any) -> str:
    """The path, which must name something below the directory that it is joined to.

    Raises:
        CheckpointError: it does not, on this or on another system.
    """
    parts = PurePosixPath(relative).parts if isinstance(relative, str) else ()
    if not parts or relative != "/".join(parts) or ".." in parts or any(c in relative for c in "\\:\0"):
        raise CheckpointError(f"{relative!r} is no path below the checkpoint")
    return relative


def checksums(directory: Path, names: Iterable[str], *, sync: bool) -> dict[str, tuple[int, ...]]:
    """The checksums of some files, read by several threads in small pieces.

    Args:
        sync: also wait until each file is on the disk.
    """
    chunks = [(name, start) for name in names for start in range(0, max(1, (directory / name).stat().st_size), CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        numbers = list(pool.map(lambda chunk: _checksum(directory / chunk[0], chunk[1], sync), chunks))
    found: dict[str, tuple[int, ...]] = {}
    for (name, _), number in zip(chunks, numbers, strict=True):
        found[name] = (*found.get(name, ()), number)
    return found


def _checksum(path: Path, start: int, sync: bool) -> int:
    number, buffer = 0, memoryview(bytearray(min(BUFFER, path.stat().st_size or 1)))
    with open(path, "r+b" if sync else "rb", buffering=0) as file:
        file.seek(start)
        left = CHUNK
        while left and (count := file.readinto(buffer[:left])):
            number = zlib.crc32(buffer[:count], number)
            left -= count
        if sync:
            os.fsync(file.fileno())
    return number


def header(directory: Path, name: str) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """Dtype and shape of each tensor of a safetensors file, by its header alone; None for another kind of file.

    Raises:
        CheckpointError: the header is damaged, or the file has not the size that it gives.
    """
    if not name.endswith(".safetensors"):
        return None
    path, end = directory / name, 0
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError
            table = json.loads(file.read(length))
        tensors = {}
        for key, value in table.items():
            if key != "__metadata__":
                tensors[key] = (str(value["dtype"]), tuple(int(n) for n in value["shape"]))
                end = max(end, int(value["data_offsets"][1]))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise CheckpointError(f"{name} has a damaged header") from None
    size = path.stat().st_size
    if size != 8 + length + end:
        raise CheckpointError(f"{name} has {size} bytes, and by its header should have {8 + length + end}")
    return tensors


def sync_directory(directory: Path) -> None:
    """Waits until the names in a directory are on the disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_durably(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, and waits until it is on the disk."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_directory(path.parent)
