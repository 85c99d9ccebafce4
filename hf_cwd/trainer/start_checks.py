"""Checks of the optimizer and its parameter groups, once, before the first step of a run.

:mod:`hf_cwd.trainer.argument_checks` looks at TrainingArguments before that,
:mod:`hf_cwd.trainer.callbacks.optimizer_guard` and :mod:`hf_cwd.trainer.gradient_guard` look at each step.
"""

from collections.abc import Iterator
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from hf_cwd.distributed.dtensor import is_dtensor
from hf_cwd.log import logger, warn_once
from hf_cwd.optim.optimizer import CWDOptimizer
from hf_cwd.optim.original_params import listed
from hf_cwd.optim.state import held as held_states
from hf_cwd.optim.state import keys
from hf_cwd.optim.state_dict import RESET
from hf_cwd.optim.validation import resized
from hf_cwd.trainer import deepspeed
from hf_cwd.trainer.optim_names import PREFIX, chosen, names
from hf_cwd.trainer.optimizer_loading import follow
from hf_cwd.trainer.wrappers import innermost, layers

OTHER_MASK = (
    "of the Cautious Optimizers (arXiv 2411.16085), which mask the update. Cautious weight decay (arXiv 2510.12402) "
    "masks the decay alone"
)
# Group keys by which timm and lion-pytorch turn that mask on, and which of their values do.
MASKS_UPDATE = {"caution": bool, "cautious_factor": lambda factor: factor < 1}


def check_optimizer(args: Any, optimizer: Any) -> CWDOptimizer | None:
    """Returns the optimizer of this package that will train; None if another one trains and none of ours is asked for.

    Args:
        args: TrainingArguments.
        optimizer: the Trainer's, with its wrappers.

    Raises:
        RuntimeError: the optimizer is not the one that ``--optim cwd_*`` asks for, or its wrappers unscale gradients
            twice, or it is inside an optimizer that masks updates.
        ValueError: a group turns on the mask of another package.
    """
    name, wrappers = chosen(args), layers(optimizer)
    inner = wrappers.pop()
    if name in names():
        _check_name(name, inner)
    if not isinstance(inner, CWDOptimizer):
        return None
    if masks := next(_update_masks(inner), None):
        raise ValueError(
            f"a parameter group of {type(inner).__name__} has {masks}, which has no effect here. In timm and "
            f"lion-pytorch it is {OTHER_MASK}: take the key out of the group"
        )
    for wrapper in reversed(wrappers):  # the nearest first: the outer ones have the same groups
        if masks := next(_update_masks(wrapper), None):
            raise RuntimeError(
                f"{type(inner).__name__} is inside {type(wrapper).__name__}, whose {masks} is {OTHER_MASK}: train with "
                "one of the two"
            )
    _check_accelerated(args, inner, [wrapper for wrapper in wrappers if isinstance(wrapper, AcceleratedOptimizer)])
    return inner


def _check_accelerated(args: Any, inner: CWDOptimizer, wrappers: list[AcceleratedOptimizer]) -> None:
    if len(wrappers) < 2:
        return
    twice = (
        f"{type(inner).__name__} is wrapped {len(wrappers)} times by Accelerate. The Trainer prepares its optimizer "
        "itself: give it one that accelerator.prepare_optimizer() has not been called on"
    )
    if any(wrapper.scaler is not None for wrapper in wrappers):
        raise RuntimeError(f"{twice}. With a loss scaler, as here, gradients would be unscaled twice")
    if args.should_log:
        warn_once(f"{twice}. Without a loss scaler, as here, it does no harm")


def _check_name(name: str, optimizer: Any) -> None:
    algorithm = name.removeprefix(PREFIX)
    if isinstance(optimizer, CWDOptimizer):
        if optimizer.defaults["algorithm"] == algorithm:
            return
        raise RuntimeError(
            f"--optim {name} was asked for, and {type(optimizer).__name__} with rule "
            f"{optimizer.defaults['algorithm']!r} is about to train. It was given to the Trainer as optimizers=, or "
            "made before --optim was changed: leave one of them out, or set trainer.optimizer to None to have it made "
            "again"
        )
    masks = next(_update_masks(optimizer), None)
    raise RuntimeError(
        f"--optim {name} was asked for, and {type(optimizer).__name__} is about to train. Either it was given to the "
        "Trainer as optimizers=, which overrides --optim: leave one of them out. Or a library has replaced the "
        "optimizer, as Accelerate does under DeepSpeed's CPU offload unless its configuration says "
        '"zero_force_ds_cpu_optimizer": false' + (f". Its {masks} is {OTHER_MASK}" if masks else "")
    )


def _update_masks(optimizer: Any) -> Iterator[str]:
    """The values in its groups that turn on a mask of the update, as ``key=value``."""
    for group in getattr(optimizer, "param_groups", ()):
        yield from (f"{key}={group[key]!r}" for key, asks in MASKS_UPDATE.items() if key in group and asks(group[key]))


def warn_of_zeros(args: Any, optimizer: CWDOptimizer) -> None:
    """Warns if no parameter will be decayed, or none will change."""
    name = type(optimizer).__name__
    if not args.should_log:
        return
    groups = [group for group in optimizer.param_groups if group["params"]]
    if any(group["cautious"] for group in groups) and all(group["weight_decay"] == 0 for group in groups):
        if args.weight_decay == 0 and chosen(args) in names():
            warn_once(
                f"--weight_decay is 0 (the Trainer's default): {chosen(args)} then decays nothing. Try "
                "--weight_decay 0.1"
            )
        else:
            warn_once(
                f"weight_decay is 0 in every parameter group of {name}, which then decays nothing. Look at what made "
                "the groups: optimizers=, or the Trainer's get_decay_parameter_names and create_optimizer"
            )
    # During a warm-up lr may be 0. initial_lr is the value that the schedule multiplies.
    if all("initial_lr" in group and float(group["initial_lr"]) == 0 for group in groups):
        warn_once(f"the learning rate is 0 in every parameter group of {name}, which then changes no parameter")


def check_parameters(args: Any, optimizer: CWDOptimizer, model: nn.Module) -> None:
    """Warns of parameters that get gradients but are in no group. DeepSpeed's flat tensors are not checked.

    Raises:
        RuntimeError: the optimizer has no trainable parameter of the model, or a parameter and its states differ in
            size.
    """
    name = type(optimizer).__name__
    if deepspeed.is_used(args):
        return
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    own = {n: p for n, p in model.named_parameters() if id(p) in group_of}
    if not own:
        raise RuntimeError(
            f"none of the {len(group_of)} parameters of {name} is a parameter of {type(model).__name__}, so training "
            "would not change the model. The optimizer was made for another model, or before this one was made again, "
            "or everything was frozen: make it for the model that trains, or set trainer.optimizer to None to have it "
            "made again"
        )
    for n, p in own.items():
        if problem := resized(p, held_states(optimizer.state, p, group_of[id(p)])):
            raise RuntimeError(
                f"{n} {problem}: set trainer.optimizer and trainer.lr_scheduler to None to have them made again"
            )
    if not any(p.requires_grad for p in own.values()):
        raise RuntimeError(
            f"all of the {len(own)} parameters of {type(model).__name__} that {name} has are frozen: call "
            "requires_grad_(True) on those that are to be trained"
        )
    left = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in group_of]
    if left and args.should_log:
        warn_once(
            f"{listed(left)} of {type(model).__name__} get gradients, but are in no group of {name}, which will not "
            "train them. Freeze them, or make the optimizer after they were unfrozen or the embeddings were resized"
        )


def mark_replicated(optimizer: Any, inner: CWDOptimizer, model: nn.Module) -> None:
    """Tells the optimizer which parameters are replicated: those of the model, if Accelerate wraps it in DDP.

    Args:
        optimizer: the Trainer's, with its wrappers.
        inner: the optimizer without them.
        model: the model that trains, without its wrappers.
    """
    state = next((layer.accelerator_state for layer in layers(optimizer) if hasattr(layer, "accelerator_state")), None)
    is_ddp = state is not None and str(state.distributed_type.value).startswith("MULTI_")
    # Under tensor parallelism the type is the same, but Accelerate does not wrap the model.
    if not is_ddp or any(map(is_dtensor, model.parameters())):
        inner.mark_replicated(())
        return
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    inner.mark_replicated(p for name, p in model.named_parameters() if name not in ignored)


def check_schedule(args: Any, optimizer: CWDOptimizer, lr_scheduler: Any) -> None:
    """Raises RuntimeError if the learning rate schedule belongs to another optimizer."""
    if deepspeed.is_used(args) or not hasattr(lr_scheduler, "optimizer"):
        return
    scheduled = innermost(lr_scheduler.optimizer)
    if scheduled is not optimizer:
        raise RuntimeError(
            f"the learning rate schedule ({type(lr_scheduler).__name__}) was made for another optimizer "
            f"({type(scheduled).__name__}) and would not change the learning rate of the {type(optimizer).__name__} "
            "that is about to train: make it for this one, or leave it out of optimizers="
        )


def check_resumed(args: Any, optimizer: CWDOptimizer, lr_scheduler: Any, step: int) -> None:
    """Checks that a resumed run got its optimizer state back, and logs how much.

    Raises:
        RuntimeError: the optimizer has no state; the Trainer resumes silently if a checkpoint holds none.
        ValueError: a new state was asked for, but the schedule cannot be set to this step.
    """
    held = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    states = [state for _, p in held if (state := optimizer.state.get(p))]
    # A rank may hold no parameter of a small model, and SGD without momentum has no state.
    kept = [p for group, p in held if optimizer.overruled is None or keys(group, p.dtype)]
    is_empty = bool(kept) and not states
    if optimizer.reset_because is not None or (is_empty and optimizer.on_rule_change == "reset"):
        why = optimizer.reset_because or "the checkpoint holds no optimizer state"
        if args.should_log:
            warn_once(f"{RESET}: {type(optimizer).__name__} begins with new states at step {step}, since {why}")
        if not deepspeed.is_used(args):
            follow(optimizer, lr_scheduler, step)
        return
    if is_empty:
        raise RuntimeError(
            f"the run is resumed at step {step}, and {type(optimizer).__name__} got no state back: the checkpoint "
            "holds none (it needs both optimizer.pt and scheduler.pt; save_only_model=True saves neither). Resume from "
            f"another one, or begin with new states by --optim_args {RESET}"
        )
    if args.should_log:
        tensors = sum(len(state) for state in states)
        logger().info(
            f"resumed at step {step}: {tensors} state tensors of {len(states)} of {len(held)} parameters restored"
        )
        warn_of_resumed(optimizer)


def warn_of_resumed(optimizer: CWDOptimizer) -> None:
    """Warns of flags without effect in a resumed run: the checkpoint's hyper-parameters override them, as in torch."""
    own = optimizer.defaults["algorithm"]
    told = [
        f"{'' if rule == own else f'{rule}_'}{key}={loaded}, not {given}"
        for rule, key, loaded, given in optimizer.overruled or ()
    ]
    if told:
        warn_once(
            f"the resumed {PREFIX}{own} keeps the hyper-parameters of its checkpoint, which override the flags: "
            f"{'; '.join(dict.fromkeys(told))}. To change them, start another run from the checkpoint's weights"
        )
