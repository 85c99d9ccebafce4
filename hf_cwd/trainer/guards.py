"""What fails silently elsewhere fails here, under any Trainer: a callback that the Trainer is given by default."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_cwd.optimizer import CWDOptimizer
from hf_cwd.trainer.naming import chosen, names


class OptimizerGuard(TrainerCallback):
    """Ends a run, before its first step, whose optimizer is not the one that ``--optim cwd_*`` asked for.

    Inert with any other ``--optim``.

    Raises:
        RuntimeError: something else trains, such as what Accelerate puts in the place of an optimizer under offload.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if chosen(args) not in names():
            return
        found = innermost(optimizer)
        if not isinstance(found, CWDOptimizer):
            raise RuntimeError(
                f"--optim {chosen(args)} was asked for, and {type(found).__name__} is about to train. Either it was "
                "given to the Trainer as optimizers=, beside which --optim has no effect: leave one of them out. Or a "
                "library has put it in the optimizer's place, as Accelerate does under DeepSpeed's CPU offload unless "
                'its configuration says "zero_force_ds_cpu_optimizer": false'
            )


def innermost(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of Accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
