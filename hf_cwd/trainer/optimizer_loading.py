"""Loads optimizer and schedule of a resumed run, also if the states are another rule's and new ones begin."""

import contextlib
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from hf_cwd.optim.optimizer import CWDOptimizer
from hf_cwd.optim.state_dict import RESET

SCHEDULE = "scheduler.pt"  # SCHEDULER_NAME of transformers.trainer, which cannot be imported while it imports this


def load_states(optimizer: CWDOptimizer, lr_scheduler: Any, checkpoint: str, load: Callable[[str], None]) -> None:
    """Lets the Trainer load optimizer and schedule from a checkpoint.

    Args:
        load: the Trainer's method that does it.

    Raises:
        pickle.UnpicklingError: torch refuses to unpickle the states, and ``on_rule_change`` is not ``"reset"``.
    """
    with of_any_groups(lr_scheduler):
        try:
            load(checkpoint)
        except pickle.UnpicklingError as error:  # the states of GaLore and APOLLO hold objects of their own classes
            reason = f"torch does not load the optimizer's state in {checkpoint} from a file"
            if optimizer.on_rule_change != "reset":
                error.add_note(
                    f"[hf_cwd] {reason}: continue with the optimizer that saved it, or begin with new states by "
                    f"--optim_args {RESET} (weights, step number and schedule go on)"
                )
                raise
            optimizer.reset_because = reason
            lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULE), weights_only=True))


@contextlib.contextmanager
def of_any_groups(lr_scheduler: Any) -> Iterator[None]:
    """A context in which a schedule loads even if it was saved for another number of groups; see :func:`follow`."""
    if not isinstance(lr_scheduler, LambdaLR):
        yield
        return

    def load_state_dict(state: dict[str, Any]) -> None:
        if "lr_lambdas" not in state:
            raise ValueError(
                "the checkpoint's schedule is of another type: continue with the --lr_scheduler_type that saved it"
            )
        # torch expects a function for each saved group, and fails if there are fewer groups now.
        functions = state["lr_lambdas"][: len(lr_scheduler.lr_lambdas)]
        LambdaLR.load_state_dict(lr_scheduler, {**state, "lr_lambdas": functions})

    lr_scheduler.load_state_dict = load_state_dict
    try:
        yield
    finally:
        del lr_scheduler.load_state_dict


def follow(optimizer: CWDOptimizer, lr_scheduler: Any, step: int) -> None:
    """Moves a schedule to a step, with the learning rates of the present groups instead of the saved ones.

    Raises:
        ValueError: the schedule is not a LambdaLR, and so not a function of the step.
    """
    schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # inside Accelerate's
    if not isinstance(schedule, LambdaLR):
        raise ValueError(
            f"--optim_args {RESET} cannot continue a {type(schedule).__name__}, which is not a function of the step: "
            "choose another --lr_scheduler_type, or begin a new run from the checkpoint's weights"
        )
    if schedule.last_epoch == 0:  # the checkpoint had no schedule
        schedule.last_epoch, schedule._step_count = step, step + 1
    schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
