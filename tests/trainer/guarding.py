"""What the tests of the guards share."""

import itertools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.support.tiny import tiny_data, tiny_llama


def make(args: TrainingArguments, kind: type[Trainer] = Trainer, model: nn.Module | None = None, **options: Any) -> Any:
    return kind(model=model or tiny_llama(), args=args, train_dataset=tiny_data(), **options)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this package warned of up to now."""
    return [r.message for r in caplog.records if r.name == "hf_cwd" and r.levelno == logging.WARNING]


class At(TrainerCallback):
    """Calls a function at the end of a step, or of each."""

    def __init__(self, do: Any, step: int | None = None) -> None:
        self.do, self.step = do, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.step in (None, state.global_step):
            self.do()


class HeldTrainer(Trainer):
    """Its optimizer's step is swallowed, by what an overridden method has put around it, but for each ``every``-th."""

    every = 1000

    def create_optimizer(self, model: Any = None) -> Any:
        optimizer = super().create_optimizer(model)
        step, calls = optimizer.step, itertools.count(1)
        optimizer.step = lambda closure=None: None if next(calls) % self.every else step(closure)
        return optimizer
