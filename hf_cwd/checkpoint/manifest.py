"""The manifest of a checkpoint, ``cwd_manifest.json``: lists its files, and verifies that they are what was saved."""

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
    FileRecord,
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
NAMED = 5  # an error lists up to this many problems
LARGEST = 2**28  # bytes of a manifest
# The files that the Trainer, Accelerate, DeepSpeed and this package load when a run resumes, as paths below the
# checkpoint. Any other file is the user's own: notes, a README.md, a tokenizer, an export.
ADAPTERS = ("adapter_model.*", "adapter_config.json", "*/adapter_model.*", "*/adapter_config.json")
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "pytorch_model*", *ADAPTERS)
STATES = ("optimizer.pt", "optimizer.bin", "optimizer_*/*", "scheduler.pt")
OTHERS = ("trainer_state.json", "config.json", "rng_state*.pth", "scaler.pt", "latest", "global_step*/*", "cwd_part-*")
ADVICE = (
    "Copy the checkpoint again if it was copied, or resume from another one: resume_from_checkpoint=True takes the "
    "newest intact one. To use it without verification, give --optim_args cwd_verify=off"
)


@dataclass(frozen=True)
class Manifest:
    """What was saved: the Trainer's step, the number of ranks, the versions of packages, and the files by path.

    ``is_resumable`` is False for a checkpoint of weights alone, from which a run can resume with new states only.
    """

    step: int
    world_size: int
    is_resumable: bool
    versions: dict[str, str]
    files: dict[str, FileRecord]

    def loads(self, name: str) -> bool:
        """Whether a run that resumes from this checkpoint loads a file of this name, saved with it or added later."""
        if is_of(name, ADAPTERS):  # they are not loaded for a model that was saved without adapters
            return any(is_of(other, ADAPTERS) for other in self.files)
        return is_of(name, (*WEIGHTS, *STATES, *OTHERS))


def describe(directory: str | Path, names: Iterable[str] | None = None) -> dict[str, FileRecord]:
    """Syncs files to the disk, and returns their records for a manifest.

    Args:
        names: paths below the directory, with slashes; None means all files except the manifest.

    Raises:
        CheckpointError: a file is not a regular file, is a link that leads out of the directory, or has a damaged
            safetensors header.
    """
    directory = Path(directory)
    chosen = [name for name in (inside(directory) if names is None else names) if not _is_own(name)]
    sizes = {name: regular_size(directory, name) for name in chosen}
    sums = checksums(directory, chosen, sync=True)
    return {name: FileRecord(sizes[name], sums[name], header(directory, name)) for name in chosen}


def write(
    directory: str | Path,
    *,
    step: int,
    world_size: int,
    versions: Mapping[str, str],
    is_resumable: bool = True,
    files: Mapping[str, FileRecord] | None = None,
) -> Manifest:
    """Writes the manifest last: if it exists, all files that it names are on the disk.

    Args:
        files: the results of :func:`describe`, of all ranks; None describes all files here.

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
    """Whether there is a manifest, valid or not."""
    return os.path.lexists(Path(directory) / NAME)


def read(directory: str | Path) -> Manifest:
    """Reads the manifest of a checkpoint, without comparing any file.

    Raises:
        CheckpointError: the manifest is missing or damaged, has another format, or names files outside the checkpoint.
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
        fast: compare only sizes and the headers of safetensors.

    Raises:
        CheckpointError: they differ. The message names the files, what differs, and what to do.
    """
    manifest = read(directory)
    check(directory, problems(directory, manifest, manifest.files, fast=fast) + foreign(directory, manifest))
    return manifest


def check(directory: str | Path, differences: list[str]) -> None:
    """Raises a CheckpointError that lists the differences, if there are any."""
    if differences:
        more = f"; and {len(differences) - NAMED} more" if differences[NAMED:] else ""
        raise CheckpointError(f"{directory} is not what was saved: {'; '.join(differences[:NAMED])}{more}", ADVICE)


def problems(directory: str | Path, manifest: Manifest, names: Iterable[str], *, fast: bool = False) -> list[str]:
    """The differences between some files of a checkpoint and its manifest; see :func:`verify`."""
    directory = Path(directory)
    result, whole = [], []
    for name in names:
        record = manifest.files[name]
        try:
            _compare_sizes(directory, name, record)
            _compare_headers(name, record, header(directory, name))
        except CheckpointError as error:
            result.append(str(error))
        else:
            whole.append(name)
    if not fast:
        for name, sums in checksums(directory, whole, sync=False).items():
            record = manifest.files[name]
            bad = [i for i, (now, then) in enumerate(zip(sums, record.xxh3_64, strict=True)) if now != then]
            if bad:
                result.append(f"{name} was changed, in {_place(bad, record.size)}")
    return result


def foreign(directory: str | Path, manifest: Manifest) -> list[str]:
    """The files that were not saved with a checkpoint, but would be loaded with it."""
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


def _compare_sizes(directory: Path, name: str, record: FileRecord) -> None:
    size = regular_size(directory, name)
    if size == record.size:
        return
    differs = f"{name} has {size} bytes instead of {record.size}"
    if pointer(directory, name):
        raise CheckpointError(f"{differs}: it is a Git LFS pointer, and git lfs pull fetches the file")
    if is_whole(directory, name):
        raise CheckpointError(f"{differs}: it was written again after it was saved")
    raise CheckpointError(differs + (": it was cut off" if size < record.size else ""))


def _compare_headers(name: str, record: FileRecord, now: dict[str, tuple[str, tuple[int, ...]]] | None) -> None:
    for tensor in sorted({*(record.tensors or {}), *(now or {})}):
        before, after = (record.tensors or {}).get(tensor), (now or {}).get(tensor)
        if before != after:
            raise CheckpointError(
                f"{name}: tensor {tensor} is {_dtype_and_shape(after)}, and was {_dtype_and_shape(before)} when it was "
                "saved"
            )


def _dtype_and_shape(tensor: tuple[str, tuple[int, ...]] | None) -> str:
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
        raise CheckpointError(f"{NAME} is damaged: it is not valid JSON") from None
    if not isinstance(body, dict) or type(body.get("format")) is not int:
        raise CheckpointError(f"{NAME} is damaged: it has no format")
    if body["format"] != FORMAT:
        version = "an older" if body["format"] < FORMAT else "a newer"
        raise CheckpointError(
            f"{NAME} has format {body['format']}, of {version} hf_cwd, but this one reads format {FORMAT}: resume with "
            "the version of hf_cwd that saved it"
        )
    del body["format"]
    if body.pop("sha256", None) != _digest(body):
        raise CheckpointError(f"{NAME} was changed after it was written, or is cut off")
    _expect(body, {"step", "world_size", "is_resumable", "versions", "files"})
    versions, files = body["versions"], body["files"]
    if not (isinstance(versions, dict) and all(isinstance(v, str) for v in versions.values())):
        raise CheckpointError(f"{NAME} has versions that are not text")
    if type(body["is_resumable"]) is not bool:
        raise CheckpointError(f"{NAME} does not say whether it is resumable")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{NAME} names no files")
    step, world = _number(body["step"]), _number(body["world_size"])
    records = {check_relative(name): _file_record(item) for name, item in files.items()}
    return Manifest(step, world, body["is_resumable"], versions, records)


def _file_record(item: Any) -> FileRecord:
    _expect(item, {"size", "xxh3_64", "tensors"})
    size, sums, tensors = _number(item["size"]), item["xxh3_64"], item["tensors"]
    if not isinstance(sums, list) or len(sums) != len(range(0, max(1, size), CHUNK)):
        raise CheckpointError(f"{NAME} has the wrong number of checksums for a file of {size} bytes")
    if tensors is not None:
        try:
            tensors = {key: (str(dtype), tuple(map(_number, shape))) for key, (dtype, shape) in tensors.items()}
        except (AttributeError, TypeError, ValueError):
            raise CheckpointError(f"{NAME} has tensors without a dtype and a shape") from None
    return FileRecord(size, tuple(map(_checksum, sums)), tensors)


def _expect(item: Any, keys: set[str]) -> None:
    if not isinstance(item, dict) or item.keys() != keys:
        raise CheckpointError(f"{NAME} has an item without exactly the keys {', '.join(sorted(keys))}")


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise CheckpointError(f"{NAME} has {str(value)[:40]!r} where a number must be")
    return value


def _checksum(value: Any) -> str:
    if not (isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value)):
        raise CheckpointError(f"{NAME} has {str(value)[:40]!r} where a checksum must be")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise CheckpointError(f"{NAME} has a key twice")
    return result


def _no_number(text: str) -> None:
    raise CheckpointError(f"{NAME} has {text} where a number must be")
