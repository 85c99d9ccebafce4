"""The files of a checkpoint, for bench/checkpoint.py: their size, onto the disk, and out of the system's memory."""

import os
from pathlib import Path


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in files(directory))


def sync(directory: Path) -> None:
    for path in [*files(directory), *(path for path in directory.rglob("*") if path.is_dir()), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def forget(directory: Path) -> None:
    """Asks the system to keep nothing of the files in memory, which does so with what is on the disk."""
    for path in files(directory):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
