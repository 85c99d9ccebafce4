"""The step of the parameters of matrix rules: direction, exchange, decay and apply."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_cwd import kernels
from hf_cwd.matrices import Layout
from hf_cwd.rules import RULES, Rule
from hf_cwd.rules.hyperparameters import checked
from hf_cwd.sharding.build import Source, build
from hf_cwd.sharding.dtensor import local, local_grad
from hf_cwd.sharding.exchange import Exchange
from hf_cwd.sharding.plan import EXCHANGE
from hf_cwd.sharding.stage import Stage


class Member(NamedTuple):
    """A parameter of a matrix rule, its group, and the arguments of the group's kernels."""

    param: Tensor
    name: str
    group: Mapping[str, Any]
    direction: Mapping[str, Any]
    decaying: Mapping[str, Any]

    @property
    def layout(self) -> Layout:
        return Layout() if self.group["layout"] is None else Layout(**self.group["layout"])


class MatrixStep:
    """Steps parameters whose matrices have to be whole; keeps the exchange that it made for them.

    Args:
        share, exchange_bytes: see :func:`hf_cwd.sharding.plan.plan`.

    Attributes:
        exchange: that of the last step, None before the first.
    """

    def __init__(self, share: str, exchange_bytes: int) -> None:
        self.share, self.exchange_bytes = share, exchange_bytes
        self.exchange: Exchange | None = None
        self._made_for: Any = None

    @classmethod
    def of(cls, rule: Rule, options: dict[str, Any]) -> "MatrixStep":
        """Takes its arguments out of an optimizer's ``options``; only those of a rule for matrices may have them."""
        given = {name: options.pop(name) for name in EXCHANGE if rule.matrix is not None and name in options}
        return cls(
            **{name: checked(rule.name, name, kind, given.get(name, kind.default)) for name, kind in EXCHANGE.items()}
        )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"exchange": None, "_made_for": None}  # a process group is not to be copied or pickled

    def __call__(
        self,
        members: Sequence[Member],
        advance: Callable[[Tensor, Mapping[str, Any]], tuple[int, list[Tensor]]],
        meanwhile: Callable[[], None],
    ) -> None:
        """One step.

        Args:
            members: the parameters, those without a gradient too; equal on all ranks.
            advance: gives, of a parameter and its group, this step's number and this rank's part of the buffers.
            meanwhile: work that needs no matrix, done while the first parts travel.
        """

        def direction(i: int) -> Tensor:
            p, _, group, arguments, _ = members[i]
            grad = torch.zeros_like(local(p)) if p.grad is None else local_grad(p)
            step, buffers = advance(p, group)
            kernel = kernels.select(group["kernel"], grad.device)
            return kernel.direction(RULES[group["algorithm"]], grad, buffers, step=step, **arguments)

        def apply(i: int, u: Tensor) -> None:
            p, _, group, arguments, decaying = members[i]
            # Matrices of one parameter can differ in shape, and so in scale: theirs is in the direction already.
            plain = members[i].layout == Layout()
            scale = RULES[group["algorithm"]].scale(p.shape, **arguments["hyper"]) if plain else 1.0
            kernels.select(group["kernel"], u.device).apply(local(p), u, scale=scale, **decaying)

        self._prepare(members)
        self.exchange.run([member.param.grad is not None for member in members], direction, apply, meanwhile)

    def _prepare(self, members: Sequence[Member]) -> None:
        """Makes the exchange at the first step, since FSDP2 swaps parameters before it, and again after a change."""
        stages = {id(m.group): Stage.of(m.group["algorithm"], m.direction["hyper"]) for m in members}
        made_for = [(id(m.param), m.layout, stages[id(m.group)]) for m in members]
        if made_for == self._made_for:
            return
        sources = []
        for member in members:
            dtype = kernels.select(member.group["kernel"], member.param.device).wide(member.param.dtype)
            sources.append(Source(member.param, member.name, member.layout, stages[id(member.group)], dtype))
        self.exchange = build(sources, share=self.share, exchange_bytes=self.exchange_bytes)
        self._made_for = made_for
