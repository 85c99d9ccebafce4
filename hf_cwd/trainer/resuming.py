"""From which checkpoint a run goes on: one that is what was saved, or none."""

import json
import os
import time
import zipfile
from pathlib import Path

from hf_cwd.checkpoint import manifest
from hf_cwd.checkpoint.files import CheckpointError, header
from hf_cwd.checkpoint.layout import LOAD_TIME, WHOLE, advice, saved_under
from hf_cwd.checkpoint.storage import Storage, together
from hf_cwd.trainer.log import logger

# What the Trainer, Accelerate, DeepSpeed or this package saves: of each line something must be there.
PARTS = {
    "weights": ("model*.safetensors", "pytorch_model*", "adapter_model.*", "*/adapter_model.*", "latest", "cwd_part-*"),
    "optimizer state": ("optimizer*", "latest", "cwd_part-*"),
    "schedule": ("scheduler.pt", "latest"),
}
BEGIN = "Resume from another one, or begin a new run from its weights by from_pretrained"


def chosen_checkpoint(storage: Storage, asked: str | bool | None, *, mode: str) -> str | None:
    """What to resume from; all ranks call it, and get the same.

    What a killed run has left is put in order first.

    Args:
        asked: as for ``Trainer.train``; also the text ``"true"``, which is what a script's own flag may give.
        mode: ``"full"`` compares checksums, ``"fast"`` sizes and headers, ``"off"`` nothing.

    Raises:
        CheckpointError: it is not what was saved, or there is none.
    """
    for line in storage.recover(fast=mode != "full"):
        logger().info(line)
    if isinstance(asked, str) and asked.lower() in ("true", "false") and not os.path.isdir(asked):
        asked = asked.lower() == "true"
    if not asked:
        return None
    if asked is not True:
        check(storage, Path(asked), mode=mode)
        return str(asked)
    return str(_newest(storage, mode))


def check(storage: Storage, checkpoint: Path, *, mode: str) -> None:
    """Compares a checkpoint with its manifest, or says that it has none; see :func:`chosen_checkpoint`."""
    if mode == "off":
        return
    if not all(together(lambda: manifest.exists(checkpoint))):
        together(lambda: _check_is_complete(checkpoint))
        _say(
            storage,
            f"{checkpoint} has no {manifest.NAME}, as when the plain Trainer saved it: it is taken as it is, for it "
            "cannot be verified",
        )
        return
    start = time.perf_counter()
    found = storage.verify(checkpoint, fast=mode == "fast")
    if not found.is_resumable:
        raise CheckpointError(f"{checkpoint} was saved with save_only_model and has no optimizer state", BEGIN)
    taken = time.perf_counter() - start
    how = f"sizes and headers of {len(found.files)} files" if mode == "fast" else _speed(found, taken)
    _say(storage, f"{checkpoint} is what was saved at step {found.step}: {how}")


def check_layout(storage: Storage, checkpoint: str, now: str | None, *, fresh: bool) -> None:
    """Raises a CheckpointError where the frameworks would look for files that another layout has not saved.

    With a disk for each node a rank does not see all files, and nothing is said. Where states are to be ``fresh``, the
    plain Trainer's layouts can take the weights beside DeepSpeed's files.
    """
    (saved, *_) = together(lambda: saved_under(checkpoint) if storage.is_keeper else None)
    by_parts = LOAD_TIME in (saved, now)  # each of these says more when it is opened
    weights_alone = fresh and now == WHOLE and str(saved).startswith("DeepSpeed")
    if storage.is_one and None not in (saved, now) and saved != now and not (by_parts or weights_alone):
        raise CheckpointError(
            f"{checkpoint} was saved under {saved}, and this run trains under {now}", advice(checkpoint, saved)
        )


def _newest(storage: Storage, mode: str) -> Path:
    lists = together(storage.checkpoints)
    steps = sorted(set.intersection(*(set(each) for each in lists)), reverse=True)
    skipped = []
    paths = [storage.directory / f"checkpoint-{step}" for step in steps]
    has = {path: all(together(lambda path=path: manifest.exists(path))) for path in paths}
    # One without a manifest may be the newest because its run was killed before it was whole.
    for path in paths if mode == "off" else [*filter(has.get, paths), *(path for path in paths if not has[path])]:
        try:
            if mode == "off":
                together(lambda path=path: _check_is_complete(path))
            else:
                check(storage, path, mode=mode)
        except CheckpointError as error:
            skipped.append(error.what)
            continue
        newer = [other for other in paths[: paths.index(path)] if not has[other]]
        for text in [*skipped, *(f"{other} has no {manifest.NAME}" for other in newer if mode != "off")]:
            _say(storage, f"skipped: {text}", is_warning=True)
        return path
    reasons = "".join(f"\n- {text}" for text in skipped) or " it has none"
    raise CheckpointError(
        f"resume_from_checkpoint=True: no checkpoint in {storage.directory} can be resumed from:{reasons}",
        "Give the path of another one, or leave resume_from_checkpoint out to begin anew",
    )


def missing(checkpoint: Path) -> list[str]:
    """What a resume would look for and not find in a checkpoint."""
    lacks = [
        f"{kind} ({patterns[0]}, {patterns[1]} ...)"
        for kind, patterns in PARTS.items()
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns)
    ]
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        lacks.append("trainer_state.json")
    except ValueError:
        lacks.append("trainer_state.json that can be read")
    return lacks


def _check_is_complete(checkpoint: Path) -> None:
    """Whether one without a manifest has all its parts, of which none is cut off, as far as that can be seen."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is no directory", "Give the path of a checkpoint, .../checkpoint-N")
    if lacks := missing(checkpoint):
        raise CheckpointError(
            f"{checkpoint} has no {', no '.join(lacks)}: its run was killed while it was saved, or it was saved with "
            "save_only_model",
            BEGIN,
        )
    cut = []
    for path in sorted(checkpoint.iterdir()):
        try:
            header(checkpoint, path.name)
        except CheckpointError as error:
            cut.append(str(error))
        if path.suffix in (".pt", ".pth") and path.is_file() and not zipfile.is_zipfile(path):
            cut.append(f"{path.name} has no end")
    if cut:
        raise CheckpointError(f"{checkpoint} is damaged: {'; '.join(cut)}", "Resume from another one")


def _speed(found: manifest.Manifest, seconds: float) -> str:
    return (
        f"{len(found.files)} files, {found.size / 1e9:.2f} GB compared in {seconds:.1f} s "
        f"({found.size / 1e9 / max(seconds, 1e-9):.1f} GB/s)"
    )


def _say(storage: Storage, text: str, *, is_warning: bool = False) -> None:
    if storage.is_keeper:
        (logger().warning if is_warning else logger().info)(text)
