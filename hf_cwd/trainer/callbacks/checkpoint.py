"""Manifests for checkpoints of the plain Trainer, which saves in its own way: a callback that it has by default."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_cwd.checkpoint import manifest
from hf_cwd.checkpoint.files import CheckpointError
from hf_cwd.checkpoint.storage import Storage, together
from hf_cwd.log import warn_once
from hf_cwd.optim.optimizer import CWDOptimizer
from hf_cwd.trainer.checks import innermost
from hf_cwd.trainer.optim_names import chosen, names
from hf_cwd.trainer.resuming import check, chosen_checkpoint, may_begin_fresh, verify_mode
from hf_cwd.trainer.saving import versions


class CheckpointCallback(TrainerCallback):
    """Writes the manifest of each checkpoint, and compares the one that a run goes on from.

    Only where an optimizer of this package trains; :class:`hf_cwd.CWDTrainer`, which does it all by itself, takes it
    away. The Trainer does not tell callbacks when all ranks have saved: with several ranks the manifest is written
    after the next step, which no rank ends before all have begun it. What it resumes from is told by
    :mod:`hf_cwd.trainer.resume_hooks`.
    """

    def __init__(self) -> None:
        self._unsealed: Path | None = None
        self._compared: Path | None = None

    def newest(self, trainer: Any, folder: str) -> str | None:
        """What to resume from in a run's directory: the newest checkpoint that is what was saved.

        None where no optimizer of this package is to train, or no checkpoint there has a manifest.

        Raises:
            CheckpointError: none will do; it says why.
        """
        if chosen(trainer.args) not in names() and not _is_ours(trainer.optimizer):
            return None
        storage = Storage(folder, is_probed=False)
        paths = [storage.directory / name for name in storage.checkpoints().values()]
        if not any(together(lambda: any(map(manifest.exists, paths)))):
            return None
        found = chosen_checkpoint(storage, True, mode=verify_mode(trainer.args), fresh=may_begin_fresh(trainer))
        self._compared = Path(found)
        return found

    def compare(self, trainer: Any, checkpoint: str) -> None:
        """Compares what a run goes on from with its manifest, if it has one.

        Raises:
            CheckpointError: it is not what was saved.
        """
        compared, self._compared, path = self._compared, None, Path(checkpoint)
        mode = verify_mode(trainer.args)
        if path != compared and mode != "off" and all(together(lambda: manifest.exists(path))):
            storage = Storage(trainer.args.output_dir, is_probed=False)
            check(storage, path, mode=mode, fresh=may_begin_fresh(trainer))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._unsealed = None

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
