"""What the plain Trainer is given for resuming, of which it tells no callback: put around two of its functions.

Where an optimizer of this package trains, ``resume_from_checkpoint=True`` takes the newest checkpoint that is what was
saved, and what a run goes on from is compared with its manifest when its weights have been loaded.
"""

import functools
import sys
from types import ModuleType
from typing import Any

from hf_cwd.optim.optimizer import CWDOptimizer
from hf_cwd.trainer.callbacks.checkpoint import CheckpointCallback
from hf_cwd.trainer.checks import innermost
from hf_cwd.trainer.optimizer_loading import load_states


def install(module: ModuleType) -> None:
    """Puts ours around those of ``transformers.trainer``; once."""
    if hasattr(module.get_last_checkpoint, "_hf_cwd_original"):
        return
    last, load = module.get_last_checkpoint, module.Trainer._load_optimizer_and_scheduler

    @functools.wraps(last)
    def get_last_checkpoint(folder: str) -> str | None:
        trainer = sys._getframe(1).f_locals.get("self")  # it is called with a folder alone
        callback = _callback(trainer) if isinstance(trainer, module.Trainer) else None
        return (callback and callback.newest(trainer, folder)) or last(folder)

    @functools.wraps(load)
    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        optimizer = innermost(self.optimizer)
        if checkpoint is None or not isinstance(optimizer, CWDOptimizer):
            load(self, checkpoint)
            return
        if (callback := _callback(self)) is not None:
            callback.compare(self, checkpoint)
        load_states(optimizer, self.lr_scheduler, checkpoint, functools.partial(load, self))

    get_last_checkpoint._hf_cwd_original, _load_optimizer_and_scheduler._hf_cwd_original = last, load
    module.get_last_checkpoint = get_last_checkpoint
    module.Trainer._load_optimizer_and_scheduler = _load_optimizer_and_scheduler


def remove(module: ModuleType) -> None:
    """Undoes :func:`install`."""
    if hasattr(module.get_last_checkpoint, "_hf_cwd_original"):
        module.get_last_checkpoint = module.get_last_checkpoint._hf_cwd_original
        loads = module.Trainer._load_optimizer_and_scheduler
        module.Trainer._load_optimizer_and_scheduler = loads._hf_cwd_original


def _callback(trainer: Any) -> CheckpointCallback | None:
    """None for CWDTrainer, which does it all by itself."""
    found = (c for c in trainer.callback_handler.callbacks if isinstance(c, CheckpointCallback))
    return next(found, None)
