"""The manifest of a checkpoint, ``cwd_manifest.json``: all its files, and whether they are still what was saved."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hf_cwd.checkpoint.files import (
    CHUNK,
    CheckpointError,
    Entry,
    check_relative,
    checksums,
    header,
    inside,
    is_whole,
    pointer,
    regular_size,
    replace_durably,
    sync_directory,
)
from hf_cwd.optim.original_params import listed

NAME = "cwd_manifest.json"
FORMAT = 2
NAMED = 5  # problems that an error lists
LARGEST = 2**28  # bytes of a manifest
# What the Trainer, Accelerate, DeepSpeed and this package load when a run goes on, as paths below the checkpoint. All
# else that lies there is the user's: notes, a README.md, a tokenizer, an export.
ADAPTERS = ("adapter_model.*", "adapter_config.json", "*/adapter_model.*", "*/adapter_config.json")
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "pytorch_model*", *ADAPTERS)
STATES = ("optimizer.pt", "optimizer.bin", "optimizer_*/*", "scheduler.pt")
OTHERS = ("trainer_state.json", "config.json", "rng_state*.pth", "scaler.pt", "latest", "global_step*/*", "cwd_part-*")
ADVICE = (
    "Copy the checkpoint again if it was copied, or resume from another one: resume_from_checkpoint=True takes the "
    "newest that is whole. To take it as it is now, give --optim_args cwd_verify=off"
)


@dataclass(frozen=True)
class Manifest:
    """What was saved: the Trainer's step, the number of ranks, versions of packages, and files by their paths.

    ``is_resumable`` is False for weights alone, from which a run goes on with new states only.
    """

    step: int
    world_size: int
    is_resumable: bool
    versions: dict[str, str]
    files: dict[str, Entry]

    def loads(self, name: str) -> bool:
        """Whether a run that goes on from this checkpoint loads a file, of it or one that was put there."""
        if is_of(name, ADAPTERS):  # beside the weights of a model nobody asks for adapters
            return any(is_of(other, ADAPTERS) for other in self.files)
        return is_of(name, (*WEIGHTS, *STATES, *OTHERS))


def describe(directory: str | Path, names: Iterable[str] | None = None) -> dict[str, Entry]:
    """What a manifest says of files, each of which is on the disk when this returns.

    Args:
        names: paths within the directory, with slashes; None means all but the manifest itself.

    Raises:
        CheckpointError: a file is no regular one, leads out of the directory, or is damaged safetensors.
    """
    directory = Path(directory)
    chosen = [name for name in (inside(directory) if names is None else names) if not _is_own(name)]
    sizes = {name: regular_size(directory, name) for name in chosen}
    sums = checksums(directory, chosen, sync=True)
    return {name: Entry(sizes[name], sums[name], header(directory, name)) for name in chosen}


def write(
    directory: str | Path,
    *,
    step: int,
    world_size: int,
    versions: Mapping[str, str],
    is_resumable: bool = True,
    files: Mapping[str, Entry] | None = None,
) -> Manifest:
    """Writes the manifest last: when it is there, all that it names is on the disk.

    Args:
        files: what :func:`describe` has said, on several ranks perhaps; None describes all of them here.

    Raises:
        CheckpointError: see :func:`describe`.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from hf_cwd.checkpoint import manifest
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "weights.bin").write_bytes(bytes(100))
        ...     _ = manifest.write(folder, step=3, world_size=1, versions={"torch": "2.13"})
        ...     before = manifest.verify(folder).step
        ...     _ = Path(folder, "weights.bin").write_bytes(bytes(99))
        ...     try:
        ...         manifest.verify(folder)
        ...     except manifest.CheckpointError as error:
        ...         print(before, "weights.bin has 99 bytes instead of 100" in str(error))
        3 True
    """
    directory = Path(directory)
    described = dict(describe(directory) if files is None else files)
    written = Manifest(step, world_size, is_resumable, dict(versions), described)
    for folder, _, _ in os.walk(directory):
        sync_directory(Path(folder))
    body = asdict(written)
    text = json.dumps({"format": FORMAT, "sha256": _digest(body), **body}, indent=1)
    replace_durably(directory / NAME, text.encode())
    return written


def exists(directory: str | Path) -> bool:
    """Whether there is a manifest, good or not."""
    return os.path.lexists(Path(directory) / NAME)


def read(directory: str | Path) -> Manifest:
    """The manifest of a checkpoint, by which nothing was compared yet.

    Raises:
        CheckpointError: there is none, it is damaged or of a later format, or it names files elsewhere.
    """
    directory = Path(directory)
    try:
        if regular_size(directory, NAME) > LARGEST:
            raise CheckpointError(f"{NAME} is larger than any manifest")
        return _parsed((directory / NAME).read_bytes())
    except CheckpointError as error:
        raise CheckpointError(f"{directory} cannot be verified: {error}", ADVICE) from None


def verify(directory: str | Path, *, fast: bool = False) -> Manifest:
    """Compares all files of a checkpoint with its manifest; loads nothing.

    Args:
        fast: compare sizes and the headers of safetensors only.

    Raises:
        CheckpointError: they differ; it names the files, what differs and what to do.
    """
    found = read(directory)
    check(directory, problems(directory, found, found.files, fast=fast) + foreign(directory, found))
    return found


def check(directory: str | Path, found: list[str]) -> None:
    """Raises a CheckpointError that lists problems, if there are any."""
    if found:
        more = f"; and {len(found) - NAMED} more" if found[NAMED:] else ""
        raise CheckpointError(f"{directory} is not what was saved: {'; '.join(found[:NAMED])}{more}", ADVICE)


def problems(directory: str | Path, manifest: Manifest, names: Iterable[str], *, fast: bool = False) -> list[str]:
    """What differs between some files of a manifest and what is in a checkpoint; see :func:`verify`."""
    directory = Path(directory)
    found, whole = [], []
    for name in names:
        entry = manifest.files[name]
        try:
            _compare_sizes(directory, name, entry)
            _compare_headers(name, entry, header(directory, name))
        except CheckpointError as error:
            found.append(str(error))
        else:
            whole.append(name)
    if not fast:
        for name, sums in checksums(directory, whole, sync=False).items():
            entry = manifest.files[name]
            bad = [i for i, (now, then) in enumerate(zip(sums, entry.xxh3_64, strict=True)) if now != then]
            if bad:
                found.append(f"{name} was changed, in {_place(bad, entry.size)}")
    return found


def foreign(directory: str | Path, manifest: Manifest) -> list[str]:
    """What was not saved with a checkpoint, and would be loaded with it."""
    there = {
        Path(folder, name).relative_to(directory).as_posix()
        for folder, _, names in os.walk(directory)
        for name in names
    }
    new = sorted(name for name in there - manifest.files.keys() if manifest.loads(name))
    weights = [name for name in new if is_of(name, WEIGHTS)]
    gone = [name for name in manifest.files if is_of(name, WEIGHTS) and name not in there]
    text = "{} is not of this checkpoint, and would be loaded with it"
    if not (weights and gone):
        return [text.format(name) for name in new]
    again = f"its weights were written again after it was saved, as {listed(weights)} instead of {listed(gone)}"
    new = [name for name in new if name not in weights]
    return [again, *(text.format(name) for name in new)]


def is_of(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of some patterns names a file."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _compare_sizes(directory: Path, name: str, entry: Entry) -> None:
    size = regular_size(directory, name)
    if size == entry.size:
        return
    differs = f"{name} has {size} bytes instead of {entry.size}"
    if pointer(directory, name):
        raise CheckpointError(f"{differs}: it is a pointer of Git LFS, and git lfs pull fetches the file")
    if is_whole(directory, name):
        raise CheckpointError(f"{differs}: it was written again after it was saved")
    raise CheckpointError(differs + (": it was cut off" if size < entry.size else ""))


def _compare_headers(name: str, entry: Entry, now: dict[str, tuple[str, tuple[int, ...]]] | None) -> None:
    for tensor in sorted({*(entry.tensors or {}), *(now or {})}):
        then, there = (entry.tensors or {}).get(tensor), (now or {}).get(tensor)
        if then != there:
            raise CheckpointError(f"{name}: tensor {tensor} is {_kind(there)}, and was {_kind(then)} when it was saved")


def _kind(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "not there" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def _place(chunks: list[int], size: int) -> str:
    places = [f"{chunk * CHUNK} to {min(size, (chunk + 1) * CHUNK) - 1}" for chunk in chunks[:NAMED]]
    return f"bytes {', '.join(places)}{' and others' if chunks[NAMED:] else ''}"


def _is_own(name: str) -> bool:
    return name in (NAME, f".{NAME}.part")


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _parsed(content: bytes) -> Manifest:
    try:
        body = json.loads(content, object_pairs_hook=_distinct, parse_constant=_no_number)
    except CheckpointError:
        raise
    except (ValueError, RecursionError):
        raise CheckpointError(f"{NAME} is damaged: it is no JSON") from None
    if not isinstance(body, dict) or type(body.get("format")) is not int:
        raise CheckpointError(f"{NAME} is damaged: it has no format")
    if body["format"] != FORMAT:
        version = "an older" if body["format"] < FORMAT else "a newer"
        raise CheckpointError(
            f"{NAME} has format {body['format']}, of {version} hf_cwd, and this one reads format {FORMAT}: resume with "
            "the version of hf_cwd that saved it"
        )
    del body["format"]
    if body.pop("sha256", None) != _digest(body):
        raise CheckpointError(f"{NAME} was changed after it was written, or is cut off")
    _expect(body, {"step", "world_size", "is_resumable", "versions", "files"})
    versions, files = body["versions"], body["files"]
    if not (isinstance(versions, dict) and all(isinstance(v, str) for v in versions.values())):
        raise CheckpointError(f"{NAME} has versions that are no text")
    if type(body["is_resumable"]) is not bool:
        raise CheckpointError(f"{NAME} does not say whether it is resumable")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{NAME} names no files")
    step, world = _number(body["step"]), _number(body["world_size"])
    entries = {check_relative(name): _entry(item) for name, item in files.items()}
    return Manifest(step, world, body["is_resumable"], versions, entries)


def _entry(item: Any) -> Entry:
    _expect(item, {"size", "xxh3_64", "tensors"})
    size, sums, tensors = _number(item["size"]), item["xxh3_64"], item["tensors"]
    if not isinstance(sums, list) or len(sums) != len(range(0, max(1, size), CHUNK)):
        raise CheckpointError(f"{NAME} has not the checksums of a file of {size} bytes")
    if tensors is not None:
        try:
            tensors = {key: (str(dtype), tuple(map(_number, shape))) for key, (dtype, shape) in tensors.items()}
        except (AttributeError, TypeError, ValueError):
            raise CheckpointError(f"{NAME} has tensors that are none") from None
    return Entry(size, tuple(map(_checksum, sums)), tensors)


def _expect(item: Any, keys: set[str]) -> None:
    if not isinstance(item, dict) or item.keys() != keys:
        raise CheckpointError(f"{NAME} has an item that is not {', '.join(sorted(keys))}")


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise CheckpointError(f"{NAME} has {str(value)[:40]!r} where a number must be")
    return value


def _checksum(value: Any) -> str:
    if not (isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value)):
        raise CheckpointError(f"{NAME} has {str(value)[:40]!r} where a checksum must be")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise CheckpointError(f"{NAME} has a key twice")
    return found


def _no_number(text: str) -> None:
    raise CheckpointError(f"{NAME} has {text} where a number must be")
