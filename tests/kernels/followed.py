"""A parameter that a kernel steps and the reference follows."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_cwd.kernels import interface
from tests.support.reference import arithmetic
from tests.support.reference.arithmetic import Stored

HYPER: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.95), "eps": 1e-8},
    "lion": {"betas": (0.9, 0.95)},
    "sgd": {"momentum": 0.9, "dampening": 0.0, "nesterov": False, "ema": False},
}
STATES = {"adamw": 2, "lion": 1, "sgd": 1}
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def settings(rule: str, **given: Any) -> interface.Settings:
    common = {"lr": 1e-2, "weight_decay": 0.1, "cautious": True, "mask": "ge", "maximize": False}
    own = {"hyper": tuple(HYPER[rule].items()), "kernel": "triton", "capturable": False}
    return interface.Settings(**(common | own | given))


def placed(stored: Stored, offset: int = 0) -> Tensor:
    """A tensor of these bits that starts ``offset`` elements into its memory."""
    bits = torch.from_numpy(stored.bits.view(f"i{stored.bits.itemsize}"))
    memory = torch.empty(len(bits) + offset, dtype=bits.dtype)
    memory[offset:] = bits
    return memory[offset:].view(TORCH[stored.dtype])


class Followed:
    """A parameter, and what the reference says of it."""

    def __init__(self, rule: str, n: int, *, seed: int, dtype: str = "float32", offset: int = 0, **given: Any) -> None:
        self.rule, self.settings, self.steps, self.offset = rule, settings(rule, **given), 0, offset
        self.rng, self.dtype = np.random.default_rng(seed), dtype
        self.right = Stored.of(self.rng.normal(0, 0.05, n), dtype)
        self.right_states = [Stored.of(np.zeros(n), "float32") for _ in range(STATES[rule])]
        self.param = placed(self.right, offset)
        self.states = tuple(placed(state, offset) for state in self.right_states)
        self.grad = torch.empty(0)

    def item(self) -> interface.Item:
        """The next step's, with a gradient at another address; the reference makes that step."""
        self.steps += 1
        grad = Stored.of(self.rng.normal(0, 1e-2, len(self.right.bits)), self.dtype)
        self.grad = placed(grad, self.offset)
        named = {name: getattr(self.settings, name) for name in ("lr", "weight_decay", "cautious", "mask", "maximize")}
        given = arithmetic.Settings(dict(self.settings.hyper), self.steps, **named)
        u, self.right_states, finite = arithmetic.directed(self.rule, grad, self.right_states, given)
        result = arithmetic.stepped(self.right, None, u, self.right_states, given, finite)
        self.right, self.sums = result.param, result.sums
        return interface.Item(self.param, self.grad, self.states, None, self.steps, self.settings, self.param)

    def problems(self, name: Any = "") -> Iterator[str]:
        pairs = [(self.param, self.right), *zip(self.states, self.right_states, strict=True)]
        for k, (tensor, right) in enumerate(pairs):
            bits = tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32).numpy()
            if wrong := int((bits.view(right.bits.dtype) != right.bits).sum()):
                yield f"{name}: {wrong} of {len(bits)} elements of tensor {k} are wrong"
