"""How a resumed run gets optimizer and schedule back, also where the states are of another rule and it begins anew."""

import contextlib
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from hf_cwd.optim.optimizer import CWDOptimizer
from hf_cwd.optim.state_dict import RESET

SCHEDULE = "scheduler.pt"  # as transformers.trainer, which imports this, names it


def load_states(optimizer: CWDOptimizer, lr_scheduler: Any, checkpoint: str, load: Callable[[str], None]) -> None:
    """Has the Trainer load what a checkpoint has of optimizer and schedule.

    Args:
        load: the Trainer's own, from the checkpoint.

    Raises:
        pickle.UnpicklingError: torch does not load such states from a file, and the run is not to begin with new ones.
    """
    with of_any_groups(lr_scheduler):
        try:
            load(checkpoint)
        except pickle.UnpicklingError as error:  # GaLore's and APOLLO's hold objects of their own
            what = f"torch does not load the optimizer's state in {checkpoint} from a file"
            if optimizer.on_rule_change != "reset":
                error.add_note(
                    f"[hf_cwd] {what}: continue with the optimizer that saved it, or begin with new states by "
                    f"--optim_args {RESET} (weights, step number and schedule go on)"
                )
                raise
            optimizer.reset_because = what
            lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULE), weights_only=True))


@contextlib.contextmanager
def of_any_groups(lr_scheduler: Any) -> Iterator[None]:
    """Within it a schedule is loaded whatever number of parameter groups it was saved with, see :func:`follow`."""
    if not isinstance(lr_scheduler, LambdaLR):
        yield
        return

    def load_state_dict(state: dict[str, Any]) -> None:
        if "lr_lambdas" not in state:
            raise ValueError(
                "the checkpoint's schedule is of another kind: continue with the --lr_scheduler_type that saved it"
            )
        # torch takes a function for each saved group, and fails where there are fewer now.
        functions = state["lr_lambdas"][: len(lr_scheduler.lr_lambdas)]
        LambdaLR.load_state_dict(lr_scheduler, {**state, "lr_lambdas": functions})

    lr_scheduler.load_state_dict = load_state_dict
    try:
        yield
    finally:
        del lr_scheduler.load_state_dict


def follow(optimizer: CWDOptimizer, lr_scheduler: Any, step: int) -> None:
    """Sets a schedule on a step: it was loaded with the learning rates of the saved groups, or not at all.

    Raises:
        ValueError: it is none of transformers' that are functions of the step, which are all LambdaLR.
    """
    schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # inside Accelerate's
    if not isinstance(schedule, LambdaLR):
        raise ValueError(
            f"--optim_args {RESET} cannot carry on a {type(schedule).__name__}, which is no function of the step: "
            "choose another --lr_scheduler_type, or begin a new run from the checkpoint's weights"
        )
    if schedule.last_epoch == 0:  # the checkpoint had none
        schedule.last_epoch, schedule._step_count = step, step + 1
    schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
