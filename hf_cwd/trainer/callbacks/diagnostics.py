"""What the weight decay does, in every log of any Trainer that trains with an optimizer of this package."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_cwd.log import logger
from hf_cwd.optim.optimizer import CWDOptimizer
from hf_cwd.optim.original_params import listed
from hf_cwd.optim.statistics import Statistics, StepStatistics, Totals
from hf_cwd.trainer.checks import innermost
from hf_cwd.trainer.handler import asked_for

GO_ON = (
    "go on from the last checkpoint before it, with a lower learning rate, more warm-up, or gradient clipping "
    "(--max_grad_norm)"
)
KEYS = ("decayed_fraction", "effective_decay", "update_to_weight", "update_rms", "weight_rms")  # of Totals


class DiagnosticsCallback(TrainerCallback):
    """Adds ``cwd/*`` to the Trainer's logs and ``trainer_state.json``, of the one optimizer step before each log.

    It is in every Trainer, before the integrations that report: TensorBoard, W&B and the others show what it adds. The
    keys are those of :class:`hf_cwd.optim.statistics.Totals` over all parameters, and ``cwd/orthogonality_error`` of
    one matrix, another one each time, where a rule orthogonalises. ``--optim_args cwd_log=groups`` adds them for each
    rule and each parameter group, ``cwd_log=off`` leaves all of them out.

    Kernels sum up while they update the weights, on the steps only that are going to be logged: every
    ``--logging_steps``, the first, the last of each epoch. A log that nobody could foresee has the last such step's
    numbers, and its number as ``cwd/step``. Where weights are sharded every rank must have the callback.

    Raises:
        RuntimeError: weights or updates are not finite. All ranks raise it; each names its own. Who asks to see such
            numbers (``logging_nan_inf_filter=False``) or none of ours (``cwd_log=off``, which goes by the Trainer's
            loss and gradient norm) is warned once instead.
    """

    def __init__(self) -> None:
        self._optimizer: CWDOptimizer | None = None  # that collects at present
        self._last: tuple[int, dict[str, float]] | None = None
        self._has_warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._release()
        self._last, self._has_warned = None, False

    def on_step_begin(  # under DeepSpeed the optimizer steps before on_pre_optimizer_step
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        optimizer = innermost(optimizer)
        if not isinstance(optimizer, CWDOptimizer) or not _will_log(args, state, train_dataloader):
            return
        if log_level(args) != "off":
            optimizer.statistics = StepStatistics(state.global_step)  # a run that is resumed looks at the same matrix
            self._optimizer = optimizer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self._optimizer is None:
            return
        if self._optimizer.statistics.has_numbers:  # a loss scaler may have left the step out
            # Ranks add up here, where all of them come by: a log may be made by one of them alone.
            found = self._optimizer.statistics.read()
            self._last = (state.global_step, dict(_named(found, self._optimizer, args)))
            if not found.total.is_finite:
                self._tell(_not_finite(found, state.global_step, model), args)
        self._release()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        if log_level(args) == "off" and (text := _logged_not_finite(logs, state.global_step, args)):
            self._tell(text, args)
        if self._last is None:
            return
        step, numbers = self._last
        numbers = numbers if step == state.global_step else numbers | {"cwd/step": step}
        logs.update(numbers)
        state.log_history[-1].update(numbers)  # it was made before callbacks are asked

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._release()

    def _tell(self, text: str, args: TrainingArguments) -> None:
        """Ends the run, or warns once where somebody has asked to see such numbers, or for none of ours."""
        asked = getattr(args, "cwd_not_finite", "stop") == "ignore" or not args.logging_nan_inf_filter
        if not (asked or log_level(args) == "off"):
            raise RuntimeError(text)
        if not self._has_warned:
            self._has_warned = True
            logger().warning(text)

    def _release(self) -> None:
        if self._optimizer is not None:
            self._optimizer.statistics = self._optimizer = None


def log_level(args: TrainingArguments) -> str:
    """``cwd_log`` of ``--optim_args``."""
    return asked_for(args, "cwd_log") or "summary"


def _will_log(args: TrainingArguments, state: TrainerState, train_dataloader: Any) -> bool:
    """Whether the Trainer will log after this step, which it decides after it: see its DefaultFlowCallback."""
    step = state.global_step + 1
    if args.logging_first_step and step == 1:
        return True
    if args.logging_strategy == IntervalStrategy.NO:
        return False
    try:
        batches = len(train_dataloader)
    except TypeError:  # a stream: its end is not foreseen
        batches = 0
    if args.logging_strategy == IntervalStrategy.STEPS or not batches:
        return step % max(1, int(state.logging_steps)) == 0
    return step % math.ceil(batches / args.gradient_accumulation_steps) == 0 or step == state.max_steps


def _named(found: Statistics, optimizer: CWDOptimizer, args: TrainingArguments) -> Iterator[tuple[str, float]]:
    yield from _figures("cwd", found.total)
    if found.orthogonality_error is not None:
        yield "cwd/orthogonality_error", found.orthogonality_error
    if log_level(args) != "groups":
        return
    rules = [group["algorithm"] for group in optimizer.param_groups]
    for rule in dict.fromkeys(rules):
        some = [totals for totals, name in zip(found.groups, rules, strict=True) if name == rule]
        yield from _figures(f"cwd/{rule}", sum(some, Totals()))
    for number, totals in enumerate(found.groups):
        yield from _figures(f"cwd/group_{number}", totals)


def _figures(prefix: str, totals: Totals) -> Iterator[tuple[str, float]]:
    """Those that mean something: not the decayed fraction of what has no weight decay."""
    for key in KEYS:
        if not math.isnan(value := getattr(totals, key)):
            yield f"{prefix}/{key}", value


def _not_finite(found: Statistics, step: int, model: torch.nn.Module) -> str:
    named = {p: name for name, p in model.named_parameters()}  # not of what DeepSpeed flattened: that has its own
    names = [named.get(p, text) for p, text in found.not_finite.items()] or ["parameters of another rank"]
    what = f"not finite: weights, updates or optimizer states of {listed(names)}"
    return f"step {step}: {what}. What is so stays so: {GO_ON}"


def _logged_not_finite(logs: dict[str, float], step: int, args: TrainingArguments) -> str | None:
    """By the Trainer's own numbers. Under fp16 a norm is infinite wherever the loss scaler finds its scale."""
    keys = ("loss",) if args.fp16 else ("loss", "grad_norm")
    bad = " and ".join(f"{key} {float(logs[key])}" for key in keys if key in logs and not math.isfinite(logs[key]))
    return f"step {step}: the log has {bad}. Weights and states that it has reached stay so: {GO_ON}" if bad else None
