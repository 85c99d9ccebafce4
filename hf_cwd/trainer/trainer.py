"""A Trainer that trains with an optimizer of this package or not at all, and says so in what it leaves behind."""

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from hf_cwd.optim.optimizer import CWDOptimizer
from hf_cwd.trainer import model_card
from hf_cwd.trainer.callbacks.checkpoint import CheckpointCallback
from hf_cwd.trainer.checks import innermost
from hf_cwd.trainer.non_finite import FiniteGuard
from hf_cwd.trainer.optim_names import PREFIX, chosen, names
from hf_cwd.trainer.saving import SavingMixin
from hf_cwd.trainer.sharded_checkpoints import LoadedSharded


class CWDTrainerMixin(LoadedSharded, SavingMixin):
    """Makes a Trainer, or a class made of it such as TRL's, one that trains with cautious weight decay or not at all.

    It comes first among the bases. Any TrainingArguments do whose ``optim`` is ``cwd_*``;
    :class:`hf_cwd.CWDArgumentsMixin` makes that the default, and has the fields that say what happens here.

    - Another optimizer is an error, when the trainer is made. ``optimizers=(CWDMuon(...), None)`` is taken as it is,
      and ``optim`` then is ``"cwd_muon"`` too, or no ``cwd_*``.
    - A step whose gradients are not finite stops the run on all ranks, before it is made, with an error that names the
      parameters; or it is skipped by all ranks (``cwd_not_finite``): weights, states and step counts stay as they are,
      the batch is used up, ``global_step`` and the schedule go on, and logs have the number as ``cwd/skipped_steps``.
    - A checkpoint gets its name when all of it is on the disk, with a manifest; a run that is killed while it saves
      goes on from the one before it. ``resume_from_checkpoint=True`` takes the newest that is what was saved, and no
      run goes on from one that is not (``cwd_verify``).
    - Models that transformers shards at load time (``DistributedConfig``) can be saved and resumed, on as many ranks
      and with the same configuration.
    - The model card says what trained the model.

    Raises:
        ValueError: the optimizer is another, or ``cwd_not_finite="skip"`` is impossible here.
        RuntimeError: in training, for gradients that are not finite.

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
                f"{type(self).__name__} makes arguments of its own class of a {type(given).__name__}, and that class "
                "has no cwd_* fields: give it arguments of its own class, such as "
                "@dataclass class Arguments(CWDArgumentsMixin, SFTConfig)"
            ) from error
        self._check_optimizer(self.args, (self.optimizer, None), self.optimizer_cls_and_kwargs)
        self.remove_callback(CheckpointCallback)  # for what SavingMixin does itself

    def _check_optimizer(self, args: Any, optimizers: Any, cls_and_kwargs: Any) -> None:
        kind = type(self).__name__
        made = None if optimizers is None else innermost(optimizers[0])
        cls = type(made) if made is not None else None if cls_and_kwargs is None else cls_and_kwargs[0]
        if cls is None:
            if chosen(args) not in names():
                raise ValueError(
                    f"{kind} trains with an optimizer of hf_cwd, and optim is {chosen(args)!r}: give "
                    f"CWDTrainingArguments, or optim='cwd_adamw' (or another of {', '.join(names())})"
                )
        elif not (isinstance(cls, type) and issubclass(cls, CWDOptimizer)):
            raise ValueError(
                f"{kind} trains with an optimizer of hf_cwd, and was given {getattr(cls, '__name__', cls)} by "
                f"{'optimizers=' if made is not None else 'optimizer_cls_and_kwargs='}: give a CWDAdamW, CWDLion, "
                "CWDMuon or CWDSGD, or leave it out and name one by optim='cwd_adamw'"
            )
        elif made is not None and chosen(args) in names():
            name = PREFIX + made.defaults["algorithm"]
            if chosen(args) != name:
                raise ValueError(
                    f"{kind} was given {cls.__name__} by optimizers=, and optim is {chosen(args)!r}: give "
                    f"optim={name!r}, or leave one of them out"
                )

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self._cwd_guard = FiniteGuard(self)
        self._cwd_guard.install(self.accelerator)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._cwd_guard.saw(loss)
        return loss

    def _mixed_mesh_grad_norm(self, model: torch.nn.Module, max_norm: float) -> Tensor:
        """What newer versions of the Trainer call, in place of Accelerate's, for gradients on several meshes."""
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
    """The Trainer with what :class:`CWDTrainerMixin` adds to it.

    Example:
        >>> from hf_cwd import CWDTrainer, CWDTrainingArguments
        >>> def train(model, rows):
        ...     args = CWDTrainingArguments("runs/mine", learning_rate=1e-3, weight_decay=0.1, cwd_not_finite="skip")
        ...     CWDTrainer(model=model, args=args, train_dataset=rows).train()
    """
