"""How :class:`hf_cwd.CWDTrainer` saves: a checkpoint gets its name when all of its files are on the disk."""

import importlib.metadata
from pathlib import Path
from typing import Any

import transformers
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

import hf_cwd
from hf_cwd.checkpoint import manifest, saved_parallelism
from hf_cwd.checkpoint.files import CheckpointError, written_early
from hf_cwd.checkpoint.storage import Storage, together
from hf_cwd.log import warn_once
from hf_cwd.trainer.resuming import check_parallelism, chosen_checkpoint, may_begin_fresh, missing, verify_mode

LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft")


class SavingMixin:
    """The saving and resuming of :class:`hf_cwd.CWDTrainerMixin`.

    The Trainer's ``_save_checkpoint`` saves, records the best checkpoint, pushes to the Hub and rotates. Here it saves
    into a temporary directory, which has no old checkpoints to rotate. Then all ranks sync their files to the disk, the
    manifest is written, and the checkpoint is renamed to its final name. Only then is it pushed, and old ones are
    removed.
    """

    _cwd_storage: Storage | None = None
    _cwd_staging: Path | None = None
    _cwd_is_to_push = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """``Trainer.train`` that verifies the checkpoint before it resumes from it.

        Args:
            resume_from_checkpoint: a checkpoint; or True for the newest intact one in the output directory.

        Raises:
            CheckpointError: a ValueError that says what differs from what was saved, or why no checkpoint can be
                resumed from.
        """
        if self.args.save_strategy != SaveStrategy.NO or resume_from_checkpoint:
            storage = self._cwd_storage_of(self.args.output_dir, saves=self.args.save_strategy != SaveStrategy.NO)
            fresh = may_begin_fresh(self)
            resume_from_checkpoint = chosen_checkpoint(
                storage, resume_from_checkpoint, mode=verify_mode(self.args), fresh=fresh
            )
            if resume_from_checkpoint is not None:
                check_parallelism(storage, resume_from_checkpoint, self._cwd_parallelism(), fresh=fresh)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _cwd_storage_of(self, directory: str | Path, *, saves: bool = True) -> Storage:
        """The Storage of a directory, probed once. A run that does not save need not be able to write there."""
        storage = self._cwd_storage
        if storage is None or storage.directory != Path(directory) or (saves and not storage.is_probed):
            self._cwd_storage = Storage(directory, is_probed=saves)
        return self._cwd_storage

    def _cwd_parallelism(self) -> str | None:
        """How this run shards its states, in the words of :mod:`hf_cwd.checkpoint.saved_parallelism`."""
        if self.is_deepspeed_enabled:
            stage = self.args.hf_deepspeed_config.get_value("zero_optimization.stage", 0)
            stages = saved_parallelism.STAGE_3 if stage == 3 else saved_parallelism.STAGES_1_2
            return saved_parallelism.zero(stages, self.args.world_size) if stage else None
        if self.is_fsdp_enabled:
            return saved_parallelism.FSDP.format(self.accelerator.state.fsdp_plugin.state_dict_type.name)
        return saved_parallelism.LOAD_TIME if getattr(self, "_cwd_is_sharded", False) else saved_parallelism.WHOLE

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._cwd_staging is None else str(self._cwd_staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._cwd_staging is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self._cwd_is_to_push = True

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        step, best = self.state.global_step, self.state.best_model_checkpoint
        storage, name = self._cwd_storage_of(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{step}"
        staging = None
        try:
            staging = storage.stage(name)
            self._cwd_staging, self._cwd_is_to_push = staging, False
            try:
                with written_early(staging):
                    super()._save_checkpoint(model, trial, *args, **kwargs)
            finally:
                self._cwd_staging = None
            if (staging / name).is_dir():
                self._cwd_note_best(storage, staging / name)
                self._cwd_seal(storage, staging / name)
                storage.publish(staging, name)
            else:
                # A subclass, or another version of the Trainer, may not use _get_output_dir.
                warn_once(
                    f"{type(self).__name__} saved {name} directly, not where CWDTrainer told it: the manifest is "
                    "written afterwards, and a run that is killed in between leaves a checkpoint without one"
                )
                storage.discard(staging)
                self._cwd_seal(storage, storage.directory / name)
        except Exception as error:
            self.state.best_model_checkpoint = best
            if staging is not None:
                storage.discard(staging)
            raise RuntimeError(_failure(storage, name, error)) from error
        if self._cwd_is_to_push:
            super()._push_from_checkpoint(str(storage.directory / name))
        best = self.state.best_model_checkpoint
        storage.rotate(self.args.save_total_limit, [name] if best is None else [name, Path(best).name])

    def _cwd_seal(self, storage: Storage, checkpoint: Path) -> None:
        is_resumable = not self.args.save_only_model
        if not storage.is_one and is_resumable:
            together(lambda: _check_node(checkpoint) if storage.is_keeper else None)
        storage.seal(checkpoint, step=self.state.global_step, versions=versions(), is_resumable=is_resumable)

    def _cwd_note_best(self, storage: Storage, checkpoint: Path) -> None:
        """Sets the final path of the best checkpoint; the Trainer saw only the temporary directory."""
        step, seen = self.state.best_global_step, self.state.best_model_checkpoint
        if not step or self.args.save_strategy == SaveStrategy.NO:
            return
        path = storage.directory / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if step == self.state.global_step or path.exists():
            self.state.best_model_checkpoint = str(path)
        if self.state.best_model_checkpoint != seen and self.args.should_save:
            self.state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))


def versions() -> dict[str, str]:
    """The versions of the packages that write a checkpoint."""
    result = {"hf_cwd": hf_cwd.__version__}
    for name in LIBRARIES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return result


def _check_node(checkpoint: Path) -> None:
    if lacks := missing(checkpoint):
        raise CheckpointError(
            f"on this node it has no {', no '.join(lacks)}",
            f"Each node has its own disk here, and transformers {transformers.__version__} does not write all files "
            "that a node needs, with or without save_on_each_node: give an --output_dir that all nodes share",
        )


def _failure(storage: Storage, name: str, error: Exception) -> str:
    whole = [
        other
        for other in storage.checkpoints().values()
        if other != name and manifest.exists(storage.directory / other)
    ]
    last = f"{whole[-1]} and older checkpoints are unchanged" if whole else "no checkpoint was saved before it"
    return (
        f"{name} could not be saved in {storage.directory}: {type(error).__name__}: {error}. Nothing else was touched: "
        f"{last}. Free disk space, or fix what the error says, and continue with resume_from_checkpoint=True"
    )
