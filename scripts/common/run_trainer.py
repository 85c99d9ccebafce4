"""What the training scripts do alike: logging, a Trainer, a run from its checkpoint to its results, and the metric."""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import evaluate
import transformers
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import enable_full_determinism, set_seed

from common.usage import UsageError, in_words, told, writing
from hf_cwd import CWDTrainerMixin
from hf_cwd.checkpoint.storage import Storage
from hf_cwd.trainer.optim_names import chosen, names
from hf_cwd.trainer.resuming import chosen_checkpoint

# Parts of hf_cwd whose errors are about what the caller gave.
OURS = ("hf_cwd.trainer.", "hf_cwd.routing.", "hf_cwd.checkpoint.")
METRIC = Path(__file__).parents[1] / "metrics/token_accuracy.py"


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


class Explained:
    """Makes a Trainer say in one line which flag was wrong, where a library finds it out late."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with told(f"--optim {chosen(self.args)}"):
            return super().create_optimizer(*args, **kwargs)

    def _load_from_checkpoint(self, checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with told(f"{checkpoint} has other weights than this model", "Give the model that it was saved with"):
            super()._load_from_checkpoint(checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with told(f"{checkpoint} has states that --optim {chosen(self.args)} cannot go on from"):
            super()._load_optimizer_and_scheduler(checkpoint)


def trainer_class(base: type[Trainer], training: TrainingArguments) -> type[Trainer]:
    """`base` with what CWDTrainer adds to it, where the optimizer is one of hf_cwd."""
    mixins = (Explained, CWDTrainerMixin) if chosen(training) in names() else (Explained,)
    return type(base.__name__, (*mixins, base), {})


def check_metric(training: TrainingArguments, *metrics: str) -> None:
    """Refuses a --metric_for_best_model that no evaluation will have; the Trainer finds out at the first one."""
    wanted = training.metric_for_best_model
    known = (*metrics, "runtime", "samples_per_second", "steps_per_second")
    if wanted is not None and wanted.removeprefix("eval_") not in known:
        raise UsageError(f"--metric_for_best_model {wanted}: give one of {', '.join(known)}")


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What hf_cwd refuses in the block is in words for the caller already, and becomes a UsageError as it is."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        trace = error.__traceback__
        while trace.tb_next is not None:
            trace = trace.tb_next
        raised_in = trace.tb_frame.f_globals["__name__"]
        if isinstance(error, UsageError) or not raised_in.startswith(OURS):
            raise
        raise UsageError(in_words(error)) from error


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
    checkpoint: str | bool | None,
    more: Callable[[dict[str, float]], dict[str, float]],
    *,
    of_language: bool = True,
) -> dict:
    """Trains, saves the model, evaluates, and writes and returns the metrics.

    Args:
        checkpoint: directory to resume from; True for the newest in the output directory that is whole.
        more: gets the metrics of training and gives those to add to them.
        of_language: the loss is one of tokens, and its exponential the perplexity.

    Raises:
        UsageError: see :func:`chosen_checkpoint`, :func:`refusals` and :func:`writing`.
    """
    with writing(trainer.args.output_dir), refusals():
        if checkpoint is not None and not isinstance(trainer, CWDTrainerMixin):  # which looks at it by itself
            storage = Storage(trainer.args.output_dir, is_probed=False)
            checkpoint = chosen_checkpoint(storage, checkpoint, mode=trainer.args.cwd_verify)
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
