"""The injected-gradients table: each parameter, layout, rule, option and pattern of gradients, and the cases they make.

The test and every rank derive the same cases from it.
"""

from typing import Any, NamedTuple

import torch

from hf_cwd.rules import RULES
from hf_cwd.rules.hyperparameters import Choice
from tests.support.comparison import VARIANTS

WORLDS = (1, 2, 3, 4)
STEPS = 3

# Shape of each parameter, and the layout of the matrices in it; None: one matrix, or none.
PARAMETERS: dict[str, tuple[tuple[int, ...], dict[str, Any] | None]] = {
    "up.weight": ((20, 12), None),
    "up.bias": ((20,), None),
    "down.weight": ((12, 20), None),
    "odd": ((7, 5), None),  # uneven everywhere
    "few": ((3, 64), None),  # fewer rows than 4 ranks
    "row": ((1, 9), None),
    "column": ((9, 1), None),
    "norm": ((5,), None),
    "gate_up": ((20, 6), {"sizes": (10, 10)}),
    "qkv": ((32, 8), {"sizes": (4, 8, 4), "periods": 2}),
    "conv1d": ((8, 24), {"sizes": (8, 8, 8), "transposed": True}),  # as in GPT-2
    "convolution": ((6, 2, 3, 3), {"flattened": True}),
    "experts": ((4, 10, 6), {}),
    "experts_gate_up": ((4, 12, 6), {"sizes": (6, 6)}),
}


class Variant(NamedTuple):
    """A rule, its options, and the dtype of the parameters."""

    rule: str
    options: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        options = [f"{name}={value}".replace(" ", "") for name, value in self.options]
        dtype = [] if self.dtype == torch.float32 else [str(self.dtype).removeprefix("torch.")]
        return ",".join([self.rule, *options, *dtype])


def variants(rule: str) -> dict[Variant, bool]:
    """Every variant of a rule, and whether it meets every layout; the others meet a layout of each kind."""
    everywhere = [Variant(rule)]
    options = [*VARIANTS.get(rule, []), {"mask": "gt"}, {"cautious": False}, {"maximize": True}]
    if RULES[rule].matrix is not None:
        # So small that every matrix has a round of its own; without it all of them share one.
        shared = {"share": "always"}
        everywhere += [
            Variant(rule, (("share", "never"),)),
            Variant(rule, (("share", "always"), ("exchange_bytes", 1))),
        ]
        options += [shared, {"exchange_bytes": 4096}]
        for name, kind in RULES[rule].hyperparameters.items():
            if isinstance(kind, Choice):
                options += [{name: choice, **shared} for choice in kind.choices]
    made = [Variant(rule, tuple(chosen.items())) for chosen in options]
    made += [Variant(rule, (), dtype) for dtype in (torch.bfloat16, torch.float64)]
    made += [Variant(rule, (("master", "remainder"),), torch.bfloat16)]
    made += [Variant(rule, (("state_dtype", "bfloat16"),))]
    return dict.fromkeys(made, False) | dict.fromkeys(everywhere, True)


class Layout(NamedTuple):
    """How the parameters are spread over ranks.

    Attributes:
        worlds: numbers of ranks.
        thorough: in which of them every variant meets it.
        matrices: whether rules for matrices can step so.
    """

    worlds: tuple[int, ...]
    thorough: tuple[int, ...] = ()
    matrices: bool = True


# By the names of the functions in injected_layouts.py that do it.
LAYOUTS: dict[str, Layout] = {
    "plain": Layout((1, 2, 3, 4), (2,)),
    "ddp": Layout((2, 3)),
    "replicated": Layout((2,)),
    "fsdp2": Layout((1, 2, 3, 4), (1, 2)),
    "fsdp2_columns": Layout((2,)),
    "tp": Layout((2, 3, 4), (2,)),
    "rows": Layout((2, 3)),
    "last": Layout((2, 3)),
    "packed": Layout((2, 3)),
    "whole_experts": Layout((2, 4)),
    # torch's full_tensor() and its placements contradict each other there: see injected_refusals.py.
    "reversed_ranks": Layout((2, 3), matrices=False),
    "mixed": Layout((2, 3)),
    "hsdp": Layout((4,), (4,)),
    "hsdp_crossed": Layout((4,)),
    "tp_tp_crossed": Layout((4,)),
    "fsdp2_tp": Layout((4,)),
    "tp_of_fsdp": Layout((4,)),
    "experts_fsdp2": Layout((4,)),
}

# Which gradients there are, see injected_ranks.gradients.
PATTERNS = ("given", "changing", "some_ranks", "nobody", "zero", "nan")


class Case(NamedTuple):
    layout: str
    variant: Variant
    pattern: str

    def __str__(self) -> str:
        return f"{self.layout}-{self.variant}-{self.pattern}"


def cases(world: int) -> list[Case]:
    found = []
    for name, layout in LAYOUTS.items():
        for rule in RULES.values() if world in layout.worlds else ():
            if layout.matrices or rule.matrix is None:
                met = [v for v, everywhere in variants(rule.name).items() if everywhere or world in layout.thorough]
                found += [Case(name, variant, "given") for variant in met]
                found += [Case(name, Variant(rule.name), pattern) for pattern in PATTERNS[1:]]
    return found
