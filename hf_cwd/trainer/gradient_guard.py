"""Looks at the gradients of each step under :class:`hf_cwd.CWDTrainer`, before the step: are they finite?

The plain Trainer trains on gradients that are not. :mod:`hf_cwd.trainer.start_checks` has the checks before the first
step, :mod:`hf_cwd.trainer.callbacks.optimizer_guard` looks at the optimizer at each step.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers.trainer_utils import get_last_checkpoint

from hf_cwd.distributed.dtensor import is_dtensor, local
from hf_cwd.log import logger
from hf_cwd.trainer.wrappers import innermost

MOST = 20  # steps that may be skipped in a row
NAMED = 3


class GradientGuard:
    """Checks before each step that the gradient norm is finite; stops the run or skips the step if it is not.

    The Trainer computes the norm anyway, for clipping and for its log. It is the same on all ranks, since the averaged
    gradients contain every rank's NaN. All ranks therefore stop, or skip the step, together, and none waits for
    another. The losses differ between ranks. They are reported, and they decide only if the norm cannot: under fp16,
    where a loss scaler makes norms infinite and skips such steps itself, and if no norm is computed.

    The check adds no pass over gradients or weights. It copies the norm and the losses to the CPU once a step. That
    copy waits for the norm, as the Trainer's ``logging_nan_inf_filter`` waits for each loss.

    DeepSpeed steps inside ``backward``, so that the check comes after the step there.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._mode = getattr(trainer.args, "cwd_not_finite", "stop")
        self._losses: list[Tensor] = []
        self._in_a_row = 0
        self._has_warned = False
        self.skipped = 0

    @property
    def is_on(self) -> bool:
        """Whether gradients are checked."""
        return self._mode != "ignore"

    def install(self, accelerator: Accelerator) -> None:
        """Replaces ``accelerator.clip_grad_norm_``, by which every transformers 5 computes the norm.

        Clipping by a norm of NaN makes every gradient NaN. The parameter that caused it can be named only before that.

        Raises:
            ValueError: steps are to be skipped, which is impossible here.
        """
        clips = (self._trainer.args.max_grad_norm or 0) > 0
        self._has_norm = clips or hasattr(transformers.Trainer, "_get_grad_norm")
        if self._mode == "skip" and accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "cwd_not_finite='skip' is impossible under DeepSpeed, which steps before it returns the gradient norm: "
                "give 'stop' or 'ignore' (with fp16 its loss scaler skips such steps by itself)"
            )
        if self._mode == "skip" and not self._has_norm:
            raise ValueError(
                "cwd_not_finite='skip' needs the gradient norm, and with max_grad_norm="
                f"{self._trainer.args.max_grad_norm} transformers {transformers.__version__} computes none: give "
                "--max_grad_norm 1.0, or 1e9 to clip nothing"
            )
        if self.is_on:
            self._clip: Callable[..., Any] = accelerator.clip_grad_norm_
            accelerator.clip_grad_norm_ = self.clip

    def saw(self, loss: Tensor) -> None:
        """Keeps the loss of a micro-batch for the next check, without a synchronization."""
        if not self.is_on:
            return
        self._losses.append(loss.detach())
        if not self._has_norm:
            self._is_finite([], None)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2.0) -> Any:
        """``Accelerator.clip_grad_norm_`` that checks the norm before it scales the gradients.

        Raises:
            RuntimeError: the gradients are not finite, and ``cwd_not_finite`` is not ``"skip"``.
        """
        accelerator, params = self._trainer.accelerator, list(parameters)
        fsdp1 = accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2
        if fsdp1 or accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.XLA):
            norm = self._clip(params, max_norm, norm_type)  # these compute the norm and clip in one call
            self._is_finite(params, norm)
            return norm
        accelerator.unscale_gradients()
        groups: dict[Any, list[nn.Parameter]] = {}
        for p in params:
            if p.grad is not None:
                groups.setdefault(p.grad.device_mesh if is_dtensor(p.grad) else None, []).append(p)
        norms = [get_total_norm([p.grad for p in group], norm_type) for group in groups.values()]
        norms = [norm.full_tensor() if is_dtensor(norm) else norm for norm in norms]  # the same on all ranks
        if len(norms) == 1:
            norm = norms[0]
        else:
            norm = torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros(())
        if self._is_finite(params, norm):
            for mesh, group in groups.items():
                clip_grads_with_norm_(group, max_norm, norm if mesh is None else _replicated(norm, mesh))
        return norm

    def _is_finite(self, params: list[nn.Parameter], norm: Any) -> bool:
        """Whether the gradients may be used. If not, this sets them to None or raises an error."""
        accelerator, step = self._trainer.accelerator, self._trainer.state.global_step + 1
        norms = [] if norm is None else [norm]
        values = _values([*norms, *self._losses])
        losses = [value for value in values[len(norms) :] if not math.isfinite(value)]
        self._losses = []
        # Under fp16 the loss scaler needs infinite norms to find its scale.
        is_scaled = accelerator.scaler is not None or accelerator.mixed_precision == "fp16"
        if is_scaled or not norms:
            problem = f"the loss is {losses[0]}" if losses else ""
        elif math.isfinite(values[0]):
            problem = ""
            if losses:
                self._warn_of_loss(losses[0], step)
        else:
            problem = f"the gradient norm is {values[0]}" + (f", this rank's loss {losses[0]}" if losses else "")
        if not problem:
            self._in_a_row = 0
            return all(map(math.isfinite, values[: len(norms)]))
        self._refuse(f"step {step}: {problem}. {self._culprits(params)}", has_bad_loss=bool(losses))
        if not is_scaled:  # a loss scaler skips the step itself
            for p in params:
                p.grad = None
        return False

    def _warn_of_loss(self, loss: float, step: int) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        hidden = "; the Trainer's log leaves it out of the mean" if self._trainer.args.logging_nan_inf_filter else ""
        logger().warning(
            f"step {step}: the loss is {loss}, but the gradients are finite: the step is made. A batch without labels "
            f"gives such a loss{hidden}"
        )

    def _refuse(self, text: str, *, has_bad_loss: bool) -> None:
        """Counts a step that is skipped; RuntimeError if the run is to stop, or has skipped too many in a row."""
        self._in_a_row += 1
        if self._mode == "stop" or self._in_a_row == MOST:
            raise RuntimeError(f"{text}{self._advice()}")
        self.skipped += 1
        if self._trainer.args.should_log or has_bad_loss:
            logger().warning(f"{text}The step is skipped: {self.skipped} in this run so far")

    def _culprits(self, params: list[nn.Parameter]) -> str:
        """Names the tensors that are not finite. Only a failed step pays for this pass over all tensors."""
        names = {p: name for name, p in self._trainer.model.named_parameters()}
        state = getattr(innermost(self._trainer.optimizer), "state", {})
        tensors: dict[str, Callable[[nn.Parameter], Iterator[Tensor]]] = {
            "gradients": lambda p: iter([] if p.grad is None else [p.grad]),
            "weights": lambda p: iter([getattr(p, "ds_tensor", p)]),  # under ZeRO-3 this rank's part of the weights
            "optimizer states": lambda p: (x for x in state.get(p, {}).values() if isinstance(x, Tensor)),
        }
        bad = {what: [name for p, name in names.items() if any(map(_is_bad, of(p)))] for what, of in tensors.items()}
        text = "; ".join(f"{what} of {_some(affected, len(names))}" for what, affected in bad.items() if affected)
        if text:
            return f"Not finite: {text}. "
        if any(p.grad is not None for p in params):
            return "Every gradient on this rank is finite: another rank has one that is not, or the norm overflows. "
        return "All weights on this rank are finite. "

    def _advice(self) -> str:
        args, accelerator = self._trainer.args, self._trainer.accelerator
        try:
            last = get_last_checkpoint(args.output_dir)
        except OSError:  # no such directory
            last = None
        if self._in_a_row == MOST:
            outcome = f"It would be the {MOST}th skipped step in a row: skipping does not help any more"
        elif accelerator.distributed_type == DistributedType.DEEPSPEED:  # it skips some such steps by itself
            made = accelerator.deepspeed_engine_wrapped.engine.was_step_applied()
            outcome = "DeepSpeed has made the step" if made else "DeepSpeed has skipped the step"
        else:
            outcome = "The step has not been made; cwd_not_finite='skip' skips such steps, 'ignore' makes them"
        return (
            f"{outcome}. Look at the step's batch, lower --learning_rate or warm up longer, and resume from "
            f"{last or 'the last good checkpoint'}"
        )


def _values(numbers: list[Any]) -> list[float]:
    """Converts numbers and one-element tensors to floats, with one copy from their device."""
    tensors = [x for x in numbers if isinstance(x, Tensor)]
    if not tensors:
        return [float(x) for x in numbers]
    device = tensors[0].device
    copied = iter(torch.stack([x.detach().to(device, torch.float32).reshape(()) for x in tensors]).tolist())
    return [next(copied) if isinstance(x, Tensor) else float(x) for x in numbers]


def _replicated(norm: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(norm, mesh, run_check=False)


@torch.no_grad()
def _is_bad(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(local(tensor)).all())


def _some(names: list[str], total: int) -> str:
    more = f" and {len(names) - NAMED} more of {total}" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
