"""What is run beside the table, by world size."""

from hf_cwd.rules import RULES
from tests.distributed.given_gradients import refusals, states
from tests.distributed.given_gradients.small import SHAPES


def scenarios(world: int) -> dict[str, tuple]:
    """By name: a function, and what it is given after rank and world."""
    result: dict[str, tuple] = {}
    for rule, own in RULES.items():
        if world > 1:
            result |= _asked_for_state(rule)
        if world < 3:
            # Ranks that nothing but the optimizer connects do not hear of each other's overflow.
            for name in ("plain",) if world == 1 else ("ddp", "fsdp2"):
                result[f"overflow-{rule}-{name}"] = (states.overflow, rule, states.WRAPPERS[name])
        if world == 2:
            result |= _copied(rule)
        if world in (2, 3) and own.matrix is not None:
            result |= _refused(rule)
    return result


def _asked_for_state(rule: str) -> dict[str, tuple]:
    result = {f"one_rank_asks-{rule}": (states.one_rank_asks, rule)}
    for frozen in ((), ("a", "b"), tuple(SHAPES)):
        result[f"asked_for_state-{rule}-{len(frozen)}_frozen"] = (states.asked_for_state, rule, frozen)
    return result


def _copied(rule: str) -> dict[str, tuple]:
    result = {f"{function.__name__}-{rule}": (function, rule) for function in (states.warm_up, states.strided_memory)}
    for function in (states.by_state_dict, states.by_deepcopy, states.by_pickle):
        result[f"{function.__name__}-{rule}-plain"] = (states.copied, rule, False, function)
    for function in (states.by_state_dict, states.by_deepcopy, states.by_checkpoint):
        result[f"{function.__name__}-{rule}-fsdp2"] = (states.copied, rule, True, function)
    return result


def _refused(rule: str) -> dict[str, tuple]:
    result = {f"refused-{rule}-{name}": (refusals.refused, rule, *how) for name, how in refusals.REFUSALS.items()}
    for function in (refusals.marked_apart, refusals.rounding_is_no_difference, refusals.each_for_itself):
        result[f"{function.__name__}-{rule}"] = (function, rule)
    return result
