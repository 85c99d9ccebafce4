"""TrainingArguments with an optimizer of this package by default, and the options of :class:`CWDTrainer`."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_cwd.trainer.optim_args import as_text, asked_for
from hf_cwd.trainer.optim_names import PREFIX, chosen

LOGS, NOT_FINITE, VERIFY = ("summary", "groups", "off"), ("stop", "skip", "ignore"), ("full", "fast", "off")


@dataclass(init=False)  # a subclass without @dataclass gets its other base's __init__, and __post_init__ refuses it
class CWDArgumentsMixin:
    """Adds ``cwd_*`` fields to a class of training arguments, and makes ``cwd_adamw`` the default of ``--optim``.

    It works with TrainingArguments, Seq2SeqTrainingArguments and TRL's configs. It must be the first base, and the
    class must be a dataclass.

    Attributes:
        cwd_log: which statistics of the weight decay the Trainer logs: ``"summary"``, ``"groups"`` or ``"off"``. None
            means the value of ``cwd_log`` in ``--optim_args``, or ``"summary"``. It applies to any Trainer.
        cwd_not_finite: what :class:`hf_cwd.CWDTrainer` does if the gradients of a step are not finite: ``"stop"``
            (raise an error before the step), ``"skip"`` (leave weights and states as they are; an error after 20 times
            in a row) or ``"ignore"``. Other Trainers do not check.
        cwd_verify: how a checkpoint is compared with its manifest before a run resumes from it: ``"full"`` (checksums
            of all files), ``"fast"`` (sizes, and the headers of safetensors) or ``"off"``. None means the value of
            ``cwd_verify`` in ``--optim_args``, or ``"full"``.

    Raises:
        ValueError: an invalid value, a value that contradicts ``--optim_args``, or ``cwd_log`` for an optimizer that is
            not of this package.
        TypeError: the class is not a dataclass, or CWDArgumentsMixin is not its first base.

    Example:
        >>> from dataclasses import dataclass
        >>> from transformers import Seq2SeqTrainingArguments
        >>> from hf_cwd import CWDArgumentsMixin
        >>> @dataclass
        ... class Arguments(CWDArgumentsMixin, Seq2SeqTrainingArguments):
        ...     pass
        >>> Arguments(use_cpu=True, weight_decay=0.1).optim.value
        'cwd_adamw'
    """

    optim: OptimizerNames | str = field(
        default=f"{PREFIX}adamw", metadata={"help": "The optimizer: cwd_adamw, cwd_lion, cwd_muon, cwd_sgd or another."}
    )
    cwd_log: str | None = field(
        default=None,
        metadata={
            "help": "Which statistics of the weight decay are logged. Default: cwd_log in --optim_args, or summary.",
            "choices": LOGS,
        },
    )
    cwd_not_finite: str = field(
        default="stop",
        metadata={
            "help": "What CWDTrainer does if the gradients of a step are not finite: stop the run, skip the step, or "
            "ignore it.",
            "choices": NOT_FINITE,
        },
    )
    cwd_verify: str | None = field(
        default=None,
        metadata={
            "help": "How a checkpoint is compared with its manifest before a run resumes from it: full (checksums), "
            "fast (sizes and headers) or off. Default: cwd_verify in --optim_args, or full.",
            "choices": VERIFY,
        },
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if TrainingArguments in order and order.index(TrainingArguments) < order.index(CWDArgumentsMixin):
            base = next(b.__name__ for b in cls.__bases__ if issubclass(b, TrainingArguments))
            raise TypeError(
                f"class {cls.__name__}: {base} comes before CWDArgumentsMixin and would override its defaults: write "
                f"class {cls.__name__}(CWDArgumentsMixin, {base})"
            )

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not {"output_dir", "cwd_log"} <= {each.name for each in dataclasses.fields(self)}:
            raise TypeError(
                f"class {name} lacks fields of CWDArgumentsMixin or TrainingArguments: add @dataclass to it, and "
                "derive it from CWDArgumentsMixin and from TrainingArguments or a subclass"
            )
        for key, value, valid in (
            ("cwd_log", self.cwd_log, (None, *LOGS)),
            ("cwd_not_finite", self.cwd_not_finite, NOT_FINITE),
            ("cwd_verify", self.cwd_verify, (None, *VERIFY)),
        ):
            if value not in valid:
                raise ValueError(f"{key}={value!r} does not exist: give one of {', '.join(filter(None, valid))}")
        self.optim_args = as_text(self.optim_args)
        if self.cwd_log is not None:
            self._pass_on_log()
        said = asked_for(self, "cwd_verify")
        if None not in (said, self.cwd_verify) and said != self.cwd_verify:
            raise ValueError(
                f"cwd_verify={self.cwd_verify!r} contradicts cwd_verify={said} in --optim_args: give one of them"
            )
        super().__post_init__()

    def _pass_on_log(self) -> None:
        """Writes ``cwd_log`` into ``optim_args``, where the callback of any Trainer reads it."""
        if not chosen(self).startswith(PREFIX):
            raise ValueError(
                f"cwd_log={self.cwd_log!r} has no effect with optim={chosen(self)!r}, which is not an optimizer of "
                "hf_cwd: leave it out"
            )
        parts = self.optim_args.replace(" ", "").split(",") if self.optim_args else []
        said = [part.partition("=")[2] for part in parts if part.partition("=")[0] == "cwd_log"]
        if not said:
            self.optim_args = ",".join([*parts, f"cwd_log={self.cwd_log}"])
        elif said != [self.cwd_log]:
            raise ValueError(
                f"cwd_log={self.cwd_log!r} contradicts cwd_log={said[0]} in --optim_args: give one of them"
            )


@dataclass
class CWDTrainingArguments(CWDArgumentsMixin, TrainingArguments):
    """TrainingArguments with the fields of :class:`CWDArgumentsMixin`, and ``cwd_adamw`` as optimizer.

    Example:
        >>> from hf_cwd import CWDTrainingArguments
        >>> args = CWDTrainingArguments(use_cpu=True, weight_decay=0.1, cwd_not_finite="skip")
        >>> args.optim.value, args.cwd_not_finite
        ('cwd_adamw', 'skip')
    """
