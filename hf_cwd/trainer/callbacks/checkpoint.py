"""A default callback that writes and verifies manifests for the checkpoints of the plain Trainer."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_cwd.checkpoint import manifest
from hf_cwd.checkpoint.files import CheckpointError
from hf_cwd.checkpoint.storage import Storage, together
from hf_cwd.log import warn_once
from hf_cwd.optim.optimizer import CWDOptimizer
from hf_cwd.trainer.optim_names import chosen, names
from hf_cwd.trainer.resuming import check, chosen_checkpoint, may_begin_fresh, verify_mode
from hf_cwd.trainer.saving import versions
from hf_cwd.trainer.wrappers import innermost


class CheckpointCallback(TrainerCallback):
    """Writes a manifest for each checkpoint, and verifies the checkpoint that a run resumes from.

    It acts only if an optimizer of this package trains. :class:`hf_cwd.CWDTrainer` has manifests of its own and removes
    this callback. The Trainer does not tell callbacks when all ranks have saved. With several ranks the manifest is
    therefore written after the next step, which no rank finishes before all have started it.
    :mod:`hf_cwd.trainer.resume_hooks` calls :meth:`newest` and :meth:`compare`.
    """

    def __init__(self) -> None:
        self._unsealed: Path | None = None
        self._compared: Path | None = None

    def newest(self, trainer: Any, folder: str) -> str | None:
        """The newest intact checkpoint in a run's directory, to resume from.

        None if no optimizer of this package is to train, or no checkpoint has a manifest.

        Raises:
            CheckpointError: no checkpoint can be resumed from; the message says why.
        """
        if chosen(trainer.args) not in names() and not _is_ours(trainer.optimizer):
            return None
        storage = Storage(folder, is_probed=False)
        paths = [storage.directory / name for name in storage.checkpoints().values()]
        if not any(together(lambda: any(map(manifest.exists, paths)))):
            return None
        checkpoint = chosen_checkpoint(storage, True, mode=verify_mode(trainer.args), fresh=may_begin_fresh(trainer))
        self._compared = Path(checkpoint)
        return checkpoint

    def compare(self, trainer: Any, checkpoint: str) -> None:
        """Compares the checkpoint that a run resumes from with its manifest, if it has one.

        Raises:
            CheckpointError: the checkpoint is not what was saved.
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
        self._seal(args)  # since the last save all ranks have met: they summed up their FLOPs

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
