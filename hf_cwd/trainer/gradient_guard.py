"""What :class:`hf_cwd.CWDTrainer` does about gradients that are not finite, which the Trainer itself trains on."""

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
from hf_cwd.trainer.checks import innermost

MOST = 20  # steps that may be skipped in a row
NAMED = 3


class FiniteGuard:
    """Looks at the gradient norm of each step before the step, and at nothing else while that is finite.

    The Trainer has the norm computed for clipping and for its log, and it is the same number on all ranks: one rank's
    NaN is in all ranks' averaged gradients. So all ranks stop, or skip the step, together, and none waits for another.
    Losses are a rank's own: they are said, and decide only where the norm cannot, under fp16 (whose loss scaler makes
    norms infinite and leaves out such steps itself) and where nobody computes one.

    No pass over gradients or weights is added. Norm and losses come to the CPU in one copy a step; that copy waits for
    the norm, as the Trainer's ``logging_nan_inf_filter`` waits for each loss.

    Under DeepSpeed, which steps inside ``backward``, the look comes after the step.
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
        """Whether anything is looked at."""
        return self._mode != "ignore"

    def install(self, accelerator: Accelerator) -> None:
        """Takes the place of ``accelerator.clip_grad_norm_``, by which every transformers 5 has norms computed.

        A norm that is NaN makes every gradient NaN in clipping: which parameter it came from can be told between the
        two only.

        Raises:
            ValueError: steps are to be skipped where that is impossible.
        """
        clips = (self._trainer.args.max_grad_norm or 0) > 0
        self._has_norm = clips or hasattr(transformers.Trainer, "_get_grad_norm")
        if self._mode == "skip" and accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "cwd_not_finite='skip' is impossible under DeepSpeed, which steps before the norm of the gradients can "
                "be seen: give 'stop' or 'ignore' (with fp16 its loss scaler leaves out such steps by itself)"
            )
        if self._mode == "skip" and not self._has_norm:
            raise ValueError(
                f"cwd_not_finite='skip' goes by the gradient norm, and with max_grad_norm="
                f"{self._trainer.args.max_grad_norm} transformers {transformers.__version__} computes none: give "
                "--max_grad_norm 1.0, or 1e9 to clip nothing"
            )
        if self.is_on:
            self._clip: Callable[..., Any] = accelerator.clip_grad_norm_
            accelerator.clip_grad_norm_ = self.clip

    def saw(self, loss: Tensor) -> None:
        """Takes note of a micro-batch's loss, without waiting for it."""
        if not self.is_on:
            return
        self._losses.append(loss.detach())
        if not self._has_norm:
            self._is_finite([], None)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2.0) -> Any:
        """``Accelerator.clip_grad_norm_``, with a look at the norm before anything is multiplied by it.

        Raises:
            RuntimeError: the gradients are not finite, and the run is to stop.
        """
        accelerator, params = self._trainer.accelerator, list(parameters)
        fsdp1 = accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2
        if fsdp1 or accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.XLA):
            norm = self._clip(params, max_norm, norm_type)  # computed by their own code, which clips at once
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
        """Whether the step may be made with the gradients as they are; else they are gone, or an error is raised."""
        args, accelerator, step = self._trainer.args, self._trainer.accelerator, self._trainer.state.global_step + 1
        known = [] if norm is None else [norm]
        values = _values([*known, *self._losses])
        losses = [value for value in values[len(known) :] if not math.isfinite(value)]
        self._losses = []
        # Under fp16 a norm that is not finite is how the loss scaler finds its scale.
        scaled = accelerator.scaler is not None or accelerator.mixed_precision == "fp16"
        if scaled or not known:
            what = f"the loss is {losses[0]}" if losses else ""
        elif math.isfinite(values[0]):
            what = ""
            if losses and not self._has_warned:
                self._has_warned = True
                hidden = "; the Trainer's log leaves it out of the mean" if args.logging_nan_inf_filter else ""
                logger().warning(
                    f"step {step}: the loss is {losses[0]}, and the gradients are finite: the step is made. A batch "
                    f"without labels gives such a loss{hidden}"
                )
        else:
            what = f"the gradient norm is {values[0]}" + (f", this rank's loss {losses[0]}" if losses else "")
        if not what:
            self._in_a_row = 0
            return all(map(math.isfinite, values[: len(known)]))
        found = f"step {step}: {what}. {self._culprits(params)}"
        self._in_a_row += 1
        if self._mode == "stop" or self._in_a_row == MOST:
            raise RuntimeError(f"{found}{self._advice()}")
        self.skipped += 1
        if self._trainer.args.should_log or losses:
            logger().warning(f"{found}The step is skipped: {self.skipped} in this run so far")
        if not scaled:  # the loss scaler sees to it by itself
            for p in params:
                p.grad = None
        return False

    def _culprits(self, params: list[nn.Parameter]) -> str:
        """Names what is not finite: the only pass over gradients, weights and states, of a step that has failed."""
        names = {p: name for name, p in self._trainer.model.named_parameters()}
        state = getattr(innermost(self._trainer.optimizer), "state", {})
        kinds: dict[str, Callable[[nn.Parameter], Iterator[Tensor]]] = {
            "gradients": lambda p: iter([] if p.grad is None else [p.grad]),
            "weights": lambda p: iter([getattr(p, "ds_tensor", p)]),  # of ZeRO-3 it is what this rank has
            "optimizer states": lambda p: (x for x in state.get(p, {}).values() if isinstance(x, Tensor)),
        }
        found = {kind: [name for p, name in names.items() if any(map(_is_bad, of(p)))] for kind, of in kinds.items()}
        text = "; ".join(f"{kind} of {_some(bad, len(names))}" for kind, bad in found.items() if bad)
        if text:
            return f"Not finite: {text}. "
        if any(p.grad is not None for p in params):
            return "Every gradient on this rank is finite: another rank's part is not, or the norm overflows. "
        return "All weights on this rank are finite. "

    def _advice(self) -> str:
        args, accelerator = self._trainer.args, self._trainer.accelerator
        try:
            last = get_last_checkpoint(args.output_dir)
        except OSError:  # no such directory
            last = None
        if self._in_a_row == MOST:
            way = f"It would be the {MOST}th step in a row to be skipped: that does not help any more"
        elif accelerator.distributed_type == DistributedType.DEEPSPEED:  # which leaves out some such steps by itself
            made = accelerator.deepspeed_engine_wrapped.engine.was_step_applied()
            way = "DeepSpeed has made the step" if made else "DeepSpeed has left the step out"
        else:
            way = "The step has not been made; cwd_not_finite='skip' leaves out such steps, 'ignore' makes them"
        return (
            f"{way}. Look at the step's batch, lower --learning_rate or warm up longer, and go on from "
            f"{last or 'the last good checkpoint'}"
        )


def _values(numbers: list[Any]) -> list[float]:
    """Numbers and one-element tensors as floats, by one copy from their device."""
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
