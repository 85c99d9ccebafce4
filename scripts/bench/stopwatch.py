"""Times the steps of a Trainer's run, and the optimizer's part of them."""

import time

import torch
from transformers import TrainerCallback

from bench.machine import synchronize
from hf_cwd.trainer.wrappers import innermost


class Stopwatch(TrainerCallback):
    """Measures the steps after the first ``warmup``, up to step ``last``.

    Attributes:
        seconds: of all these steps, once the last one has ended.
        losses: those that the Trainer has logged.
    """

    def __init__(self, device: str, *, warmup: int, last: int) -> None:
        self.seconds = 0.0
        self.losses: list[float] = []
        self._device, self._warmup, self._last = device, warmup, last
        self._marks: list[float | torch.cuda.Event] = []  # before and after each step of the optimizer

    def optimizer_seconds(self) -> float:
        """The optimizer's part of ``seconds``."""
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        if self._device == "cuda":
            return sum(first.elapsed_time(second) for first, second in pairs) / 1e3
        return sum(second - first for first, second in pairs)

    def on_train_begin(self, args, state, control, optimizer=None, **_):
        inner = innermost(optimizer)
        inner.register_step_pre_hook(self._mark)
        inner.register_step_post_hook(self._mark)

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self._warmup:
            synchronize(self._device)
            self._marks.clear()
            self.seconds = time.perf_counter()
        elif state.global_step == self._last:
            synchronize(self._device)
            self.seconds = time.perf_counter() - self.seconds

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))

    def _mark(self, *_) -> None:
        if self._device != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)
