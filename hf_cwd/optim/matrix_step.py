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
from hf_cwd.distributed import local_view, rank_groups, replicas
from hf_cwd.distributed.build import Source, build
from hf_cwd.distributed.collectives import digest
from hf_cwd.distributed.exchange import Exchange, Matrices
from hf_cwd.distributed.local_view import LocalView
from hf_cwd.distributed.matrix_stage import Stage
from hf_cwd.distributed.pinned_memory import Staging
from hf_cwd.distributed.plan import EXCHANGE, Entry, Plan
from hf_cwd.distributed.rank_groups import RankGroup
from hf_cwd.distributed.schedule import Batch, Round
from hf_cwd.kernels.eager import wide
from hf_cwd.kernels.interface import Item, Settings, Workspace
from hf_cwd.newton_schulz.matrices import MatrixLayout
from hf_cwd.optim.original_params import OriginalParams
from hf_cwd.optim.state import advance, pieces
from hf_cwd.optim.statistics import StepStatistics
from hf_cwd.rules import RULES, Rule
from hf_cwd.rules.hyperparameters import checked

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


States = Mapping[Tensor, MutableMapping[str, Tensor]]


class MatrixParam(NamedTuple):
    """A tensor in a group of a matrix rule, with or without a gradient.

    Attributes:
        view: what this rank holds of it.
        position: its place in the group.
        settings: the group's in this step.
    """

    view: LocalView
    position: int
    group: Mapping[str, Any]
    settings: Settings

    @property
    def tensor(self) -> Tensor:
        return self.view.param

    @property
    def rule(self) -> Rule:
        return RULES[self.group["algorithm"]]

    @property
    def layout(self) -> MatrixLayout:
        return MatrixLayout() if self.group["layout"] is None else MatrixLayout(**self.group["layout"])


class _KernelSpec(NamedTuple):
    """What the kernels need to know of a tensor.

    Attributes:
        rule: its rule.
        dtype: of its directions: that in which they travel and are orthogonalised.
        scales: factors on its direction: a parameter's, or those of the parts in a flat tensor. Matrices of one
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
        specs: what the kernels need to know of each.
        shared: parameters of which one rank works for several replicas.
        numbers: the places of its parameters among all that the optimizer steps.
        steps: how many it has made.
        workspaces: of the kernels, by the first parameter of a call.
    """

    made_for: list[tuple[int, Stage, MatrixLayout]]
    exchange: Exchange
    specs: list[_KernelSpec]
    shared: list[Entry]
    numbers: list[int] = field(default_factory=list)
    steps: int = 0
    workspaces: defaultdict[int, Workspace] = field(default_factory=lambda: defaultdict(Workspace))


class MatrixStep:
    """Steps parameters whose matrices have to be whole; keeps the exchanges that it made for them.

    The parameters say which ranks work together: those of a DTensor's mesh, or of DeepSpeed's group. A plain tensor is
    its rank's own unless it is known to be replicated: by :meth:`mark_replicated`, or if ``share`` is "always".

    Args:
        originals: what the optimizer's groups were made of.
        share, exchange_bytes: see :func:`hf_cwd.distributed.plan.plan`.
        process_group: the ranks that hold plain tensors as replicas; None is the world.
    """

    def __init__(
        self, originals: OriginalParams, *, share: str, exchange_bytes: int, process_group: "ProcessGroup | None" = None
    ) -> None:
        self.share, self.exchange_bytes = share, exchange_bytes
        self._originals = originals
        self._replica_group = None if process_group is None else rank_groups.of(process_group)
        self._replicated: frozenset[Tensor] = frozenset()
        self._staging = Staging()
        # By the first parameter, since DeepSpeed steps flat tensors in turn: what was asked for, and the exchanges.
        self._prepared: dict[int, tuple[Any, list[PreparedExchange]]] = {}

    @classmethod
    def of(cls, originals: OriginalParams, rule: Rule, options: dict[str, Any]) -> "MatrixStep":
        """Takes its arguments out of an optimizer's ``options``; only those of a rule for matrices may have them."""
        if rule.matrix is None:
            return cls(originals, **{name: kind.default for name, kind in EXCHANGE.items()})
        given = {name: options.pop(name, kind.default) for name, kind in EXCHANGE.items()}
        values = {name: checked(rule.name, name, EXCHANGE[name], value) for name, value in given.items()}
        return cls(originals, process_group=options.pop("process_group", None), **values)

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
        params: Sequence[MatrixParam],
        states: States,
        statistics: StepStatistics | None,
        meanwhile: Callable[[], None],
    ) -> None:
        """One step.

        Args:
            params: of each group of ranks, equal on all of them.
            states: the optimizer's.
            statistics: of this step, if they are wanted.
            meanwhile: work that needs no matrix, done while the first parts travel.

        Raises:
            ValueError: replicas whose weights, gradients or states differ; nothing has changed then.
            RuntimeError: another rank ended, or did not call it.
        """
        prepared = self.prepare(params)
        for one in prepared:
            if one.shared and one.steps % replicas.EVERY == 0:
                _compare(one, params, states)
            one.steps += 1
        first = next((one for one in prepared if one.exchange.plan.rounds), prepared[0])
        for one in prepared:
            loop = MatrixLoop(one, params, self._originals, states, statistics)
            loop.run(meanwhile if one is first else _nothing)

    def prepare(self, params: Sequence[MatrixParam]) -> list[PreparedExchange]:
        """The exchanges of these, one for each group of ranks, in the order in which all ranks go through groups.

        They are made before the first step, since FSDP2 swaps parameters, and again after a change.
        """
        stages = []
        for _, some in groupby(params, lambda param: id(param.group)):
            first, *others = some
            stages.append((Stage.of(first.rule.name, dict(first.settings.hyper)), first.layout, 1 + len(others)))
        wanted = ([id(param.tensor) for param in params], stages)
        place = id(params[0].tensor)
        old, exchanges = self._prepared.get(place, (None, []))
        if old == wanted:
            return exchanges
        by_group = {one.exchange.group: one for one in exchanges}
        each = [stage for *stage, count in stages for _ in range(count)]
        result = []
        for group, numbers in self._together(params):
            made_for = [(id(params[number].tensor), *each[number]) for number in numbers]
            if group not in by_group or by_group[group].made_for != made_for:
                by_group[group] = self._made([params[number] for number in numbers], group, made_for)
            by_group[group].numbers = numbers
            result.append(by_group[group])
        if not params[0].view.is_flat:
            self._prepared.clear()
        self._prepared[place] = (wanted, result)
        return result

    def _together(self, params: Sequence[MatrixParam]) -> list[tuple[RankGroup, list[int]]]:
        """The groups of ranks that hold parts or replicas, in order, each with the places of its parameters."""
        meshes = local_view.of_meshes([param.view for param in params])
        numbers: dict[RankGroup, list[int]] = {}
        for number, param in enumerate(params):
            is_replica = self.share == "always" or (self.share == "auto" and param.tensor in self._replicated)
            group = param.view.ranks(meshes)
            if is_replica and type(param.view) is LocalView:
                group = self._replica_group or rank_groups.of(None)
            numbers.setdefault(group, []).append(number)
        return sorted(numbers.items())

    def _made(
        self, params: Sequence[MatrixParam], group: RankGroup, made_for: list[tuple[int, Stage, MatrixLayout]]
    ) -> PreparedExchange:
        sources = [
            Source(
                param.view,
                self._originals.describe(param.tensor, param.position, param.group),
                layout,
                stage,
                wide(param.tensor.dtype),
            )
            for param, (_, stage, layout) in zip(params, made_for, strict=True)
        ]
        exchange = build(sources, group, share=self.share, exchange_bytes=self.exchange_bytes, staging=self._staging)
        specs = [_kernel_spec(p, s.stage, exchange.device.type) for p, s in zip(params, sources, strict=True)]
        return PreparedExchange(made_for, exchange, specs, replicas.shared_entries(exchange.plan))


def _compare(prepared: PreparedExchange, params: Sequence[MatrixParam], states: States) -> None:
    """Compares replicas that one rank works for: their weights, gradients and states."""
    tensors: dict[int, dict[str, Tensor | None]] = {}
    for source in (entry.source for entry in prepared.shared):
        param = params[prepared.numbers[source]]
        view, state = param.view, states.get(param.tensor, {})
        tensors[source] = {"weights": view.local(param.tensor), "gradients": view.local_grad()}
        for key in param.rule.state_keys(param.group):
            tensors[source][f"states {key}"] = view.local(state[key]) if key in state else None
    exchange = prepared.exchange
    replicas.compare(
        prepared.shared, tensors, rank=rank_groups.alone().ranks[0], group=exchange.group, device=exchange.device
    )


class MatrixLoop:
    """One step of the parameters of one exchange. Every rank of its group must run it.

    Args:
        prepared: the exchange.
        params: all that the optimizer steps.
        originals, states, statistics: the optimizer's.
    """

    def __init__(
        self,
        prepared: PreparedExchange,
        params: Sequence[MatrixParam],
        originals: OriginalParams,
        states: States,
        statistics: StepStatistics | None,
    ) -> None:
        self._exchange, self._specs, self._workspaces = prepared.exchange, prepared.specs, prepared.workspaces
        self._params = [params[number] for number in prepared.numbers]
        self._originals, self._states, self._statistics = originals, states, statistics
        self._present = [param.tensor.grad is not None for param in self._params]
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
            part, out = self._local(i), outs.get(i)
            if out is None or out.device != part.device:  # offloaded: matrices are not where the parameter is
                out = self._exchange.new_part(i, part, self._specs[i].dtype)
            directions[i] = out.view(part.shape)
        for rule, dtype in dict.fromkeys((self._specs[i].rule, directions[i].dtype) for i in sources):
            alike = [i for i in sources if (self._specs[i].rule, directions[i].dtype) == (rule, dtype)]
            items = [item for i in alike for item in self._items[i]]
            cut = [out for i in alike for out in self._cut(i, directions[i])]
            kernels.directions(rule, items, cut, self._workspaces[alike[0]], self._describe)
        self._step.parts.update(directions)

    def _advance(self, sources: Sequence[int]) -> None:
        """Counts a step of each source, and keeps what the kernels are given of it."""
        params = self._params
        for _, some in groupby(sources, lambda i: id(params[i].group)):
            some = list(some)
            first = params[some[0]]
            advanced = advance(self._states, [params[i].view for i in some], first.group, first.settings)
            for i, item in zip(some, advanced, strict=True):
                self._items[i] = pieces(item, params[i].view.split)

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
        """Gives the statistics the sampled matrix, if it is in this batch. Several replicas may have it."""
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
        scales = [scale for i in sources for scale in self._specs[i].scales]
        kernels.apply(items, directions, scales, self._statistics, self._workspaces[sources[0]], self._describe)

    def _cut(self, source: int, direction: Tensor) -> list[Tensor]:
        """A source's direction, cut as its items are."""
        return self._params[source].view.split(direction.view(self._local(source).shape))

    def _local(self, source: int) -> Tensor:
        view = self._params[source].view
        return view.local(view.param)

    def _describe(self, tensor: Tensor) -> str:
        param = next(param for param in self._params if param.tensor is tensor)
        return self._originals.describe(tensor, param.position, param.group)


def _nothing() -> None:
    pass


def _kernel_spec(param: MatrixParam, stage: Stage, device: str) -> _KernelSpec:
    scales = tuple(stage.scale(shape) if param.layout == MatrixLayout() else 1.0 for shape in param.view.shapes)
    return _KernelSpec(param.rule, stage.wire(wide(param.tensor.dtype), device), scales)


def _sampled(plan: Plan, sample: int) -> tuple[int, tuple[int, int]]:
    """One of the matrices, by entry and number within it: by names, so that every layout takes the same.

    Also a number by which that of several exchanges is chosen.
    """
    key, entry = min((digest((entry.name, sample)), number) for number, entry in enumerate(plan.entries))
    return key, (entry, key % (1 + max(job.matrix for job in plan.jobs if job.entry == entry)))
