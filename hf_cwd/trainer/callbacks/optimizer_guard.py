"""A default callback that looks at each step of any Trainer: does the optimizer that was asked for still train?

:mod:`hf_cwd.trainer.start_checks` has the checks before the first step, :mod:`hf_cwd.trainer.gradient_guard` looks at
the gradients of each step.
"""

from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_cwd.log import warn_once
from hf_cwd.optim.optimizer import CWDOptimizer
from hf_cwd.trainer import start_checks
from hf_cwd.trainer.wrappers import innermost

UNSTEPPED = 10  # after this many Trainer steps in a row without an optimizer step the run ends
SKIPPED = 50  # after this many steps in a row that a loss scaler skips there is a warning; 16 bring its scale to 1
SAME_FRACTION = 10  # after this many logs in a row with a decayed fraction of exactly 0, or 1, there is a warning


class OptimizerGuard(TrainerCallback):
    """Ends a run in which the optimizer of ``--optim cwd_*`` does not train, and warns of suspicious ones.

    It does nothing with any other ``--optim``, unless an optimizer of this package was given as ``optimizers=``. Before
    the first step it runs :mod:`hf_cwd.trainer.start_checks`. After that it costs two calls a step: a hook counts the
    steps of the optimizer, and no tensor is read.

    Raises:
        RuntimeError: another optimizer trains, such as the one that Accelerate substitutes under offload; or the
            optimizer has none of the model's parameters, or its step is never called.
        ValueError: a parameter group turns on the mask of another package.
    """

    def __init__(self) -> None:
        self._optimizer: CWDOptimizer | None = None
        self._hook: RemovableHandle | None = None
        self._forget()

    def _forget(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._optimizer = self._hook = None
        self._stepped, self._ever_stepped, self._unstepped, self._skipped = False, False, 0, 0
        self._fraction: float | None = None
        self._same_fraction = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        # A run that failed had no on_train_end; auto_find_batch_size starts again with the same optimizer.
        self._forget()
        inner = start_checks.check_optimizer(args, optimizer)
        if inner is None:
            return
        start_checks.check_parameters(args, inner, model)
        start_checks.mark_replicated(optimizer, inner, model)
        start_checks.check_schedule(args, inner, lr_scheduler)
        start_checks.warn_of_zeros(args, inner)
        if state.global_step > 0:
            start_checks.check_resumed(args, inner, lr_scheduler, state.global_step)
        self._optimizer = inner
        self._hook = inner.register_step_post_hook(self._on_optimizer_step)

    def _on_optimizer_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._stepped = self._ever_stepped = True

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._optimizer is None:
            return
        inner = innermost(optimizer)
        if inner is not self._optimizer:
            raise RuntimeError(
                f"{type(self._optimizer).__name__} began this run, and at step {state.global_step} "
                f"{_other(inner, self._optimizer)} is in its place. Replace an optimizer before train(), not during it"
            )
        if self._stepped:
            self._stepped, self._unstepped, self._skipped = False, 0, 0
        elif getattr(optimizer, "step_was_skipped", False):
            self._skipped += 1
            if self._skipped == SKIPPED and args.should_log:
                warn_once(
                    f"the loss scaler has skipped {SKIPPED} steps in a row, since gradients are inf or NaN: "
                    f"{type(inner).__name__} has changed nothing meanwhile. Look at the loss, and prefer --bf16 to "
                    "--fp16"
                )
        else:
            self._unstepped += 1
            if self._unstepped == UNSTEPPED:
                raise self._never_stepped()

    def _never_stepped(self) -> RuntimeError:
        name, steps = type(self._optimizer).__name__, self._unstepped
        return RuntimeError(
            f"{steps} training steps in a row called no step() of {name}, and no loss scaler skipped them: it trains "
            "nothing. Either trainer.optimizer was replaced during train(), or a wrapper or an overridden method of "
            "the Trainer keeps its step from being called"
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        ended_unstepped = self._unstepped > 0 and not self._ever_stepped
        error = self._never_stepped() if ended_unstepped else None
        self._forget()  # the next trial of a hyper-parameter search needs the memory
        if error is not None:
            raise error

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        fraction = (logs or {}).get("cwd/decayed_fraction")
        if self._optimizer is None or fraction is None:
            return
        self._same_fraction = self._same_fraction + 1 if fraction == self._fraction else 1
        self._fraction = fraction
        if self._same_fraction == SAME_FRACTION and fraction in (0, 1) and args.should_log:
            decayed = [group for group in self._optimizer.param_groups if group["weight_decay"] != 0]
            if any(group["cautious"] for group in decayed):
                warn_once(_constant_fraction(int(fraction), type(self._optimizer).__name__))


def _other(optimizer: Any, first: CWDOptimizer) -> str:
    name = type(optimizer).__name__
    return f"another {name}" if type(optimizer) is type(first) else name


def _constant_fraction(fraction: int, name: str) -> str:
    seen = f"cwd/decayed_fraction was exactly {fraction} in {SAME_FRACTION} logs in a row: {name} decayed "
    if fraction == 1:
        return (
            f"{seen}every element, as plain weight decay does. Gradients of exactly 0 do that, which mask=ge counts as "
            "agreement: look at grad_norm, and whether the loss depends on the parameters that are decayed"
        )
    return (
        f"{seen}nothing. Gradients or weights of exactly 0 do that with mask=gt: look at grad_norm, and whether the "
        "loss depends on the parameters that are decayed"
    )
