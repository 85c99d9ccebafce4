"""A default callback that adds statistics of the weight decay to the logs of any Trainer."""

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
from hf_cwd.trainer.optim_args import asked_for
from hf_cwd.trainer.wrappers import innermost

ADVICE = (
    "resume from the last checkpoint before that, with a lower learning rate, a longer warm-up, or gradient clipping "
    "(--max_grad_norm)"
)
KEYS = ("decayed_fraction", "effective_decay", "update_to_weight", "update_rms", "weight_rms")  # properties of Totals


class DiagnosticsCallback(TrainerCallback):
    """Adds ``cwd/*`` to the Trainer's logs and ``trainer_state.json``: statistics of the last step before each log.

    It is in every Trainer, before the reporting integrations, so that TensorBoard, W&B and others show these values.
    The keys are those of :class:`hf_cwd.optim.statistics.Totals` over all parameters. If a rule orthogonalises, there
    is also ``cwd/orthogonality_error`` of one matrix, a different one each time. ``--optim_args cwd_log=groups`` adds
    the keys for each rule and each parameter group; ``cwd_log=off`` disables all of them.

    The kernels sum the statistics while they update the weights, only on steps that will be logged: every
    ``--logging_steps``, the first step, and the last step of each epoch. A log at any other step has the values of the
    last such step, and its number as ``cwd/step``. If weights are sharded, every rank must have the callback.

    Raises:
        RuntimeError: weights or updates are not finite. All ranks raise it, and each names its own parameters. There is
            one warning instead if ``logging_nan_inf_filter=False`` asks for such numbers. With ``cwd_log=off`` there is
            one warning too, by the Trainer's loss and gradient norm.
    """

    def __init__(self) -> None:
        self._optimizer: CWDOptimizer | None = None  # while it collects statistics
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
            optimizer.statistics = StepStatistics(state.global_step)  # a resumed run chooses the same matrix
            self._optimizer = optimizer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self._optimizer is None:
            return
        if self._optimizer.statistics.has_numbers:  # a loss scaler may have skipped the step
            # Ranks communicate here, because all of them call this. A log may be made by one rank alone.
            statistics = self._optimizer.statistics.read()
            self._last = (state.global_step, dict(_named(statistics, self._optimizer, args)))
            if not statistics.total.is_finite:
                self._tell(_not_finite(statistics, state.global_step, model), args)
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
        state.log_history[-1].update(numbers)  # the Trainer copied the logs before it called the callbacks

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._release()

    def _tell(self, text: str, args: TrainingArguments) -> None:
        """Ends the run; only warns, once, if the arguments allow such numbers or turn the statistics off."""
        allowed = getattr(args, "cwd_not_finite", "stop") == "ignore" or not args.logging_nan_inf_filter
        if not (allowed or log_level(args) == "off"):
            raise RuntimeError(text)
        if not self._has_warned:
            self._has_warned = True
            logger().warning(text)

    def _release(self) -> None:
        if self._optimizer is not None:
            self._optimizer.statistics = self._optimizer = None


def log_level(args: TrainingArguments) -> str:
    """The value of ``cwd_log`` in ``--optim_args``, by default ``"summary"``."""
    return asked_for(args, "cwd_log") or "summary"


def _will_log(args: TrainingArguments, state: TrainerState, train_dataloader: Any) -> bool:
    """Whether the Trainer will log after this step; predicts what its DefaultFlowCallback decides afterwards."""
    step = state.global_step + 1
    if args.logging_first_step and step == 1:
        return True
    if args.logging_strategy == IntervalStrategy.NO:
        return False
    try:
        batches = len(train_dataloader)
    except TypeError:  # a stream has no length
        batches = 0
    if args.logging_strategy == IntervalStrategy.STEPS or not batches:
        return step % max(1, int(state.logging_steps)) == 0
    return step % math.ceil(batches / args.gradient_accumulation_steps) == 0 or step == state.max_steps


def _named(statistics: Statistics, optimizer: CWDOptimizer, args: TrainingArguments) -> Iterator[tuple[str, float]]:
    yield from _figures("cwd", statistics.total)
    if statistics.orthogonality_error is not None:
        yield "cwd/orthogonality_error", statistics.orthogonality_error
    if log_level(args) != "groups":
        return
    rules = [group["algorithm"] for group in optimizer.param_groups]
    for rule in dict.fromkeys(rules):
        some = [totals for totals, name in zip(statistics.groups, rules, strict=True) if name == rule]
        yield from _figures(f"cwd/{rule}", sum(some, Totals()))
    for number, totals in enumerate(statistics.groups):
        yield from _figures(f"cwd/group_{number}", totals)


def _figures(prefix: str, totals: Totals) -> Iterator[tuple[str, float]]:
    """The values that are defined: without a weight decay there is no decayed fraction."""
    for key in KEYS:
        if not math.isnan(value := getattr(totals, key)):
            yield f"{prefix}/{key}", value


def _not_finite(statistics: Statistics, step: int, model: torch.nn.Module) -> str:
    named = {p: name for name, p in model.named_parameters()}  # DeepSpeed's flat tensors have texts of their own
    names = [named.get(p, text) for p, text in statistics.not_finite.items()] or ["parameters of another rank"]
    what = f"weights, updates or optimizer states of {listed(names)} are not finite"
    return f"step {step}: {what}, and stay so in later steps: {ADVICE}"


def _logged_not_finite(logs: dict[str, float], step: int, args: TrainingArguments) -> str | None:
    """The warning about the Trainer's own numbers, if any. Under fp16 the loss scaler makes the norm infinite."""
    keys = ("loss",) if args.fp16 else ("loss", "grad_norm")
    bad = " and ".join(f"{key} {float(logs[key])}" for key in keys if key in logs and not math.isfinite(logs[key]))
    if not bad:
        return None
    return f"step {step}: the log has {bad}. Weights and states that it has reached stay not finite: {ADVICE}"
