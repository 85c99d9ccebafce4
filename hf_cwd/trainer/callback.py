"""What the decay did, beside the loss: a callback for any Trainer."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_cwd.decay import DecayCount
from hf_cwd.optimizer import CWDOptimizer
from hf_cwd.sharding.agree import total
from hf_cwd.trainer.guards import innermost


class DecayedFractionCallback(TrainerCallback):
    """Adds ``cwd/decayed_fraction`` to ``trainer.state.log_history``.

    That is the paper's mask ratio: decayed elements over the elements of the groups with a weight decay, on the one
    optimizer step before a log, counted in the pass that updates the weights, and on all ranks where parameters are
    sharded: every rank must have the callback then. Other steps count nothing. Does nothing when the optimizer is not
    one of this package, or where the Trainer logs by epoch.
    """

    def __init__(self) -> None:
        self._optimizer: CWDOptimizer | None = None

    def on_step_begin(  # under DeepSpeed the optimizer steps before on_pre_optimizer_step
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        optimizer = innermost(optimizer)
        # The Trainer decides about logging after the step: say beforehand what it will decide.
        step, by_steps = state.global_step + 1, args.logging_strategy == IntervalStrategy.STEPS
        will_log = (by_steps and step % state.logging_steps == 0) or (args.logging_first_step and step == 1)
        if will_log and isinstance(optimizer, CWDOptimizer):
            optimizer.decay_count = DecayCount()
            self._optimizer = optimizer

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._optimizer is None or "loss" not in state.log_history[-1]:
            return
        count = self._optimizer.decay_count
        if self._optimizer.counts_parts:
            count = DecayCount(*total([int(count.decayed), count.total], args.device))
        fraction = count.fraction
        self._optimizer.decay_count = self._optimizer = None
        if fraction is not None:
            state.log_history[-1]["cwd/decayed_fraction"] = fraction
