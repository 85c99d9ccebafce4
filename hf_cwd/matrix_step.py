"""The step of the parameters of matrix rules: direction, exchange, decay and apply."""

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_cwd import kernels
from hf_cwd.kernels.base import Item, Settings
from hf_cwd.kernels.eager import wide
from hf_cwd.matrices import Layout
from hf_cwd.measure import StepStatistics
from hf_cwd.rules import RULES, Rule
from hf_cwd.rules.hyperparameters import checked
from hf_cwd.sharding.agree import digest
from hf_cwd.sharding.build import Source, build
from hf_cwd.sharding.dtensor import local
from hf_cwd.sharding.exchange import Exchange
from hf_cwd.sharding.plan import EXCHANGE, Plan
from hf_cwd.sharding.stage import Stage
from hf_cwd.sharding.staging import Staging
from hf_cwd.sharding.zero import FlatShard
from hf_cwd.states import advance, pieces


class Member(NamedTuple):
    """A parameter of a matrix rule, with or without a gradient, its group, and the group's settings in this step.

    Of DeepSpeed's flat tensors, ``flat`` says what lies in them; it is None for a parameter.
    """

    param: Tensor
    group: Mapping[str, Any]
    settings: Settings
    name: str
    flat: FlatShard | None = None

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
        scales: factors on its direction: a parameter's, or those of a flat tensor's fragments. Matrices of one
            parameter can differ in shape, and so in scale: theirs is in the direction already.
    """

    rule: Rule
    dtype: torch.dtype
    scales: tuple[float, ...]


class _Prepared(NamedTuple):
    """An exchange, what it was made for, and what the kernels are told of each member."""

    made_for: Any
    exchange: Exchange
    kinds: list[_Kind]
    caches: defaultdict[int, dict[Any, Any]]  # of the kernels, by the first member of a call


class MatrixStep:
    """Steps parameters whose matrices have to be whole; keeps the exchanges that it made for them.

    Args:
        share, exchange_bytes: see :func:`hf_cwd.sharding.plan.plan`.
    """

    def __init__(self, share: str, exchange_bytes: int) -> None:
        self.share, self.exchange_bytes = share, exchange_bytes
        self._staging = Staging()
        self._prepared: dict[int, _Prepared] = {}  # by the first parameter: DeepSpeed steps flat tensors in turn

    @classmethod
    def of(cls, rule: Rule, options: dict[str, Any]) -> "MatrixStep":
        """Takes its arguments out of an optimizer's ``options``; only those of a rule for matrices may have them."""
        given = {name: options.pop(name) for name in EXCHANGE if rule.matrix is not None and name in options}
        return cls(
            **{name: checked(rule.name, name, kind, given.get(name, kind.default)) for name, kind in EXCHANGE.items()}
        )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_prepared": {}}  # a process group is not to be copied or pickled

    @property
    def exchanges(self) -> list[Exchange]:
        """Those of the sets of parameters that were stepped, in the order in which they first were."""
        return [prepared.exchange for prepared in self._prepared.values()]

    def __call__(
        self,
        members: Sequence[Member],
        states: Mapping[Tensor, MutableMapping[str, Tensor]],
        statistics: StepStatistics | None,
        meanwhile: Callable[[], None],
    ) -> None:
        """One step.

        Args:
            members: equal on all ranks.
            states: the optimizer's.
            statistics: of this step, if they are wanted.
            meanwhile: work that needs no matrix, done while the first parts travel.
        """
        _, exchange, kinds, caches = self.prepare(members)
        items: dict[int, list[Item]] = {}

        def directions(wanted: Sequence[int], outs: Mapping[int, Tensor]) -> list[Tensor]:
            for _, some in groupby(wanted, lambda i: id(members[i].group)):
                some = list(some)
                first = members[some[0]]
                advanced = advance(states, [members[i].param for i in some], first.group, first.settings)
                for i, item in zip(some, advanced, strict=True):
                    flat = members[i].flat
                    items[i] = [item] if flat is None else pieces(item, flat.places)
            found, outs_of = {}, {}
            for i in wanted:
                param, made = local(members[i].param), outs.get(i)
                if made is None or made.device != param.device:  # offloaded: matrices are not where the parameter is
                    made = exchange.new_part(i, param, kinds[i].dtype)
                found[i] = made.view(param.shape)
                outs_of[i] = [found[i]] if members[i].flat is None else members[i].flat.cut(found[i])
            for rule, dtype in dict.fromkeys((kinds[i].rule, found[i].dtype) for i in wanted):
                some = [i for i in wanted if (kinds[i].rule, found[i].dtype) == (rule, dtype)]
                given = [item for i in some for item in items[i]], [out for i in some for out in outs_of[i]]
                kernels.directions(rule, *given, caches[some[0]])
            return [found[i] for i in wanted]

        def apply(wanted: Sequence[int], found: Sequence[Tensor]) -> None:
            if not wanted:
                return
            some, us = [], []
            for i, u in zip(wanted, found, strict=True):
                flat, own = members[i].flat, items.pop(i)
                some += own
                us += [u.view(own[0].param.shape)] if flat is None else flat.cut(u.view(-1))
            kernels.apply(some, us, [s for i in wanted for s in kinds[i].scales], statistics, caches[wanted[0]])

        def look(number: int, result: Tensor) -> None:
            job = exchange.plan.jobs[number]
            if (job.entry, job.matrix) == sampled:  # several replicas may have it
                statistics.add_matrix(key, result)

        if statistics is not None:
            key, sampled = _sampled(exchange.plan, statistics.sample)
            statistics.expect_matrix(key)
        present = [member.param.grad is not None for member in members]
        exchange.run(present, directions, apply, meanwhile, look if statistics is not None else None)

    def prepare(self, members: Sequence[Member]) -> _Prepared:
        """The exchange of these: made before the first step, since FSDP2 swaps parameters, and again after a change."""
        stages = {id(m.group): Stage.of(m.rule.name, dict(m.settings.hyper)) for m in members}
        made_for = [(id(m.param), m.layout, stages[id(m.group)]) for m in members]
        place = id(members[0].param)
        if place in self._prepared and self._prepared[place].made_for == made_for:
            return self._prepared[place]
        sources = []
        for member in members:
            direction, stage = wide(member.param.dtype), stages[id(member.group)]
            sources.append(Source(member.param, member.name, member.layout, stage, direction, member.flat))
        exchange = build(sources, share=self.share, exchange_bytes=self.exchange_bytes, staging=self._staging)
        kinds = [_kind(member, stages[id(member.group)], exchange.device.type) for member in members]
        if members[0].flat is None:
            self._prepared.clear()
        self._prepared[place] = _Prepared(made_for, exchange, kinds, defaultdict(dict))
        return self._prepared[place]


def _kind(member: Member, stage: Stage, device: str) -> _Kind:
    flat, p = member.flat, member.param
    shapes = [tuple(p.shape)] if flat is None else [flat.params[fragment.param].shape for fragment in flat.fragments]
    scales = tuple(stage.scale(shape) if member.layout == Layout() else 1.0 for shape in shapes)
    return _Kind(member.rule, stage.wire(wide(p.dtype), device), scales)


def _sampled(plan: Plan, sample: int) -> tuple[int, tuple[int, int]]:
    """One of the matrices, by entry and number within it: by names, so that every layout takes the same.

    Also a number by which that of several exchanges is chosen.
    """
    key, entry = min((digest((entry.name, sample)), number) for number, entry in enumerate(plan.entries))
    return key, (entry, key % (1 + max(job.matrix for job in plan.jobs if job.entry == entry)))
