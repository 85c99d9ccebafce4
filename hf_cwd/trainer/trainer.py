"""A Trainer that trains with an optimizer of this package or not at all, and that writes verifiable checkpoints."""

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hf_cwd.optim.optimizer import CWDOptimizer
from hf_cwd.trainer import model_card
from hf_cwd.trainer.callbacks.checkpoint import CheckpointCallback
from hf_cwd.trainer.gradient_guard import GradientGuard
from hf_cwd.trainer.optim_names import PREFIX, chosen, names
from hf_cwd.trainer.rank_checkpoints import RankCheckpointMixin
from hf_cwd.trainer.saving import SavingMixin
from hf_cwd.trainer.wrappers import innermost


class CWDTrainerMixin(RankCheckpointMixin, SavingMixin):
    """Makes a Trainer, or a subclass such as TRL's, train with cautious weight decay or not at all.

    It must be the first base. It works with any TrainingArguments whose ``optim`` is ``cwd_*``.
    :class:`hf_cwd.CWDArgumentsMixin` makes that the default, and adds the fields named below.

    - Another optimizer is an error when the trainer is made. ``optimizers=(CWDMuon(...), None)`` is accepted if
      ``optim`` is ``"cwd_muon"`` or not a ``cwd_*`` name.
    - If the gradients of a step are not finite, all ranks stop before the step, with an error that names the
      parameters, or all ranks skip it (``cwd_not_finite``). A skipped step leaves weights, states and step counts
      unchanged. It uses up its batch, ``global_step`` and the schedule advance, and logs count it in
      ``cwd/skipped_steps``.
    - A checkpoint gets its name when all of its files are on the disk, with a manifest. A run that is killed during a
      save resumes from the checkpoint before it. ``resume_from_checkpoint=True`` takes the newest intact one, and no
      run resumes from a damaged one (``cwd_verify``).
    - Models that transformers shards at load time (``DistributedConfig``) can be saved and resumed, with the same
      number of ranks and the same configuration.
    - The model card says what trained the model.

    Raises:
        ValueError: the optimizer is not of this package, or ``cwd_not_finite="skip"`` is impossible here.
        RuntimeError: during training, if gradients are not finite.

    Example:
        >>> from hf_cwd import CWDTrainerMixin
        >>> from transformers import Seq2SeqTrainer
        >>> class MyTrainer(CWDTrainerMixin, Seq2SeqTrainer):
        ...     pass
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("args")
        if given is not None:  # before TRL's trainers load a model
            self._check_optimizer(given, kwargs.get("optimizers"), kwargs.get("optimizer_cls_and_kwargs"))
        try:
            super().__init__(*args, **kwargs)
        except TypeError as error:
            if "'cwd_" not in str(error):
                raise
            raise TypeError(
                f"{type(self).__name__} converts a {type(given).__name__} to its own class of arguments, which has no "
                "cwd_* fields: give it arguments of its own class, such as "
                "@dataclass class Arguments(CWDArgumentsMixin, SFTConfig)"
            ) from error
        self._check_optimizer(self.args, (self.optimizer, None), self.optimizer_cls_and_kwargs)
        self.remove_callback(CheckpointCallback)  # SavingMixin does its work

    def _check_optimizer(self, args: Any, optimizers: Any, cls_and_kwargs: Any) -> None:
        trainer = type(self).__name__
        made = None if optimizers is None else innermost(optimizers[0])
        cls = type(made) if made is not None else None if cls_and_kwargs is None else cls_and_kwargs[0]
        if cls is None:
            if chosen(args) not in names():
                raise ValueError(
                    f"{trainer} trains with an optimizer of hf_cwd, and optim is {chosen(args)!r}: give "
                    f"CWDTrainingArguments, or optim='cwd_adamw' (or another of {', '.join(names())})"
                )
        elif not (isinstance(cls, type) and issubclass(cls, CWDOptimizer)):
            raise ValueError(
                f"{trainer} trains with an optimizer of hf_cwd, and was given {getattr(cls, '__name__', cls)} by "
                f"{'optimizers=' if made is not None else 'optimizer_cls_and_kwargs='}: give a CWDAdamW, CWDLion, "
                "CWDMuon or CWDSGD, or leave it out and name one by optim='cwd_adamw'"
            )
        elif made is not None and chosen(args) in names():
            name = PREFIX + made.defaults["algorithm"]
            if chosen(args) != name:
                raise ValueError(
                    f"{trainer} was given {cls.__name__} by optimizers=, and optim is {chosen(args)!r}: give "
                    f"optim={name!r}, or leave one of them out"
                )

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self._cwd_guard = GradientGuard(self)
        self._cwd_guard.install(self.accelerator)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._cwd_guard.saw(loss)
        return loss

    def _mixed_mesh_grad_norm(self, model: torch.nn.Module, max_norm: float) -> Tensor:
        """Newer versions of the Trainer call this instead of ``clip_grad_norm_`` for gradients on several meshes."""
        if self._cwd_guard.is_on:
            return self._cwd_guard.clip(model.parameters(), max_norm)
        return super()._mixed_mesh_grad_norm(model, max_norm)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._cwd_guard.skipped:
            logs["cwd/skipped_steps"] = self._cwd_guard.skipped
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            model_card.complete(self)


class CWDTrainer(CWDTrainerMixin, Trainer):
    """The Trainer with :class:`CWDTrainerMixin`.

    Example:
        >>> from hf_cwd import CWDTrainer, CWDTrainingArguments
        >>> def train(model, rows):
        ...     args = CWDTrainingArguments("runs/mine", learning_rate=1e-3, weight_decay=0.1, cwd_not_finite="skip")
        ...     CWDTrainer(model=model, args=args, train_dataset=rows).train()
    """
