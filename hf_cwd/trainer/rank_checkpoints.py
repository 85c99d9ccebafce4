"""Checkpoints of models that transformers shards at load time, by a DistributedConfig: each rank keeps its own part.

The Trainer refuses to checkpoint such runs, since it saves rank 0's optimizer for all. The weights that it gathers into
one file serve from_pretrained; it cannot load them back into a sharded model.
"""

import os
import sys
import time
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from hf_cwd.checkpoint import rank_files
from hf_cwd.checkpoint.restore import Part
from hf_cwd.distributed import collectives
from hf_cwd.log import logger
from hf_cwd.trainer.checks import innermost
from hf_cwd.trainer.optimizer_loading import of_any_groups

SIZES = ("dp_replicate_size", "fsdp_size", "tp_size", "pp_size", "ep_size")


class LoadedSharded:
    """What :class:`hf_cwd.CWDTrainerMixin` does at saving and resuming for models sharded at load time.

    Raises:
        RuntimeError: when the trainer is made, if this version of transformers refuses such checkpoints elsewhere than
            those that are known here.
        ValueError: at resuming, on all ranks and before the first step, if a checkpoint is not whole or does not fit.
    """

    _cwd_is_sharded = False
    _cwd_times_spared = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        saves = self.args.save_strategy != "no" and not self.args.save_only_model
        if self._cwd_is_sharded and saves and self._cwd_times_spared != 1:
            raise RuntimeError(
                f"transformers {transformers.__version__} deals with checkpoints of models sharded at load time in a "
                "way that this version of hf_cwd does not know: use another version of one of them, or "
                "save_strategy='no' or save_only_model=True"
            )

    @property
    def is_distributed_loading_by_transformers(self) -> bool:
        """The Trainer's attribute; False where ``Trainer.__init__`` asks in order to refuse checkpoints.

        It asks once more before that, to decide where the model belongs, when there is no ``state`` yet.
        """
        caller = sys._getframe(1)
        in_init = caller.f_code.co_name == "__init__" and caller.f_globals.get("__name__") == "transformers.trainer"
        if self._cwd_is_sharded and in_init and "state" in vars(self):
            self._cwd_times_spared += 1
            return False
        return self._cwd_is_sharded

    @is_distributed_loading_by_transformers.setter
    def is_distributed_loading_by_transformers(self, value: bool) -> None:
        self._cwd_is_sharded = value

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._cwd_is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        os.makedirs(output_dir, exist_ok=True)  # rank 0 may not have come here yet, or be on another node
        rank, world = self.args.process_index, self.args.world_size
        rank_files.save(
            os.path.join(output_dir, rank_files.file_name(rank, world)),
            self._cwd_weights(),
            innermost(self.optimizer),
            rank=rank,
            world=world,
            layout=_layout(self.model),
            global_step=self.state.global_step,
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._cwd_is_sharded:
            self._cwd_load_weights(resume_from_checkpoint)
            return
        if os.path.isdir(resume_from_checkpoint) and rank_files.found(resume_from_checkpoint):
            raise ValueError(
                f"{resume_from_checkpoint} is of a model sharded at load time, and this one is not: its optimizer "
                "states lie in parts of ranks. Load the model with the DistributedConfig that it was saved with, on as "
                "many ranks, or begin a new run from the checkpoint's weights"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._cwd_is_sharded and not self.args.save_only_model:
            self._cwd_load_weights(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._cwd_is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        start = time.perf_counter()
        part, optimizer = self._cwd_open(checkpoint), innermost(self.optimizer)
        self.optimizer.load_state_dict(part.optimizer_state(optimizer))
        with of_any_groups(self.lr_scheduler):
            self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True))
        if optimizer.reset_because is not None:
            return
        taken, saved = sum(map(len, optimizer.state.values())), part.about["states"]
        if taken != saved:
            raise RuntimeError(
                f"{part.path} holds {saved} state tensors, and {type(optimizer).__name__} took {taken}: resume from "
                "another checkpoint"
            )
        self._cwd_say(part, f"{taken} state tensors of {type(optimizer).__name__}", start)

    def _cwd_load_weights(self, checkpoint: str) -> None:
        start = time.perf_counter()
        part = self._cwd_open(checkpoint)
        self._cwd_say(part, f"{part.load_weights()} tensors of {type(self.model).__name__}", start)

    def _cwd_weights(self) -> dict[str, Tensor]:
        """Of an adapter's model only what trains: as for any Trainer, its base is loaded anew by the script."""
        return rank_files.tensors_of(self.model, adapters_only=hasattr(self.model, "peft_config"))

    def _cwd_open(self, checkpoint: str) -> Part:
        """This rank's file, once every rank has found its own to be whole and to fit."""
        rank, world = self.args.process_index, self.args.world_size
        part, problem = None, None
        try:
            part = Part(checkpoint, self._cwd_weights(), rank=rank, world=world, layout=_layout(self.model))
            step = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)).global_step
            if (saved := part.about.get("global_step")) != step:
                raise ValueError(
                    f"{part.path} was saved at step {saved}, and {TRAINER_STATE_NAME} beside it at "
                    f"step {step}: files of two checkpoints are mixed. Resume from another one"
                )
            if not os.path.isfile(scheduler := os.path.join(checkpoint, SCHEDULER_NAME)):
                raise ValueError(
                    f"{scheduler} is missing: resume from another checkpoint; one that is on disks of several nodes "
                    "needs save_on_each_node=True when it is saved"
                )
        except (OSError, ValueError) as error:
            problem = error
        failed = [float(problem is not None and number == rank) for number in range(world)]
        on_all = collectives.total(failed, self.args.device) if world > 1 else failed
        ranks = [r for r, number in enumerate(on_all) if number]
        if problem is not None:
            raise problem
        if ranks:
            raise ValueError(
                f"{checkpoint} cannot be resumed from: rank {', '.join(map(str, ranks))} refuses it, see its message"
            )
        return part

    def _cwd_say(self, part: Part, what: str, start: float) -> None:
        if self.args.should_log:
            seconds = time.perf_counter() - start
            logger().info(
                f"{part.path.parent}: {what} restored on each of {part.about['world']} ranks ({part.about['layout']}), "
                f"from {part.bytes / 1e9:.3g} GB a rank in {seconds:.2f} s"
            )


def _layout(model: nn.Module) -> str:
    config = getattr(model.config, "distributed_config", None)
    sizes = {name: getattr(config, name, None) or 1 for name in SIZES}
    return ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "one part"
