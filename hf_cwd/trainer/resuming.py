"""Chooses and verifies the checkpoint that a run resumes from."""

import json
import os
import time
from pathlib import Path
from typing import Any

from hf_cwd.checkpoint import manifest
from hf_cwd.checkpoint.files import CheckpointError, header, is_whole, pointer
from hf_cwd.checkpoint.saved_parallelism import LOAD_TIME, WHOLE, advice, saved_under
from hf_cwd.checkpoint.storage import Storage, together
from hf_cwd.log import logger
from hf_cwd.optim.original_params import listed
from hf_cwd.optim.state_dict import RESET
from hf_cwd.trainer.optim_args import asked_for
from hf_cwd.trainer.wrappers import innermost

# Files of the Trainer, Accelerate, DeepSpeed and this package. A checkpoint needs at least one match in each line.
NEEDED = {
    "weights": ("model*.safetensors", "pytorch_model*", "adapter_model.*", "*/adapter_model.*", "latest", "cwd_part-*"),
    "optimizer state": ("optimizer*", "latest", "cwd_part-*"),
    "schedule": ("scheduler.pt", "latest"),
}
BEGIN = "Resume from another one, or begin a new run from its weights by from_pretrained"
FRESH = f"{BEGIN}. With --optim_args {RESET} the run resumes with new states"


def verify_mode(args: Any) -> str:
    """The value of ``cwd_verify``: a field of CWDArgumentsMixin, or a key of ``--optim_args``."""
    return getattr(args, "cwd_verify", None) or asked_for(args, "cwd_verify") or "full"


def may_begin_fresh(trainer: Any) -> bool:
    """Whether a run may resume with new states if the checkpoint has none for its rule."""
    given = getattr(innermost(trainer.optimizer), "on_rule_change", None)  # of an optimizer given by optimizers=
    return "reset" in (given, asked_for(trainer.args, "on_rule_change"))


def chosen_checkpoint(storage: Storage, asked: str | bool | None, *, mode: str, fresh: bool = False) -> str | None:
    """Returns the checkpoint to resume from. All ranks must call it, and get the same one.

    It first finishes or removes what a killed run has left behind, see :meth:`Storage.recover`.

    Args:
        asked: the ``resume_from_checkpoint`` of ``Trainer.train``, or the text ``"true"``, as a script's flag gives it.
        mode: ``"full"`` compares checksums, ``"fast"`` sizes and headers, ``"off"`` nothing.
        fresh: the optimizer's states and the schedule may be missing.

    Raises:
        CheckpointError: the checkpoint is not what was saved, or there is none.
    """
    for line in storage.recover(fast=mode != "full"):
        logger().info(line)
    if isinstance(asked, str) and asked.lower() in ("true", "false") and not os.path.isdir(asked):
        asked = asked.lower() == "true"
    if not asked:
        return None
    if asked is not True:
        check(storage, Path(asked), mode=mode, fresh=fresh)
        return str(asked)
    return str(_newest(storage, mode, fresh=fresh))


def check(storage: Storage, checkpoint: Path, *, mode: str, fresh: bool = False) -> None:
    """Compares a checkpoint with its manifest, or logs that it has none; see :func:`chosen_checkpoint`."""
    if mode == "off":
        return
    if not all(together(lambda: manifest.exists(checkpoint))):
        together(lambda: _check_is_complete(checkpoint, fresh=fresh))
        _say(
            storage,
            f"{checkpoint} has no {manifest.NAME}, as when the plain Trainer saved it: it cannot be verified, and is "
            "taken as it is",
        )
        return
    start = time.perf_counter()
    saved = storage.verify(checkpoint, fast=mode == "fast", fresh=fresh)
    if not (saved.is_resumable or fresh):
        raise CheckpointError(f"{checkpoint} was saved with save_only_model and has no optimizer state", FRESH)
    taken = time.perf_counter() - start
    sizes = [record.size for name, record in saved.files.items() if saved.loads(name)]
    how = f"sizes and headers of {len(sizes)} files" if mode == "fast" else _speed(sizes, taken)
    _say(storage, f"{checkpoint} is what was saved at step {saved.step}: {how}")


def check_parallelism(storage: Storage, checkpoint: str, now: str | None, *, fresh: bool) -> None:
    """Raises CheckpointError if the checkpoint was saved under another parallelism, and so lacks the files needed now.

    If each node has its own disk, a rank does not see all files, and nothing is checked. If states may be ``fresh``,
    one process or DDP can load the weights that lie beside DeepSpeed's files.
    """
    (saved, *_) = together(lambda: saved_under(checkpoint) if storage.is_keeper else None)
    by_parts = LOAD_TIME in (saved, now)  # opening the rank's file gives a better message
    weights_alone = fresh and now == WHOLE and str(saved).startswith("DeepSpeed")
    if storage.is_one and None not in (saved, now) and saved != now and not (by_parts or weights_alone):
        raise CheckpointError(
            f"{checkpoint} was saved under {saved}, and this run trains under {now}", advice(checkpoint, saved)
        )


def _newest(storage: Storage, mode: str, *, fresh: bool) -> Path:
    lists = together(storage.checkpoints)
    steps = sorted(set.intersection(*(set(each) for each in lists)), reverse=True)
    skipped = []
    paths = [storage.directory / f"checkpoint-{step}" for step in steps]
    has_manifest = {path: all(together(lambda path=path: manifest.exists(path))) for path in paths}
    verifiable_first = sorted(paths, key=lambda path: not has_manifest[path])
    # A checkpoint without a manifest may be the newest because its run was killed while it was saved.
    for path in paths if mode == "off" else verifiable_first:
        try:
            if mode == "off":
                together(lambda path=path: _check_is_complete(path, fresh=fresh))
            else:
                check(storage, path, mode=mode, fresh=fresh)
        except CheckpointError as error:
            skipped.append(error.what)
            continue
        newer = [other for other in paths[: paths.index(path)] if not has_manifest[other]]
        for text in [*skipped, *(f"{other} has no {manifest.NAME}" for other in newer if mode != "off")]:
            _say(storage, f"skipped: {text}", is_warning=True)
        return path
    reasons = "".join(f"\n- {text}" for text in skipped) or " it has none"
    raise CheckpointError(
        f"resume_from_checkpoint=True: no checkpoint in {storage.directory} can be resumed from:{reasons}",
        "Give the path of another one, or leave resume_from_checkpoint out to start from step 0",
    )


def missing(checkpoint: Path, *, fresh: bool = False) -> list[str]:
    """What a resume needs and a checkpoint lacks; with ``fresh`` states it needs only the weights and the step."""
    lacks = [
        f"{what} ({patterns[0]}, {patterns[1]} ...)"
        for what, patterns in NEEDED.items()
        if (what == "weights" or not fresh) and not any(any(checkpoint.glob(pattern)) for pattern in patterns)
    ]
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if type(state["global_step"]) is not int or state["global_step"] < 1:
            lacks.append("trainer_state.json with the number of a step")
    except FileNotFoundError:
        lacks.append("trainer_state.json")
    except (ValueError, TypeError, KeyError):
        lacks.append("trainer_state.json that can be read")
    return lacks


def _check_is_complete(checkpoint: Path, *, fresh: bool) -> None:
    """Raises CheckpointError if a checkpoint without a manifest lacks a file, or one is visibly cut off."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a directory", "Give the path of a checkpoint, .../checkpoint-N")
    if lacks := missing(checkpoint, fresh=fresh):
        raise CheckpointError(
            f"{checkpoint} has no {', no '.join(lacks)}: its run was killed during the save, or it was saved with "
            "save_only_model",
            BEGIN if fresh else FRESH,
        )
    names = [path.name for path in sorted(checkpoint.iterdir()) if path.is_file()]
    if cut := [text for name in names if (text := _cut(checkpoint, name)) is not None]:
        raise CheckpointError(f"{checkpoint} is damaged: {'; '.join(cut)}", "Resume from another one")


def _cut(checkpoint: Path, name: str) -> str | None:
    """The problem of a file that a resume loads, as far as its format shows it; None if it looks whole."""
    if not manifest.is_of(name, (*manifest.WEIGHTS, *manifest.STATES, *manifest.OTHERS)):
        return None
    if pointer(checkpoint, name):
        return f"{name} is a Git LFS pointer, and git lfs pull fetches the file"
    try:
        header(checkpoint, name)
    except CheckpointError as error:
        return str(error)
    if name.endswith(".index.json"):
        return _lost_shards(checkpoint, name)
    return f"{name} was cut off" if name.endswith((".pt", ".pth")) and not is_whole(checkpoint, name) else None


def _lost_shards(checkpoint: Path, index: str) -> str | None:
    try:
        shards = set(json.loads((checkpoint / index).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{index} cannot be read"
    lost = sorted(shard for shard in shards if not (checkpoint / shard).is_file())
    return f"{index} names {listed(lost)}, which is missing" if lost else None


def _speed(sizes: list[int], seconds: float) -> str:
    size = sum(sizes) / 1e9
    return f"{len(sizes)} files, {size:.2f} GB compared in {seconds:.1f} s ({size / max(seconds, 1e-9):.1f} GB/s)"


def _say(storage: Storage, text: str, *, is_warning: bool = False) -> None:
    if storage.is_keeper:
        (logger().warning if is_warning else logger().info)(text)
