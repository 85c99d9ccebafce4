"""Times the steps of a Trainer's run, and the optimizer's part of them."""

import time
from typing import Any


def stopwatch(device: str, warmup: int, last: int) -> Any:
    """A callback that measures the steps after the first ones: in all, and the optimizer's part of them."""
    import torch
    from bench_machine import synchronize
    from transformers import TrainerCallback

    from hf_cwd.trainer.wrappers import innermost

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.seconds, self.losses, self.marks = 0.0, [], []

        def mark(self) -> None:
            if device == "cuda":
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                self.marks.append(event)
            else:
                self.marks.append(time.perf_counter())

        def on_train_begin(self, args, state, control, optimizer=None, **_):
            inner = innermost(optimizer)
            inner.register_step_pre_hook(lambda *_: self.mark())
            inner.register_step_post_hook(lambda *_: self.mark())

        def on_step_end(self, args, state, control, **_):
            if state.global_step == warmup:
                synchronize(device)
                self.marks.clear()
                self.seconds = time.perf_counter()
            elif state.global_step == last:
                synchronize(device)
                self.seconds = time.perf_counter() - self.seconds

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                self.losses.append(float(logs["loss"]))

        def optimizer_seconds(self) -> float:
            pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
            if device == "cuda":
                return sum(first.elapsed_time(second) for first, second in pairs) / 1e3
            return sum(second - first for first, second in pairs)

    return Stopwatch()
