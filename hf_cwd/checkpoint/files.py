"""The files of a checkpoint: their sizes, checksums and safetensors headers, and how to sync them to the disk."""

import contextlib
import json
import os
import stat
import threading
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from xxhash import xxh3_64

CHUNK = 64 * 2**20  # bytes for each checksum: an error says which chunks are damaged
BUFFER = 2**20
THREADS = 4
INTERVAL = 0.02  # seconds between two calls of fsync
OPEN_FILES = "/proc/self/fd"
LARGEST_HEADER = 100 * 2**20  # safetensors' own limit
PICKLED = (".pt", ".pth", ".bin")  # torch.save writes zip archives, whose directory is at the end
POINTER = b"version https://git-lfs.github.com/spec/"


class CheckpointError(ValueError):
    """A checkpoint is not what was saved, or cannot be verified.

    Args:
        what: what is wrong with it.
        advice: what to do, if that is known.
    """

    def __init__(self, what: str, advice: str | None = None) -> None:
        super().__init__(what if advice is None else f"{what}. {advice}")
        self.what, self.advice = what, advice


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file: its size, the checksum of each ``CHUNK``, and the tensors of a safetensors file.

    The checksum is XXH3 of 64 bits. It finds damage at the speed of memory, but does not protect against forgery.
    """

    size: int
    xxh3_64: tuple[str, ...]
    tensors: dict[str, tuple[str, tuple[int, ...]]] | None = None


def inside(directory: Path) -> dict[str, int]:
    """The size of each file below a directory, by its relative path with slashes.

    Raises:
        CheckpointError: an entry is a link that leads out of the directory, or not a regular file.
    """
    sizes = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(directory).as_posix()
            sizes[relative] = regular_size(directory, relative)
    return dict(sorted(sizes.items()))


def regular_size(directory: Path, relative: str) -> int:
    """The size of a file below a directory.

    Raises:
        CheckpointError: the file is missing, a link that leads out of the directory, or not a regular file.
    """
    path = directory / relative
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a link to itself
        raise CheckpointError(f"{relative} is missing") from None
    if not real.is_relative_to(directory.resolve()):
        raise CheckpointError(f"{relative} is a link that leads out of the checkpoint")
    status = real.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
        raise CheckpointError(f"{relative} is not a file")
    return status.st_size


def check_relative(relative: Any) -> str:
    """Returns a relative path that stays below the directory that it is joined to.

    Raises:
        CheckpointError: the path could lead out of the directory, on this or on another operating system.
    """
    parts = PurePosixPath(relative).parts if isinstance(relative, str) else ()
    if not parts or relative != "/".join(parts) or ".." in parts or any(c in relative for c in "\\:\0"):
        raise CheckpointError(f"{relative!r} is not a path below the checkpoint")
    return relative


def checksums(directory: Path, names: Iterable[str], *, sync: bool) -> dict[str, tuple[str, ...]]:
    """The checksums of some files. Several threads read them with small buffers.

    Args:
        sync: also sync each file to the disk.
    """
    chunks = [(name, start) for name in names for start in range(0, max(1, (directory / name).stat().st_size), CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        sums = list(pool.map(lambda chunk: _checksum(directory / chunk[0], chunk[1], sync), chunks))
    result: dict[str, tuple[str, ...]] = {}
    for (name, _), checksum in zip(chunks, sums, strict=True):
        result[name] = (*result.get(name, ()), checksum)
    return result


def _checksum(path: Path, start: int, sync: bool) -> str:
    checksum, buffer = xxh3_64(), memoryview(bytearray(min(BUFFER, path.stat().st_size or 1)))
    with open(path, "r+b" if sync else "rb", buffering=0) as file:
        file.seek(start)
        left = CHUNK
        while left and (count := file.readinto(buffer[:left])):
            checksum.update(buffer[:count])
            left -= count
        if sync:
            os.fsync(file.fileno())
    return checksum.hexdigest()


def header(directory: Path, name: str) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """The dtype and shape of each tensor in the header of a safetensors file; None for any other file.

    Raises:
        CheckpointError: the header is damaged, or the file does not have the size that the header implies.
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
        raise CheckpointError(f"{name} has {size} bytes, but its header implies {8 + length + end}")
    return tensors


def is_whole(directory: Path, name: str) -> bool:
    """Whether the format of a file shows that it was not cut off; False for other formats."""
    path = directory / name
    if name.endswith(PICKLED):
        return zipfile.is_zipfile(path)
    try:
        if name.endswith(".json"):
            json.loads(path.read_bytes())
            return True
        return header(directory, name) is not None
    except (CheckpointError, ValueError, RecursionError):
        return False


def pointer(directory: Path, name: str) -> bool:
    """Whether a file is a Git LFS pointer, which ``git lfs pull`` replaces by the real file."""
    with open(directory / name, "rb") as file:
        return file.read(len(POINTER)) == POINTER


@contextlib.contextmanager
def written_early(directory: Path) -> Iterator[None]:
    """A context in which files below a directory are synced to the disk while this process is still writing them.

    Otherwise the operating system waits, for up to half a minute, until much data has accumulated. This only saves
    time: the caller must still sync all files at the end. Without ``/proc`` it does nothing.

    Raises:
        OSError: the disk failed. The system reports that to the first fsync only, so it must be raised here.
    """
    failed: list[OSError] = []
    ended = threading.Event()

    def ask() -> None:
        while not failed and not ended.wait(INTERVAL):
            for path in _open_files(directory):
                try:
                    _sync(path)
                except FileNotFoundError:  # a temporary file
                    continue
                except OSError as error:
                    failed.append(error)

    thread = threading.Thread(target=ask, name="hf_cwd-sync", daemon=True)
    if os.path.isdir(OPEN_FILES):
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()
    if failed:
        raise failed[0]


def _open_files(directory: Path) -> list[Path]:
    """This process's open files in a directory. With a thousand ranks, listing the directory itself would cost more."""
    names, start = set(), os.path.join(os.path.realpath(directory), "")
    for number in os.listdir(OPEN_FILES):
        with contextlib.suppress(OSError):  # closed since then
            names.add(os.readlink(os.path.join(OPEN_FILES, number)))
    return [Path(name) for name in names if name.startswith(start)]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Syncs the names in a directory to the disk, on systems that support it."""
    if os.name == "posix":
        _sync(directory)


def replace_durably(path: Path, content: bytes) -> None:
    """Writes a file atomically, and syncs it to the disk."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_directory(path.parent)
