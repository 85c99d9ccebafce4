"""What is stepped under DeepSpeed with given gradients: configurations, rules, options, and the cases they make."""

from typing import Any, NamedTuple

import torch

from hf_cwd.rules import RULES
from tests.distributed.given_gradients.tables import Variant, variants

WORLDS = (1, 2, 3)
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
BF16 = {"bf16": {"enabled": True}}


class Config(NamedTuple):
    """A configuration of DeepSpeed.

    Attributes:
        zero: its section ``zero_optimization``.
        top: the others.
        worlds: numbers of ranks.
        thorough: in which of them every variant meets it.
        optimizer: the class of DeepSpeed's that must be at work.
    """

    zero: dict[str, Any]
    top: dict[str, Any] = {}  # noqa: RUF012
    worlds: tuple[int, ...] = (2,)
    thorough: tuple[int, ...] = ()
    optimizer: str = "DeepSpeedZeroOptimizer"

    @property
    def is_bf16(self) -> bool:
        return "bf16" in self.top


STAGE_3 = "DeepSpeedZeroOptimizer_Stage3"
CONFIGS: dict[str, Config] = {
    "zero1": Config({"stage": 1}, worlds=WORLDS),
    "zero2": Config({"stage": 2}, worlds=WORLDS, thorough=(3,)),
    "zero3": Config({"stage": 3}, worlds=WORLDS, thorough=(2,), optimizer=STAGE_3),
    "zero1_offload": Config({"stage": 1, **OFFLOAD}),
    "zero2_offload": Config({"stage": 2, **OFFLOAD}, worlds=(2, 3)),
    "zero3_offload": Config({"stage": 3, **OFFLOAD}, worlds=(2, 3), optimizer=STAGE_3),
    "zero2_round_robin": Config({"stage": 2, "round_robin_gradients": True}, worlds=(2, 3)),
    "zero1_aligned": Config({"stage": 1, "parameter_alignment": True}, worlds=(3,)),
    # Several flat tensors of a group, which are stepped one after another.
    "zero3_sub_groups": Config({"stage": 3, "sub_group_size": 200}, worlds=(2, 3), optimizer=STAGE_3),
    "zero3_persistent": Config({"stage": 3, "stage3_param_persistence_threshold": 10**6}, optimizer=STAGE_3),
    "zero1_bf16": Config({"stage": 1}, BF16),
    "zero2_bf16": Config({"stage": 2}, BF16, worlds=(3,)),
    "zero3_bf16": Config({"stage": 3}, BF16, worlds=(2, 3), optimizer=STAGE_3),
    "zero3_bf16_offload": Config({"stage": 3, **OFFLOAD}, BF16, optimizer=STAGE_3),
    "bf16_optimizer": Config(
        {"stage": 1},
        {**BF16, "data_types": {"grad_accum_dtype": "fp32"}},
        worlds=(2, 3),
        optimizer="BF16_Optimizer",
    ),
}


class Case(NamedTuple):
    config: str
    variant: Variant

    def __str__(self) -> str:
        return f"{self.config}-{self.variant}"


def cases(world: int) -> list[Case]:
    found = []
    for name, config in CONFIGS.items():
        for rule in RULES if world in config.worlds else ():
            for variant, everywhere in variants(rule).items():
                # The flat tensors are float32, whatever the model is.
                if variant.dtype == torch.float32 and (everywhere or world in config.thorough):
                    found.append(Case(name, variant))
    return found
