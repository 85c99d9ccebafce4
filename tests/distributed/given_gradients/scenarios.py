"""What is run beside the table, by world size."""

from hf_cwd.rules import RULES
from tests.distributed.given_gradients import refusals as refusals
from tests.distributed.given_gradients import states as states
from tests.distributed.given_gradients.small import SHAPES


def scenarios(world: int) -> dict[str, tuple]:
    """By name: a function, and what it is given after rank and world."""
    found: dict[str, tuple] = {}
    for rule in RULES if world > 1 else ():
        for frozen in ((), ("a", "b"), tuple(SHAPES)):
            found[f"asked_for_state-{rule}-{len(frozen)}_frozen"] = (states.asked_for_state, rule, frozen)
        found[f"one_rank_asks-{rule}"] = (states.one_rank_asks, rule)
    for rule in RULES if world < 3 else ():
        # Ranks that nothing but the optimizer connects do not hear of each other's overflow.
        for name in ("plain",) if world == 1 else ("ddp", "fsdp2"):
            found[f"overflow-{rule}-{name}"] = (states.overflow, rule, states.WRAPPERS[name])
    for rule in RULES if world == 2 else ():
        for function in (states.warm_up, states.strided_memory):
            found[f"{function.__name__}-{rule}"] = (function, rule)
        for function in (states.by_state_dict, states.by_deepcopy, states.by_pickle):
            found[f"{function.__name__}-{rule}-plain"] = (states.copied, rule, False, function)
        for function in (states.by_state_dict, states.by_deepcopy, states.by_checkpoint):
            found[f"{function.__name__}-{rule}-fsdp2"] = (states.copied, rule, True, function)
    for rule, kind in RULES.items() if world in (2, 3) else ():
        if kind.matrix is not None:
            for name, refusal in refusals.REFUSALS.items():
                found[f"refused-{rule}-{name}"] = (refusals.refused, rule, *refusal)
            for function in (
                refusals.marked_apart,
                refusals.rounding_is_no_difference,
                refusals.each_for_itself,
            ):
                found[f"{function.__name__}-{rule}"] = (function, rule)
    return found
