"""Files of a checkpoint: which there are, checksums, the headers of safetensors, and putting them onto the disk."""

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

CHUNK = 64 * 2**20  # bytes under one checksum: an error says which of them are damaged
BUFFER = 2**20
THREADS = 4
INTERVAL = 0.02  # seconds between two requests to the disk
OPEN_FILES = "/proc/self/fd"
LARGEST_HEADER = 100 * 2**20  # safetensors' own limit
PICKLED = (".pt", ".pth", ".bin")  # torch.save's, which are zip archives: their table stands at the end
POINTER = b"version https://git-lfs.github.com/spec/"


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
    """One file: its size, the XXH3 of each ``CHUNK`` of it, and of safetensors each tensor's dtype and shape.

    XXH3 finds damage at the speed of memory, 64 bits of it; it is no protection against forgery.
    """

    size: int
    xxh3_64: tuple[str, ...]
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


def checksums(directory: Path, names: Iterable[str], *, sync: bool) -> dict[str, tuple[str, ...]]:
    """The checksums of some files, read by several threads in small pieces.

    Args:
        sync: also wait until each file is on the disk.
    """
    chunks = [(name, start) for name in names for start in range(0, max(1, (directory / name).stat().st_size), CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        sums = list(pool.map(lambda chunk: _checksum(directory / chunk[0], chunk[1], sync), chunks))
    found: dict[str, tuple[str, ...]] = {}
    for (name, _), checksum in zip(chunks, sums, strict=True):
        found[name] = (*found.get(name, ()), checksum)
    return found


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


def is_whole(directory: Path, name: str) -> bool:
    """Whether a file has the end that its format asks for, so that it was not cut off; False where none is known."""
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
    """Whether a file is what Git has in the place of a large one until ``git lfs pull`` fetches it."""
    with open(directory / name, "rb") as file:
        return file.read(len(POINTER)) == POINTER


@contextlib.contextmanager
def written_early(directory: Path) -> Iterator[None]:
    """Lets the disk begin with files below a directory while this process is writing them, so that it ends sooner.

    The system begins by itself only when much has come together, half a minute later or when it is asked. What it is
    asked here it has still to be asked at the end, of all files. Where there is no ``/proc`` nothing is done early.

    Raises:
        OSError: the disk's. It tells whoever asks first, and nobody after that.
    """
    failed: list[OSError] = []
    ended = threading.Event()

    def ask() -> None:
        while not failed and not ended.wait(INTERVAL):
            for path in _open_files(directory):
                try:
                    _sync(path)
                except FileNotFoundError:  # it was temporary
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
    """Those of this process: to list the directory would burden a file system of a thousand ranks."""
    found, start = set(), os.path.join(os.path.realpath(directory), "")
    for number in os.listdir(OPEN_FILES):
        with contextlib.suppress(OSError):  # closed since then
            found.add(os.readlink(os.path.join(OPEN_FILES, number)))
    return [Path(name) for name in found if name.startswith(start)]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Waits until the names in a directory are on the disk, where the system can."""
    if os.name == "posix":
        _sync(directory)


def replace_durably(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, and waits until it is on the disk."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_directory(path.parent)
