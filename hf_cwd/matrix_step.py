"""The step of the parameters of matrix rules: direction, exchange, decay and apply."""

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_cwd import kernels
from hf_cwd.decay import DecayCount
from hf_cwd.kernels.base import Item, Settings
from hf_cwd.kernels.eager import wide
from hf_cwd.matrices import Layout
from hf_cwd.rules import RULES, Rule
from hf_cwd.rules.hyperparameters import checked
from hf_cwd.sharding.build import Source, build
from hf_cwd.sharding.exchange import Exchange
from hf_cwd.sharding.plan import EXCHANGE
from hf_cwd.sharding.stage import Stage
from hf_cwd.states import advance


class Member(NamedTuple):
    """A parameter of a matrix rule, with or without a gradient, its group, and the group's settings in this step."""

    param: Tensor
    group: Mapping[str, Any]
    settings: Settings
    name: str

    @property
    def rule(self) -> Rule:
        return RULES[self.group["algorithm"]]

    @property
    def layout(self) -> Layout:
        return Layout() if self.group["layout"] is None else Layout(**self.group["layout"])


class _Kind(NamedTuple):
    """What the kernels are told of a member.

    Attributes:
        rule: its rule.
        dtype: of its directions: that in which they travel and are orthogonalised.
        scale: factor on its direction. Matrices of one parameter can differ in shape, and so in scale: theirs is in the
            direction already.
    """

    rule: Rule
    dtype: torch.dtype
    scale: float


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
        self._kinds: list[_Kind] = []
        self._caches: dict[int, dict[Any, Any]] = defaultdict(dict)  # of the kernels, by the first member of a call

    @classmethod
    def of(cls, rule: Rule, options: dict[str, Any]) -> "MatrixStep":
        """Takes its arguments out of an optimizer's ``options``; only those of a rule for matrices may have them."""
        given = {name: options.pop(name) for name in EXCHANGE if rule.matrix is not None and name in options}
        return cls(
            **{name: checked(rule.name, name, kind, given.get(name, kind.default)) for name, kind in EXCHANGE.items()}
        )

    def __getstate__(self) -> dict[str, Any]:
        # A process group is not to be copied or pickled.
        return vars(self) | {"exchange": None, "_made_for": None, "_kinds": [], "_caches": defaultdict(dict)}

    def __call__(
        self,
        members: Sequence[Member],
        states: Mapping[Tensor, MutableMapping[str, Tensor]],
        count: DecayCount | None,
        meanwhile: Callable[[], None],
    ) -> None:
        """One step.

        Args:
            members: equal on all ranks.
            states: the optimizer's.
            count: see :class:`hf_cwd.decay.DecayCount`.
            meanwhile: work that needs no matrix, done while the first parts travel.
        """
        items: dict[int, Item] = {}

        def directions(wanted: Sequence[int], outs: Mapping[int, Tensor]) -> list[Tensor]:
            for _, some in groupby(wanted, lambda i: id(members[i].group)):
                some = list(some)
                first = members[some[0]]
                found = advance(states, [members[i].param for i in some], first.group, first.settings)
                items.update(zip(some, found, strict=True))
            found = {}
            for i in wanted:
                shape, kind = items[i].param.shape, self._kinds[i]
                device, made = items[i].param.device, outs.get(i)
                if made is None or made.device != device:  # offloaded: matrices are not where the parameter is
                    made = torch.empty(shape, dtype=kind.dtype, device=device)
                found[i] = made.view(shape)
            for rule, dtype in dict.fromkeys((self._kinds[i].rule, found[i].dtype) for i in wanted):
                some = [i for i in wanted if (self._kinds[i].rule, found[i].dtype) == (rule, dtype)]
                given = [items[i] for i in some], [found[i] for i in some]
                kernels.directions(rule, *given, self._caches[some[0]])
            return [found[i] for i in wanted]

        def apply(wanted: Sequence[int], found: Sequence[Tensor]) -> None:
            if not wanted:
                return
            some = [items.pop(i) for i in wanted]
            found = [u.view(item.param.shape) for item, u in zip(some, found, strict=True)]
            kernels.apply(some, found, [self._kinds[i].scale for i in wanted], count, self._caches[wanted[0]])

        self._prepare(members)
        self.exchange.run([member.param.grad is not None for member in members], directions, apply, meanwhile)

    def _prepare(self, members: Sequence[Member]) -> None:
        """Makes the exchange at the first step, since FSDP2 swaps parameters before it, and again after a change."""
        stages = {id(m.group): Stage.of(m.rule.name, dict(m.settings.hyper)) for m in members}
        made_for = [(id(m.param), m.layout, stages[id(m.group)]) for m in members]
        if made_for == self._made_for:
            return
        sources = []
        for member in members:
            direction, stage = wide(member.param.dtype), stages[id(member.group)]
            sources.append(Source(member.param, member.name, member.layout, stage, direction))
        self.exchange = build(sources, share=self.share, exchange_bytes=self.exchange_bytes)
        self._kinds = [_kind(member, stages[id(member.group)]) for member in members]
        self._caches.clear()
        self._made_for = made_for


def _kind(member: Member, stage: Stage) -> _Kind:
    p = member.param
    scale = stage.scale(tuple(p.shape)) if member.layout == Layout() else 1.0
    return _Kind(member.rule, stage.wire(wide(p.dtype), p.device.type), scale)
