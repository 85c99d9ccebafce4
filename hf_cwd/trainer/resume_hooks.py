"""Wraps two methods of the plain Trainer, which tells no callback what it resumes from.

If an optimizer of this package trains, ``resume_from_checkpoint=True`` takes the newest intact checkpoint, and a
checkpoint is compared with its manifest before optimizer and schedule are loaded.
"""

import functools
from types import ModuleType
from typing import Any

from hf_cwd.optim.optimizer import CWDOptimizer
from hf_cwd.trainer.callbacks.checkpoint import CheckpointCallback
from hf_cwd.trainer.optimizer_loading import load_states
from hf_cwd.trainer.wrappers import innermost


def install(module: ModuleType) -> None:
    """Wraps the methods of ``transformers.trainer``'s Trainer. More calls change nothing."""
    trainer_class = module.Trainer
    if hasattr(trainer_class.train, "_hf_cwd_original"):
        return
    original_train, original_load = trainer_class.train, trainer_class._load_optimizer_and_scheduler

    @functools.wraps(original_train)
    def train(self: Any, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True and (callback := _callback(self)) is not None:
            # None leaves the search to the Trainer.
            resume_from_checkpoint = callback.newest(self, self.args.output_dir) or True
        return original_train(self, resume_from_checkpoint, *args, **kwargs)

    @functools.wraps(original_load)
    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        optimizer = innermost(self.optimizer)
        if checkpoint is None or not isinstance(optimizer, CWDOptimizer):
            original_load(self, checkpoint)
            return
        if (callback := _callback(self)) is not None:
            callback.compare(self, checkpoint)
        load_states(optimizer, self.lr_scheduler, checkpoint, functools.partial(original_load, self))

    train._hf_cwd_original, _load_optimizer_and_scheduler._hf_cwd_original = original_train, original_load
    trainer_class.train = train
    trainer_class._load_optimizer_and_scheduler = _load_optimizer_and_scheduler


def remove(module: ModuleType) -> None:
    """Undoes :func:`install`."""
    trainer_class = module.Trainer
    if hasattr(trainer_class.train, "_hf_cwd_original"):
        trainer_class.train = trainer_class.train._hf_cwd_original
        loads = trainer_class._load_optimizer_and_scheduler
        trainer_class._load_optimizer_and_scheduler = loads._hf_cwd_original


def _callback(trainer: Any) -> CheckpointCallback | None:
    """The Trainer's callback; None for CWDTrainer, which has removed it."""
    callbacks = (c for c in trainer.callback_handler.callbacks if isinstance(c, CheckpointCallback))
    return next(callbacks, None)
