"""What is looked at once, before the first step of a run: the optimizer that is about to train, and its groups."""

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

OTHER_MASK = (
    "of the Cautious Optimizers (arXiv 2411.16085), which mask the update. Cautious weight decay (arXiv 2510.12402) "
    "masks the decay alone"
)
# Group keys by which timm and lion-pytorch ask for that mask, and whether a value does.
MASKS_UPDATE = {"caution": bool, "cautious_factor": lambda factor: factor < 1}


def layers(optimizer: Any) -> list[Any]:
    """An optimizer and what it wraps, from the outside to the inside."""
    found = [optimizer]
    while hasattr(found[-1], "optimizer"):
        found.append(found[-1].optimizer)
    return found


def innermost(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of Accelerate and DeepSpeed."""
    return layers(optimizer)[-1]


def check_optimizer(args: Any, optimizer: Any) -> CWDOptimizer | None:
    """The optimizer of this package that is about to train, None if neither ``--optim`` nor anybody asks for one.

    Args:
        args: TrainingArguments.
        optimizer: the Trainer's, with its wrappers.

    Raises:
        RuntimeError: ``--optim cwd_*`` asks for an optimizer that is not the one in there, it is wrapped such that its
            gradients are unscaled twice, or inside an optimizer that masks updates.
        ValueError: a group asks for the mask of another package.
    """
    name, around = chosen(args), layers(optimizer)
    found = around.pop()
    if name in names():
        _check_name(name, found)
    if not isinstance(found, CWDOptimizer):
        return None
    if masks := next(_update_masks(found), None):
        raise ValueError(
            f"a parameter group of {type(found).__name__} has {masks}, which has no effect here. In timm and "
            f"lion-pytorch it is {OTHER_MASK}: take the key out of the group"
        )
    for layer in reversed(around):  # those further out pass its groups on
        if masks := next(_update_masks(layer), None):
            raise RuntimeError(
                f"{type(found).__name__} is inside {type(layer).__name__}, whose {masks} is {OTHER_MASK}: train with "
                "one of the two"
            )
    wrappers = [layer for layer in around if isinstance(layer, AcceleratedOptimizer)]
    if len(wrappers) > 1:
        twice = (
            f"{type(found).__name__} is wrapped {len(wrappers)} times by Accelerate. The Trainer prepares its "
            "optimizer itself: give it one that accelerator.prepare_optimizer() has not been called on"
        )
        if any(wrapper.scaler is not None for wrapper in wrappers):
            raise RuntimeError(f"{twice}. With a loss scaler, as here, gradients would be unscaled twice")
        if args.should_log:
            warn_once(f"{twice}. Without a loss scaler, as here, it does no harm")
    return found


def _check_name(name: str, found: Any) -> None:
    algorithm = name.removeprefix(PREFIX)
    if isinstance(found, CWDOptimizer):
        if found.defaults["algorithm"] == algorithm:
            return
        raise RuntimeError(
            f"--optim {name} was asked for, and {type(found).__name__} with rule {found.defaults['algorithm']!r} is "
            "about to train. It was given to the Trainer as optimizers=, or made before --optim was changed: leave "
            "one of them out, or set trainer.optimizer to None to have it made again"
        )
    masks = next(_update_masks(found), None)
    raise RuntimeError(
        f"--optim {name} was asked for, and {type(found).__name__} is about to train. Either it was given to the "
        "Trainer as optimizers=, beside which --optim has no effect: leave one of them out. Or a library has put it in "
        "the optimizer's place, as Accelerate does under DeepSpeed's CPU offload unless its configuration says "
        '"zero_force_ds_cpu_optimizer": false' + (f". Its {masks} is {OTHER_MASK}" if masks else "")
    )


def _update_masks(optimizer: Any) -> Iterator[str]:
    """The groups' values that ask for a mask of the update, as ``key=value``."""
    for group in getattr(optimizer, "param_groups", ()):
        yield from (f"{key}={group[key]!r}" for key, asks in MASKS_UPDATE.items() if key in group and asks(group[key]))


def warn_of_zeros(args: Any, optimizer: CWDOptimizer) -> None:
    """Warns where no parameter would be decayed, or none would move."""
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
                f"weight_decay is 0 in every parameter group of {name}, which then decays nothing. Look at optimizers= "
                "or at the Trainer's get_decay_parameter_names and create_optimizer, whichever made the groups"
            )
    # A warm-up begins with lr 0; initial_lr is what a schedule multiplies.
    if all("initial_lr" in group and float(group["initial_lr"]) == 0 for group in groups):
        warn_once(f"the learning rate is 0 in every parameter group of {name}, which then changes no parameter")


def check_parameters(args: Any, optimizer: CWDOptimizer, model: nn.Module) -> None:
    """Warns of parameters that would have gradients for nothing. DeepSpeed's flat tensors are not looked at.

    Raises:
        RuntimeError: no parameter of the optimizer is one of the model's that can be trained, or one has another size
            than its states.
    """
    name = type(optimizer).__name__
    if deepspeed.is_used(args):
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = {n: p for n, p in model.named_parameters() if id(p) in held}
    if not own:
        raise RuntimeError(
            f"none of the {len(held)} parameters of {name} is one of {type(model).__name__}'s, which would stay as it "
            "is. The optimizer was made for another model, or before this one was made again, or everything was "
            "frozen: make it for the model that trains, or set trainer.optimizer to None to have it made again"
        )
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for n, p in own.items():
        if found := resized(p, held_states(optimizer.state, p, group_of[id(p)])):
            raise RuntimeError(f"{n} {found}")
    if not any(p.requires_grad for p in own.values()):
        raise RuntimeError(
            f"all of the {len(own)} parameters of {type(model).__name__} that {name} has are frozen: call "
            "requires_grad_(True) on those that are to be trained"
        )
    left = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if left and args.should_log:
        warn_once(
            f"{name} has no group with {listed(left)}, which {type(model).__name__} computes gradients for: they stay "
            "as they are. Freeze them, or make the optimizer after they were unfrozen, or after the embeddings were "
            "resized"
        )


def mark_replicated(optimizer: Any, found: CWDOptimizer, model: nn.Module) -> None:
    """Tells the optimizer which parameters are replicas: those of the model that Accelerate wraps in DDP.

    Args:
        optimizer: the Trainer's, with its wrappers.
        found: the one inside.
        model: that trains, without its wrappers.
    """
    state = next((layer.accelerator_state for layer in layers(optimizer) if hasattr(layer, "accelerator_state")), None)
    is_ddp = state is not None and str(state.distributed_type.value).startswith("MULTI_")
    # Under tensor parallelism Accelerate has the same type, and wraps nothing.
    if not is_ddp or any(map(is_dtensor, model.parameters())):
        found.mark_replicated(())
        return
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    found.mark_replicated(p for name, p in model.named_parameters() if name not in ignored)


def check_schedule(args: Any, optimizer: CWDOptimizer, lr_scheduler: Any) -> None:
    """Raises RuntimeError where the learning rate's schedule moves another optimizer's groups."""
    if deepspeed.is_used(args) or not hasattr(lr_scheduler, "optimizer"):
        return
    found = innermost(lr_scheduler.optimizer)
    if found is not optimizer:
        raise RuntimeError(
            f"the learning rate schedule ({type(lr_scheduler).__name__}) was made for another optimizer "
            f"({type(found).__name__}) than the {type(optimizer).__name__} that is about to train, whose learning rate "
            "it would leave as it is: make it for this one, or leave it out of optimizers="
        )


def check_resumed(args: Any, optimizer: CWDOptimizer, lr_scheduler: Any, step: int) -> None:
    """Looks at what a resumed run got back, and says it.

    Raises:
        RuntimeError: the optimizer has no state: the Trainer goes on without a word where a checkpoint holds none.
        ValueError: the state was left behind on demand, and the schedule cannot follow.
    """
    held = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    states = [state for _, p in held if (state := optimizer.state.get(p))]
    # A rank may hold nothing of a small model, and SGD without momentum remembers nothing.
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
            "holds none (optimizer.pt and scheduler.pt are needed both; save_only_model=True saves neither). Resume "
            f"from another one, or begin with new states by --optim_args {RESET}"
        )
    if args.should_log:
        tensors = sum(len(state) for state in states)
        logger().info(
            f"resumed at step {step}: {tensors} state tensors of {len(states)} of {len(held)} parameters restored"
        )
        warn_of_resumed(optimizer)


def warn_of_resumed(optimizer: CWDOptimizer) -> None:
    """Says which settings have no effect in a resumed run: a checkpoint's hyper-parameters win, as in all of torch."""
    own = optimizer.defaults["algorithm"]
    told = [
        f"{'' if rule == own else f'{rule}_'}{key}={loaded}, not {given}"
        for rule, key, loaded, given in optimizer.overruled or ()
    ]
    if told:
        warn_once(
            f"the resumed {PREFIX}{own} keeps the hyper-parameters of its checkpoint, whatever the flags say now: "
            f"{'; '.join(dict.fromkeys(told))}. To change them, start another run from the checkpoint's weights"
        )
