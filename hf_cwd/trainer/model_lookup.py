"""Finds a Trainer's model by its TrainingArguments, for callers that ask for an optimizer without giving the model."""

import gc
import weakref
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_seen: list[tuple[weakref.ref[TrainingArguments], weakref.ref[nn.Module]]] = []  # one pair for each live Trainer


class ModelCallback(TrainerCallback):
    """Keeps a weak reference to the model of every Trainer."""

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        _seen[:] = [pair for pair in _seen if all(ref() is not None for ref in pair)]
        _seen.append((weakref.ref(args), weakref.ref(model)))


def model_of(args: TrainingArguments, name: str) -> nn.Module:
    """The model of the Trainer that has this very ``args`` object.

    Args:
        name: the value of ``--optim``, for the message.

    Raises:
        ValueError: there is no such Trainer, or several with different models.
    """
    if len(_models(args)) > 1:
        gc.collect()  # a deleted Trainer and its model can be part of a reference cycle
    models = _models(args)
    if len(models) == 1:
        return models[0]
    reason = "no Trainer with these TrainingArguments has been made yet"
    if models:
        reason = f"{len(models)} Trainers with these TrainingArguments have a model each"
    raise ValueError(
        f"{name} sorts the parameters of a model, and {reason}: write Trainer.get_optimizer_cls_and_kwargs(args, model)"
    )


def _models(args: TrainingArguments) -> list[nn.Module]:
    models = [model() for of_trainer, model in _seen if of_trainer() is args]
    return list({id(model): model for model in models if model is not None}.values())
