"""What one rank does in each round of a plan: pure, like the plan itself."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import torch

from hf_cwd.distributed.geometry import Segment, Shape, held, inner_shape
from hf_cwd.distributed.matrix_stage import Stage
from hf_cwd.distributed.plan import Entry, Job, Plan, holders, sources
from hf_cwd.newton_schulz.matrices import MatrixLayout


class Part(NamedTuple):
    """A segment of a job's matrix.

    Attributes:
        job: position of the job in the plan.
        source: the local tensor that the segment lies in.
        inner: sizes of the matrix's dimensions after the first, see :func:`hf_cwd.distributed.geometry.inner_shape`.
        scale: factor on the result. That of a parameter's only matrix is left to whoever applies it.
        segment: where it lies in the matrix and in the local tensor.
    """

    job: int
    source: int
    inner: Shape
    scale: float
    segment: Segment


class Batch(NamedTuple):
    """Matrices of one shape that are orthogonalised together."""

    stage: Stage
    dtype: torch.dtype
    shape: tuple[int, int]
    jobs: list[int]


@dataclass
class Round:
    """What a rank does in one round. Each list of lists has one for each peer; both ends have the same parts in order.

    Attributes:
        kept: parts that this rank holds of the matrices that it owns.
        gathered: parts of them that the peer holds and sends.
        sent: parts of their results that the peer gets.
        lent: parts held here of matrices that the peer owns and gathers.
        returned: parts of the peer's results that this rank gets.
        first, second: the batches of the matrices that it owns, in halves of about the same work.
        dtype: in which parts travel.
        replicated: whether results go to several replicas, on any rank.
        alike: for each peer, the first one that gets the same parts of the results: replicas do.
        whole: by source, the parts that are not among ``kept``, because the local tensor is the matrix as it lies.
    """

    kept: list[Part]
    gathered: list[list[Part]]
    sent: list[list[Part]]
    lent: list[list[Part]]
    returned: list[list[Part]]
    dtype: torch.dtype | None = None
    first: list[Batch] = field(default_factory=list)
    second: list[Batch] = field(default_factory=list)
    replicated: bool = False
    alike: list[int] = field(default_factory=list)
    whole: dict[int, Part] = field(default_factory=dict)


class Resident(NamedTuple):
    """Sources that exchange nothing, and the rounds, without communication, of their matrices."""

    sources: list[int]
    rounds: list[Round]


class Schedule:
    """What one rank does in a plan, round by round.

    Args:
        plan: equal on all ranks.
        rank: this one.
        peers: all ranks, in the order of the process group.
        local_sizes: elements of each of the optimizer's local tensors, which ``Entry.source`` counts; without padding.
        batch_bytes: matrices that do not move are taken together up to this size; 0: one parameter at a time.
        padded: local tensors that hold padding as well.

    Attributes:
        rounds: a :class:`Round` for each of the plan's.
        resident: the sources that exchange nothing on this rank.
        beside: for each round, further rounds without communication: of the sources that begin in it, the matrices
            that this rank holds whole.
        moving: sources that exchange something on some rank.
        begins, ends: for each round, the sources whose first matrix leaves in it, and those whose last one returns.

    Raises:
        ValueError: a part of a local tensor lies in no matrix, so that it would not be orthogonalised.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        *,
        peers: Sequence[int],
        local_sizes: Sequence[int],
        batch_bytes: int,
        padded: Sequence[int] = (),
    ) -> None:
        self._plan, self._rank, self._padded, self._batch_bytes = plan, rank, frozenset(padded), batch_bytes
        self._position = {peer: i for i, peer in enumerate(peers)}
        self.rounds = [self._round() for _ in range(plan.rounds)]
        self.begins: list[list[int]] = [[] for _ in self.rounds]
        self.ends: list[list[int]] = [[] for _ in self.rounds]
        for job in plan.jobs:
            if job.round is not None:
                self.rounds[job.round].dtype = plan.entries[job.entry].dtype
                self.rounds[job.round].replicated |= len(job.serves) > 1
        self.moving = sorted({plan.entries[job.entry].source for job in plan.jobs if job.round is not None})
        self._here = self._jobs_here(local_sizes)
        at_rest = []
        for source, numbers in enumerate(self._here):
            travels = [plan.jobs[number].round for number in numbers if plan.jobs[number].round is not None]
            if travels:
                self.begins[min(travels)].append(source)
                self.ends[max(travels)].append(source)
            else:
                at_rest.append(source)
        self._fill_rounds()
        self.resident = [Resident(chunk, self._resident_rounds(chunk)) for chunk in self._chunks(at_rest)]
        self.beside = [self._resident_rounds(sources) for sources in self.begins]

    def _fill_rounds(self) -> None:
        """What this rank does in each round of the plan."""
        owned: list[list[int]] = [[] for _ in self.rounds]
        for number in (number for numbers in self._here for number in numbers):
            job = self._plan.jobs[number]
            if job.round is not None:
                self._enter(self.rounds[job.round], number)
                if job.owner == self._rank:
                    owned[job.round].append(number)
        for k, (round_, numbers) in enumerate(zip(self.rounds, owned, strict=True)):
            # The first round has nothing to wait for in the middle: no results are on their way yet.
            middle = self._middle(numbers) if k else 0
            round_.first, round_.second = self._batches(numbers[:middle]), self._batches(numbers[middle:])
            leaders: dict[tuple, int] = {}
            round_.alike = [leaders.setdefault(tuple(parts), i) for i, parts in enumerate(_places(round_.sent))]

    def _chunks(self, sources: Sequence[int]) -> list[list[int]]:
        """Neighbouring sources, each chunk of at least ``batch_bytes`` but the last."""
        chunks: list[list[int]] = []
        size = self._batch_bytes
        for source in sources:
            if size >= self._batch_bytes:
                chunks.append([])
                size = 0
            chunks[-1].append(source)
            size += sum(map(self._bytes, self._here[source]))
        return chunks

    def _round(self) -> Round:
        return Round([], *([[] for _ in self._position] for _ in range(4)))

    def _jobs_here(self, local_sizes: Sequence[int]) -> list[list[int]]:
        """For each source the jobs whose results this rank holds a part of. They must cover the local tensor."""
        here: list[list[int]] = [[] for _ in local_sizes]
        covered, names = [0] * len(local_sizes), ["" for _ in local_sizes]
        for entry in self._plan.entries:
            names[entry.source] = f"{entry.name} of shape {entry.shape}"
        for number, job in enumerate(self._plan.jobs):
            entry = self._plan.entries[job.entry]
            if entry.sharding.replica(self._rank) in job.serves and (parts := self._held(entry, job, self._rank)):
                here[entry.source].append(number)
                covered[entry.source] += sum(part.numel for part in parts)
        for size, in_matrices, name in zip(local_sizes, covered, names, strict=True):
            if size != in_matrices:
                raise ValueError(
                    f"{name}: {in_matrices} of the {size} elements that this rank holds lie in its matrices, and the "
                    "others would not be orthogonalised"
                )
        return here

    def _held(self, entry: Entry, job: Job, rank: int) -> tuple[Segment, ...]:
        return held(entry.shape, entry.layout, entry.sharding, rank).get(job.matrix, ())

    def _enter(self, round_: Round, number: int) -> None:
        """Adds to a round what this rank does for a job, of which it holds a part."""
        job = self._plan.jobs[number]
        entry = self._plan.entries[job.entry]
        inner = inner_shape(entry.shape, entry.layout)
        scale = 1.0 if entry.layout == MatrixLayout() else entry.stage.scale(job.shape)

        def parts(rank: int) -> list[Part]:
            held = self._held(entry, job, rank)
            moved = [part._replace(offset=part.offset + entry.offset) for part in held] if entry.offset else held
            return [Part(number, entry.source, inner, scale, part) for part in moved]

        own = parts(self._rank)
        if job.owner != self._rank:
            peer = self._position[job.owner]
            round_.returned[peer] += own
            if self._rank in sources(entry, job):
                round_.lent[peer] += own
            return
        round_.kept += own
        for lists, ranks in ((round_.gathered, sources(entry, job)), (round_.sent, holders(entry, job))):
            for rank in ranks:
                if rank != self._rank:
                    lists[self._position[rank]] += parts(rank)

    def _resident_rounds(self, sources: Sequence[int]) -> list[Round]:
        """Rounds of about ``batch_bytes``, of the matrices of these sources that do not move."""
        portions: list[list[int]] = []
        last, size = -1, 0
        for number in (number for source in sources for number in self._here[source]):
            job = self._plan.jobs[number]
            if job.round is None:
                if not portions or (job.entry != last and size >= self._batch_bytes):
                    portions.append([])
                    size = 0
                portions[-1].append(number)
                last, size = job.entry, size + self._bytes(number)
        return [self._resident_round(numbers) for numbers in portions]

    def _resident_round(self, numbers: Sequence[int]) -> Round:
        result = self._round()
        for number in numbers:
            self._enter(result, number)
        result.second = self._batches(numbers)
        for part in result.kept:
            segment, shape = part.segment, self._plan.jobs[part.job].shape
            alone = len(self._here[part.source]) == 1 and part.source not in self._padded
            if alone and segment.numel == prod(shape) and segment.is_contiguous:
                result.whole[part.source] = part
        result.kept = [part for part in result.kept if part.source not in result.whole]
        return result

    def _batches(self, numbers: Iterable[int]) -> list[Batch]:
        batches: dict[tuple, Batch] = {}
        for number in numbers:
            job = self._plan.jobs[number]
            entry = self._plan.entries[job.entry]
            key = (entry.stage, entry.dtype, job.shape)
            batches.setdefault(key, Batch(*key, [])).jobs.append(number)
        return list(batches.values())

    def _middle(self, numbers: Sequence[int]) -> int:
        """How many of these matrices, from the first on, make about half of the work."""
        jobs = [self._plan.jobs[number] for number in numbers]
        costs = [self._plan.entries[job.entry].stage.flops(job.shape) for job in jobs]
        done, half = 0, sum(costs) / 2
        for count, cost in enumerate(costs):
            if done + cost / 2 > half:
                return count
            done += cost
        return len(costs)

    def _bytes(self, number: int) -> int:
        job = self._plan.jobs[number]
        return job.numel * self._plan.entries[job.entry].dtype.itemsize


def _places(sent: Sequence[Sequence[Part]]) -> list[list[tuple]]:
    """Where each part lies in its matrix. Without its place in the local tensor, in which replicas may differ."""
    return [[(part.job, part.segment.start, part.segment.size) for part in peer] for peer in sent]
