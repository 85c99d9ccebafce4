"""Checkpoints of models that transformers shards at load time (``DistributedConfig``): each rank saves its own file.

The Trainer refuses to checkpoint such runs, because it would save only rank 0's optimizer. It gathers the weights into
one file for from_pretrained, but cannot load that file into a sharded model.
"""

import os
import time
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from hf_cwd.checkpoint import rank_files
from hf_cwd.checkpoint.restore import RankFile
from hf_cwd.distributed import collectives
from hf_cwd.log import logger
from hf_cwd.trainer.optimizer_loading import of_any_groups
from hf_cwd.trainer.wrappers import innermost

SIZES = ("dp_replicate_size", "fsdp_size", "tp_size", "pp_size", "ep_size")


class RankCheckpointMixin:
    """Saves and loads one file for each rank if the model was sharded at load time.

    Raises:
        RuntimeError: when the trainer is made, if this version of transformers refuses such checkpoints in an unknown
            place.
        ValueError: when a run resumes, on all ranks and before the first step, if a file is damaged or does not fit.
    """

    _cwd_is_sharded = False
    _cwd_is_made = False
    _cwd_denials = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cwd_is_made = True
        saves = self.args.save_strategy != "no" and not self.args.save_only_model
        if self._cwd_is_sharded and saves and self._cwd_denials != 1:
            raise RuntimeError(
                f"transformers {transformers.__version__} treats checkpoints of models sharded at load time in a way "
                "that this version of hf_cwd does not know: use another version of one of them, or save_strategy='no' "
                "or save_only_model=True"
            )

    @property
    def is_distributed_loading_by_transformers(self) -> bool:
        """The Trainer's attribute, but False when ``Trainer.__init__`` reads it to refuse checkpoints.

        ``Trainer.__init__`` reads it twice: to decide whether to move the model, and, after it has set ``state``, to
        refuse. If another version reads it more often after that, our ``__init__`` raises an error.
        """
        if self._cwd_is_sharded and not self._cwd_is_made and "state" in vars(self):
            self._cwd_denials += 1
            return False
        return self._cwd_is_sharded

    @is_distributed_loading_by_transformers.setter
    def is_distributed_loading_by_transformers(self, value: bool) -> None:
        self._cwd_is_sharded = value

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._cwd_is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        os.makedirs(output_dir, exist_ok=True)  # rank 0 may be later, or on another node
        rank, world = self.args.process_index, self.args.world_size
        rank_files.save(
            os.path.join(output_dir, rank_files.file_name(rank, world)),
            self._cwd_weights(),
            innermost(self.optimizer),
            rank=rank,
            world=world,
            parallelism=_parallelism(self.model),
            global_step=self.state.global_step,
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._cwd_is_sharded:
            self._cwd_load_weights(resume_from_checkpoint)
            return
        if os.path.isdir(resume_from_checkpoint) and rank_files.existing(resume_from_checkpoint):
            raise ValueError(
                f"{resume_from_checkpoint} is of a model sharded at load time, and this one is not: each rank saved "
                "its part of the optimizer states. Load the model with the DistributedConfig that it was saved with, "
                "on as many ranks, or begin a new run from the checkpoint's weights"
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
        rank_file, optimizer = self._cwd_open(checkpoint), innermost(self.optimizer)
        self.optimizer.load_state_dict(rank_file.optimizer_state(optimizer))
        with of_any_groups(self.lr_scheduler):
            self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True))
        if optimizer.reset_because is not None:
            return
        loaded, saved = sum(map(len, optimizer.state.values())), rank_file.about["states"]
        if loaded != saved:
            raise RuntimeError(
                f"{rank_file.path} holds {saved} state tensors, and {type(optimizer).__name__} loaded {loaded}: resume "
                "from another checkpoint"
            )
        self._cwd_say(rank_file, f"{loaded} state tensors of {type(optimizer).__name__}", start)

    def _cwd_load_weights(self, checkpoint: str) -> None:
        start = time.perf_counter()
        rank_file = self._cwd_open(checkpoint)
        self._cwd_say(rank_file, f"{rank_file.load_weights()} tensors of {type(self.model).__name__}", start)

    def _cwd_weights(self) -> dict[str, Tensor]:
        """The model's tensors. Of a PEFT model only the trained ones: the script loads the base model itself."""
        return rank_files.tensors_of(self.model, adapters_only=hasattr(self.model, "peft_config"))

    def _cwd_open(self, checkpoint: str) -> RankFile:
        """Opens this rank's file. All ranks raise an error if one of them finds its file damaged or unfit."""
        rank, world = self.args.process_index, self.args.world_size
        rank_file, problem = None, None
        try:
            rank_file = RankFile(
                checkpoint, self._cwd_weights(), rank=rank, world=world, parallelism=_parallelism(self.model)
            )
            _check_beside(rank_file, checkpoint)
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
        return rank_file

    def _cwd_say(self, rank_file: RankFile, what: str, start: float) -> None:
        if self.args.should_log:
            seconds, about = time.perf_counter() - start, rank_file.about
            logger().info(
                f"{rank_file.path.parent}: {what} restored on each of {about['world']} ranks ({about['layout']}), from "
                f"{rank_file.bytes / 1e9:.3g} GB a rank in {seconds:.2f} s"
            )


def _check_beside(rank_file: RankFile, checkpoint: str) -> None:
    """Raises ValueError if the Trainer's files beside a rank's file are missing, or of another step."""
    step = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)).global_step
    if (saved := rank_file.about.get("global_step")) != step:
        raise ValueError(
            f"{rank_file.path} was saved at step {saved}, and {TRAINER_STATE_NAME} beside it at step {step}: files of "
            "two checkpoints are mixed. Resume from another one"
        )
    if not os.path.isfile(scheduler := os.path.join(checkpoint, SCHEDULER_NAME)):
        raise ValueError(
            f"{scheduler} is missing: resume from another checkpoint. If each node has its own disk, save with "
            "save_on_each_node=True"
        )


def _parallelism(model: nn.Module) -> str:
    config = getattr(model.config, "distributed_config", None)
    sizes = {name: getattr(config, name, None) or 1 for name in SIZES}
    return ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "one part"
