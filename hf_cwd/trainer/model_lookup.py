"""Which model a Trainer has, for those who ask for its optimizer by its TrainingArguments alone."""

import gc
import weakref
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_seen: list[tuple[weakref.ref[TrainingArguments], weakref.ref[nn.Module]]] = []  # of every Trainer that is still there


class ModelCallback(TrainerCallback):
    """Notes the model of every Trainer that is made, and keeps none alive."""

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
    """The model of the Trainer that has these very arguments.

    Args:
        name: the value of ``--optim``, for the message.

    Raises:
        ValueError: there is none, or Trainers with these arguments have several models.
    """
    if len(_models(args)) > 1:
        gc.collect()  # a Trainer that is gone leaves cycles, and its model in them
    models = _models(args)
    if len(models) == 1:
        return models[0]
    found = f"{len(models)} Trainers with these TrainingArguments have a model each" if models else (
        "no Trainer with these TrainingArguments has been made yet"
    )  # fmt: skip
    raise ValueError(
        f"{name} sorts the parameters of a model, and {found}: write Trainer.get_optimizer_cls_and_kwargs(args, model)"
    )


def _models(args: TrainingArguments) -> list[nn.Module]:
    models = [model() for known, model in _seen if known() is args]
    return list({id(model): model for model in models if model is not None}.values())
