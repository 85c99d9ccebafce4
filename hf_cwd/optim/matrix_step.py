"""The step of the parameters of matrix rules: direction, exchange, decay and apply."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_cwd import kernels
from hf_cwd.distributed import rank_groups, replicas
from hf_cwd.distributed.build import Source, build
from hf_cwd.distributed.collectives import digest
from hf_cwd.distributed.deepspeed_zero import FlatShard
from hf_cwd.distributed.dtensor import is_dtensor, local, local_grad
from hf_cwd.distributed.exchange import Exchange, Matrices
from hf_cwd.distributed.matrix_stage import Stage
from hf_cwd.distributed.pinned_memory import Staging
from hf_cwd.distributed.plan import EXCHANGE, Entry, Plan
from hf_cwd.distributed.rank_groups import RankGroup
from hf_cwd.distributed.schedule import Batch, Round
from hf_cwd.kernels.eager import wide
from hf_cwd.kernels.interface import Item, Settings, Workspace
from hf_cwd.newton_schulz.matrices import MatrixLayout
from hf_cwd.optim.original_params import Origins
from hf_cwd.optim.state import advance, pieces
from hf_cwd.optim.statistics import StepStatistics
from hf_cwd.rules import RULES, Rule
from hf_cwd.rules.hyperparameters import checked

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


States = Mapping[Tensor, MutableMapping[str, Tensor]]


class Member(NamedTuple):
    """A parameter of a matrix rule, with or without a gradient, its group, and the group's settings in this step.

    ``position`` is its place in the group. Of DeepSpeed's flat tensors, ``flat`` says what lies in them; it is None for
    a parameter.
    """

    param: Tensor
    position: int
    group: Mapping[str, Any]
    settings: Settings
    flat: FlatShard | None = None

    @property
    def rule(self) -> Rule:
        return RULES[self.group["algorithm"]]

    @property
    def layout(self) -> MatrixLayout:
        return MatrixLayout() if self.group["layout"] is None else MatrixLayout(**self.group["layout"])


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


@dataclass
class PreparedExchange:
    """An exchange among the ranks of one group, and what it was made for.

    Attributes:
        made_for: what it depends on, of each parameter; another value takes another exchange.
        kinds: what the kernels are told of each.
        shared: parameters of which one rank works for several replicas.
        numbers: the places of its parameters among the members.
        steps: how many it has made.
        workspaces: of the kernels, by the first member of a call.
    """

    made_for: list[tuple[int, Stage, MatrixLayout]]
    exchange: Exchange
    kinds: list[_Kind]
    shared: list[Entry]
    numbers: list[int] = field(default_factory=list)
    steps: int = 0
    workspaces: defaultdict[int, Workspace] = field(default_factory=lambda: defaultdict(Workspace))


class MatrixStep:
    """Steps parameters whose matrices have to be whole; keeps the exchanges that it made for them.

    Which ranks work together is read off the parameters: those of a DTensor's mesh, or of DeepSpeed's group. A plain
    tensor is its rank's own, unless it is known to be replicated: by :meth:`mark_replicated`, or since ``share`` is
    "always".

    Args:
        origins: those of the optimizer's groups.
        share, exchange_bytes: see :func:`hf_cwd.distributed.plan.plan`.
        process_group: the ranks that hold plain tensors as replicas; None is the world.
    """

    def __init__(
        self, origins: Origins, *, share: str, exchange_bytes: int, process_group: "ProcessGroup | None" = None
    ) -> None:
        self.share, self.exchange_bytes = share, exchange_bytes
        self._origins = origins
        self._replica_group = None if process_group is None else rank_groups.of(process_group)
        self._replicated: frozenset[Tensor] = frozenset()
        self._staging = Staging()
        # By the first parameter, since DeepSpeed steps flat tensors in turn: what was asked for, and the exchanges.
        self._prepared: dict[int, tuple[Any, list[PreparedExchange]]] = {}

    @classmethod
    def of(cls, origins: Origins, rule: Rule, options: dict[str, Any]) -> "MatrixStep":
        """Takes its arguments out of an optimizer's ``options``; only those of a rule for matrices may have them."""
        if rule.matrix is None:
            return cls(origins, **{name: kind.default for name, kind in EXCHANGE.items()})
        given = {name: options.pop(name, kind.default) for name, kind in EXCHANGE.items()}
        values = {name: checked(rule.name, name, EXCHANGE[name], value) for name, value in given.items()}
        return cls(origins, process_group=options.pop("process_group", None), **values)

    def __getstate__(self) -> dict[str, Any]:
        # A process group is not to be copied or pickled, and other parameters are not known to be replicated.
        if self._replica_group is not None:
            raise TypeError("an optimizer with a process_group cannot be copied or pickled: make another one")
        return vars(self) | {"_prepared": {}, "_replicated": frozenset()}

    def mark_replicated(self, params: Iterable[Tensor]) -> None:
        """Says that these plain tensors, and no others, are replicas with equal gradients on all ranks of the group."""
        self._replicated = frozenset(params)
        self._prepared.clear()

    @property
    def exchanges(self) -> list[Exchange]:
        """Those of the sets of parameters that were stepped, in the order in which they first were."""
        return [prepared.exchange for _, some in self._prepared.values() for prepared in some]

    def __call__(
        self,
        members: Sequence[Member],
        states: States,
        statistics: StepStatistics | None,
        meanwhile: Callable[[], None],
    ) -> None:
        """One step.

        Args:
            members: of each group of ranks, equal on all of them.
            states: the optimizer's.
            statistics: of this step, if they are wanted.
            meanwhile: work that needs no matrix, done while the first parts travel.

        Raises:
            ValueError: replicas that are none; nothing has changed then.
            RuntimeError: another rank ended, or did not call it.
        """
        prepared = self.prepare(members)
        for one in prepared:
            if one.shared and one.steps % replicas.EVERY == 0:
                _compare(one, members, states)
            one.steps += 1
        first = next((one for one in prepared if one.exchange.plan.rounds), prepared[0])
        for one in prepared:
            loop = MatrixLoop(one, members, self._origins, states, statistics)
            loop.run(meanwhile if one is first else _nothing)

    def prepare(self, members: Sequence[Member]) -> list[PreparedExchange]:
        """The exchanges of these, one for each group of ranks, in the order in which all ranks go through groups.

        They are made before the first step, since FSDP2 swaps parameters, and again after a change.
        """
        stages = []
        for _, some in groupby(members, lambda member: id(member.group)):
            first, *others = some
            stages.append((Stage.of(first.rule.name, dict(first.settings.hyper)), first.layout, 1 + len(others)))
        wanted = ([id(member.param) for member in members], stages)
        place = id(members[0].param)
        old, exchanges = self._prepared.get(place, (None, []))
        if old == wanted:
            return exchanges
        known = {one.exchange.group: one for one in exchanges}
        each = [stage for *stage, count in stages for _ in range(count)]
        meshes = rank_groups.of_meshes(m.param.device_mesh for m in members if is_dtensor(m.param))
        together: dict[RankGroup, list[int]] = {}
        for number, member in enumerate(members):
            together.setdefault(self._group_of(member, meshes), []).append(number)
        result = []
        for group, numbers in sorted(together.items()):
            made_for = [(id(members[number].param), *each[number]) for number in numbers]
            if group not in known or known[group].made_for != made_for:
                known[group] = self._made([members[number] for number in numbers], group, made_for)
            known[group].numbers = numbers
            result.append(known[group])
        if members[0].flat is None:
            self._prepared.clear()
        self._prepared[place] = (wanted, result)
        return result

    def _group_of(self, member: Member, meshes: Mapping[Any, RankGroup]) -> RankGroup:
        """The ranks that hold parts or replicas of a member."""
        if member.flat is not None:
            return rank_groups.of(None)
        if is_dtensor(member.param):
            return meshes[member.param.device_mesh]
        if self.share == "always" or (self.share == "auto" and member.param in self._replicated):
            return self._replica_group or rank_groups.of(None)
        return rank_groups.alone()

    def _made(
        self, members: Sequence[Member], group: RankGroup, made_for: list[tuple[int, Stage, MatrixLayout]]
    ) -> PreparedExchange:
        sources = [
            Source(
                member.param,
                self._origins.describe(member.param, member.position, member.group),
                layout,
                stage,
                wide(member.param.dtype),
                member.flat,
            )
            for member, (_, stage, layout) in zip(members, made_for, strict=True)
        ]
        exchange = build(sources, group, share=self.share, exchange_bytes=self.exchange_bytes, staging=self._staging)
        kinds = [_kind(m, s.stage, exchange.device.type) for m, s in zip(members, sources, strict=True)]
        return PreparedExchange(made_for, exchange, kinds, replicas.shared_entries(exchange.plan))


def _compare(prepared: PreparedExchange, members: Sequence[Member], states: States) -> None:
    """Compares what directions are going to be computed from, of the replicas that one rank works for."""
    tensors: dict[int, dict[str, Tensor | None]] = {}
    for source in (entry.source for entry in prepared.shared):
        member = members[prepared.numbers[source]]
        param, kept = member.param, states.get(member.param, {})
        tensors[source] = {"weights": local(param), "gradients": None if param.grad is None else local_grad(param)}
        for key in member.rule.state_keys(member.group):
            tensors[source][f"states {key}"] = local(kept[key]) if key in kept else None
    exchange = prepared.exchange
    replicas.compare(
        prepared.shared, tensors, rank=rank_groups.alone().ranks[0], group=exchange.group, device=exchange.device
    )


class MatrixLoop:
    """One step of the members of one exchange. Every rank of its group must run it.

    Args:
        prepared: the exchange.
        members: all that the optimizer steps.
        origins, states, statistics: the optimizer's.
    """

    def __init__(
        self,
        prepared: PreparedExchange,
        members: Sequence[Member],
        origins: Origins,
        states: States,
        statistics: StepStatistics | None,
    ) -> None:
        self._exchange, self._kinds, self._workspaces = prepared.exchange, prepared.kinds, prepared.workspaces
        self._members = [members[number] for number in prepared.numbers]
        self._origins, self._states, self._statistics = origins, states, statistics
        self._present = [member.param.grad is not None for member in self._members]
        self._items: dict[int, list[Item]] = {}  # by source, from its direction to its update
        self._sampled: tuple[int, tuple[int, int]] | None = None

    def run(self, meanwhile: Callable[[], None]) -> None:
        """Directions, gather, orthogonalise, return, apply: round by round, so that two rounds of buffers are alive.

        While a round is orthogonalised, first the results of the one before travel back, then the parts of the one
        after come in::

            this rank   | orthogonalise first half of k | orthogonalise second half of k | ...
            the network | results of k - 1 return       | parts of k + 1 come in         | ...

        Args:
            meanwhile: work that needs no matrix, done while the first round travels.

        Raises:
            RuntimeError: another rank ended, or did not join in time; the message names the round.
        """
        exchange, schedule = self._exchange, self._exchange.schedule
        if self._statistics is not None:
            self._sampled = _sampled(exchange.plan, self._statistics.sample)
            self._statistics.expect_matrix(self._sampled[0], exchange.group, exchange.device)
        self._step = step = exchange.start(self._present)
        rounds = schedule.rounds
        incoming = outgoing = None
        if rounds:
            self._directions(schedule.begins[0])
            incoming = step.gather(0)
        meanwhile()
        for sources, resident in schedule.resident:
            self._orthogonalize_resident(resident, sources)
            self._apply(sources)
        if rounds:
            self._orthogonalize_resident(schedule.beside[0])
        for k, round_ in enumerate(rounds):
            matrices = step.whole(k, incoming)
            incoming = None  # frees its buffers before the next ones are made
            self._orthogonalize(round_.first, matrices)
            if k > 0:
                step.take_back(k - 1, outgoing)
                outgoing = None
                self._apply(schedule.ends[k - 1])
            if k + 1 < len(rounds):
                self._directions(schedule.begins[k + 1])
                incoming = step.gather(k + 1)
                self._orthogonalize_resident(schedule.beside[k + 1])
            self._orthogonalize(round_.second, matrices)
            outgoing = step.give_back(k, matrices)
            del matrices
        if rounds:
            step.take_back(len(rounds) - 1, outgoing)
            self._apply(schedule.ends[-1])
        step.finish()

    def _directions(self, sources: Sequence[int], outs: Mapping[int, Tensor] = MappingProxyType({})) -> None:
        """This rank's parts of the directions of sources, into the step's parts.

        Args:
            outs: where to write those of some sources, if that is on their device: it saves a copy.
        """
        sources = [source for source in sources if source not in self._step.absent]
        self._advance(sources)
        directions: dict[int, Tensor] = {}
        for i in sources:
            param, out = local(self._members[i].param), outs.get(i)
            if out is None or out.device != param.device:  # offloaded: matrices are not where the parameter is
                out = self._exchange.new_part(i, param, self._kinds[i].dtype)
            directions[i] = out.view(param.shape)
        for rule, dtype in dict.fromkeys((self._kinds[i].rule, directions[i].dtype) for i in sources):
            alike = [i for i in sources if (self._kinds[i].rule, directions[i].dtype) == (rule, dtype)]
            items = [item for i in alike for item in self._items[i]]
            cut = [out for i in alike for out in self._cut(i, directions[i])]
            kernels.directions(rule, items, cut, self._workspaces[alike[0]], self._describe)
        self._step.parts.update(directions)

    def _advance(self, sources: Sequence[int]) -> None:
        """Counts a step of each source, and keeps what the kernels are given of it."""
        members = self._members
        for _, some in groupby(sources, lambda i: id(members[i].group)):
            some = list(some)
            first = members[some[0]]
            advanced = advance(self._states, [members[i].param for i in some], first.group, first.settings)
            for i, item in zip(some, advanced, strict=True):
                flat = members[i].flat
                self._items[i] = [item] if flat is None else pieces(item, flat.places)

    def _orthogonalize_resident(self, rounds: Sequence[Round], sources: Sequence[int] = ()) -> None:
        """Orthogonalises matrices that do not move, once there are directions of ``sources``.

        A parameter that is one matrix has its direction written where the matrix lies.
        """
        if not rounds:
            self._directions(sources)
        for number, round_ in enumerate(rounds):
            matrices = self._step.allocate(round_)
            if number == 0:
                self._directions(sources, {source: matrices[part.job] for source, part in round_.whole.items()})
            self._step.fill(round_, matrices)
            self._orthogonalize(round_.second, matrices)
            self._step.keep(round_, matrices)

    def _orthogonalize(self, batches: Sequence[Batch], matrices: Matrices) -> None:
        for batch in batches:
            result = batch.stage(matrices.stacks.pop(batch.jobs[0])).to(batch.dtype)
            matrices.update(zip(batch.jobs, result, strict=True))
            if self._sampled is not None:
                self._look(batch, result)

    def _look(self, batch: Batch, result: Tensor) -> None:
        """Shows the statistics the matrix that they are of; several replicas may have it."""
        key, sampled = self._sampled
        plan = self._exchange.plan
        for number, matrix in zip(batch.jobs, result, strict=True):
            job = plan.jobs[number]
            if (job.entry, job.matrix) == sampled and plan.entries[job.entry].source not in self._step.absent:
                self._statistics.add_matrix(key, matrix)

    def _apply(self, sources: Sequence[int]) -> None:
        """Decays and updates this rank's parts of the parameters, by the orthogonalised directions."""
        sources = [source for source in sources if source not in self._step.absent]
        if not sources:
            return
        items: list[Item] = []
        directions: list[Tensor] = []
        for i in sources:
            items += self._items.pop(i)
            directions += self._cut(i, self._step.parts.pop(i))
        scales = [scale for i in sources for scale in self._kinds[i].scales]
        kernels.apply(items, directions, scales, self._statistics, self._workspaces[sources[0]], self._describe)

    def _cut(self, source: int, direction: Tensor) -> list[Tensor]:
        """A source's direction, cut as its items are."""
        flat, param = self._members[source].flat, self._members[source].param
        return [direction.view(local(param).shape)] if flat is None else flat.cut(direction.view(-1))

    def _describe(self, param: Tensor) -> str:
        member = next(member for member in self._members if member.param is param)
        return self._origins.describe(param, member.position, member.group)


def _nothing() -> None:
    pass


def _kind(member: Member, stage: Stage, device: str) -> _Kind:
    flat, p = member.flat, member.param
    shapes = [tuple(p.shape)] if flat is None else [flat.params[fragment.param].shape for fragment in flat.fragments]
    scales = tuple(stage.scale(shape) if member.layout == MatrixLayout() else 1.0 for shape in shapes)
    return _Kind(member.rule, stage.wire(wide(p.dtype), device), scales)


def _sampled(plan: Plan, sample: int) -> tuple[int, tuple[int, int]]:
    """One of the matrices, by entry and number within it: by names, so that every layout takes the same.

    Also a number by which that of several exchanges is chosen.
    """
    key, entry = min((digest((entry.name, sample)), number) for number, entry in enumerate(plan.entries))
    return key, (entry, key % (1 + max(job.matrix for job in plan.jobs if job.entry == entry)))
