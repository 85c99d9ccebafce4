"""What the training scripts do alike: logging, a run from its checkpoint to its results, and the metric."""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import evaluate
import transformers
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import enable_full_determinism, set_seed

METRIC = Path(__file__).parent / "metrics/token_accuracy.py"


def set_up_logging(training: TrainingArguments) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    level = training.get_process_log_level()
    transformers.utils.logging.set_verbosity(level)
    datasets.utils.logging.set_verbosity(level)
    if training.disable_tqdm or not training.should_log:
        datasets.disable_progress_bars()


def seed(training: TrainingArguments) -> None:
    """To be called before the model is made: the Trainer seeds again, which is too late for the initial weights."""
    (enable_full_determinism if training.full_determinism else set_seed)(training.seed)


def load_accuracy(training: TrainingArguments) -> evaluate.EvaluationModule:
    with training.main_process_first(desc="load the metric"):
        # Every rank has all predictions and computes alone; in memory there is no file that two ranks could lock.
        return evaluate.load(str(METRIC), keep_in_memory=True, experiment_id=f"rank-{training.process_index}")


def count(model: nn.Module, *, trainable: bool = False) -> int:
    """The model's parameters, or those that are trained; ds_numel is what they are under ZeRO-3."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad or not trainable)


@contextlib.contextmanager
def own_names(model: nn.Module) -> Iterator[None]:
    """Checkpoints hold the model's weights by the names that they have in it, as the Trainer reads them on a resume.

    By default transformers saves those of several architectures (Mixtral, Qwen-MoE, GPT-NeoX, ViT and others) under
    older names, and the Trainer does not translate them back: it would go on with other weights, and only a warning
    (huggingface/transformers#43701). An adapter of PEFT has no such names.
    """
    if not isinstance(model, PreTrainedModel):
        yield
        return
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained


def run(
    trainer: Trainer,
    checkpoint: str | None,
    more: Callable[[dict[str, float]], dict[str, float]],
    *,
    of_language: bool = True,
) -> dict:
    """Trains, saves the model, evaluates, and writes and returns the metrics.

    Args:
        checkpoint: directory to resume from.
        more: gets the metrics of training and gives those to add to them.
        of_language: the loss is one of tokens, and its exponential the perplexity.
    """
    with own_names(trainer.model):
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics |= more(metrics)
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)

    evaluation = trainer.evaluate()
    if of_language:
        loss = evaluation["eval_loss"]
        evaluation["perplexity"] = math.exp(loss) if loss < 700 else math.inf  # e^710 overflows
    trainer.log_metrics("eval", evaluation)
    trainer.save_metrics("eval", evaluation)
    trainer.save_state()
    return metrics | evaluation
