"""Manifests for checkpoints of the plain Trainer, which saves in its own way: a callback that it has by default."""

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_cwd.checkpoint import manifest
from hf_cwd.checkpoint.files import CheckpointError
from hf_cwd.checkpoint.storage import Storage, together
from hf_cwd.optimizer import CWDOptimizer
from hf_cwd.trainer.checks import innermost
from hf_cwd.trainer.log import warn_once
from hf_cwd.trainer.resuming import check
from hf_cwd.trainer.saving import versions


class CheckpointCallback(TrainerCallback):
    """Writes the manifest of each checkpoint, and compares the one that a run goes on from, before its first step.

    Only where an optimizer of this package trains; :class:`hf_cwd.CWDTrainer`, which does it all by itself, takes it
    away. The Trainer tells callbacks neither when all ranks have saved nor what it resumes from. So with several ranks
    the manifest is written after the next step, which no rank ends before all have begun it; and what is compared is
    ``args.resume_from_checkpoint``, or else the output directory's checkpoint of the step at which training begins.

    Raises:
        CheckpointError: the checkpoint that was resumed from is not what was saved.
    """

    def __init__(self) -> None:
        self._unsealed: Path | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self._unsealed = None
        if state.global_step == 0 or not _is_ours(optimizer):
            return
        mode = getattr(args, "cwd_verify", "full")
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.resume_from_checkpoint and os.path.isdir(args.resume_from_checkpoint):
            checkpoint = Path(args.resume_from_checkpoint)
        if mode != "off" and all(together(lambda: manifest.exists(checkpoint))):
            check(Storage(args.output_dir, is_probed=False), checkpoint, mode=mode)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if not args.should_save or state.is_hyper_param_search or not _is_ours(optimizer):
            return
        self._unsealed = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.world_size == 1:
            self._seal(args)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._seal(args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seal(args)  # ranks have added up their operations after the last save

    def _seal(self, args: TrainingArguments) -> None:
        checkpoint, self._unsealed = self._unsealed, None
        if checkpoint is None or not checkpoint.is_dir():
            return
        try:
            step = int(checkpoint.name.rpartition("-")[2])
            resumable = not args.save_only_model
            manifest.write(
                checkpoint, step=step, world_size=args.world_size, versions=versions(), is_resumable=resumable
            )
        except (OSError, CheckpointError) as error:
            warn_once(f"{checkpoint} has no {manifest.NAME}, and cannot be verified later: {error}")


def _is_ours(optimizer: Any) -> bool:
    return isinstance(innermost(optimizer), CWDOptimizer)
