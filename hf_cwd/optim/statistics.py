"""What one optimizer step did: how much was decayed, how large weights and updates are, over all ranks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from math import isfinite, nan, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_cwd.distributed import collectives, local_view
from hf_cwd.distributed.rank_groups import RankGroup, alone
from hf_cwd.kernels.interface import COLUMNS, Settings, Sums
from hf_cwd.optim.original_params import OriginalParams


@dataclass(frozen=True)
class Totals:
    """Sums over the elements of some parameters in one step, each element counted once; x is from before the step.

    Attributes:
        numel: elements.
        eligible: those with a weight decay that is not 0.
        decayed: those that were decayed.
        weight: sum of x^2.
        eligible_weight: of the eligible ones.
        decay: sum of lr * weight_decay * x^2 over the decayed ones.
        update: sum of (scale*u)^2.
        change: sum of (lr*scale*u)^2.
    """

    numel: float = 0.0
    eligible: float = 0.0
    decayed: float = 0.0
    weight: float = 0.0
    eligible_weight: float = 0.0
    decay: float = 0.0
    update: float = 0.0
    change: float = 0.0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def decayed_fraction(self) -> float:
        """The paper's mask ratio: of the elements that could be decayed, the share that was."""
        return _ratio(self.decayed, self.eligible)

    @property
    def weight_rms(self) -> float:
        """Root of the mean of x^2."""
        return sqrt(_ratio(self.weight, self.numel))

    @property
    def update_rms(self) -> float:
        """Root of the mean of (scale*u)^2: the update without learning rate and decay."""
        return sqrt(_ratio(self.update, self.numel))

    @property
    def update_to_weight(self) -> float:
        """The norm of the update, with its learning rate and without the decay, over that of the weights."""
        return sqrt(_ratio(self.change, self.weight))

    @property
    def effective_decay(self) -> float:
        """The share of the norm of the eligible weights that the decay took; lr * weight_decay if all are decayed."""
        return _ratio(self.decay, self.eligible_weight)

    @property
    def is_finite(self) -> bool:
        return isfinite(self.weight) and isfinite(self.update)


def _ratio(part: float, whole: float) -> float:
    """NaN where there is nothing to compare with."""
    return part / whole if whole else nan


class Statistics(NamedTuple):
    """One step's.

    Attributes:
        groups: of each parameter group; of those without a step all zero.
        orthogonality_error: ``|O O^T - I|_F / sqrt(rows)`` of one orthogonalised matrix (of its transpose, if it has
            more rows than columns), which is the root mean square of its squared singular values' distance to 1; None
            where no rule orthogonalises.
        not_finite: this rank's parameters in which x, u or a state is not finite, and each in words.
    """

    groups: list[Totals]
    orthogonality_error: float | None
    not_finite: dict[Tensor, str]

    @property
    def total(self) -> Totals:
        return sum(self.groups, Totals())


class _Owner(NamedTuple):
    """A parameter of the optimizer.

    Attributes:
        group, number, position: its group, the group's number, and its place in the group.
        ranks: those among which it lies in parts; this rank alone, where it has all of it.
        copies: how many of them hold the same part.
    """

    group: Mapping[str, Any]
    number: int
    position: int
    param: Tensor
    ranks: RankGroup
    copies: int


class _Settled(NamedTuple):
    """A call's numbers; for each row its owner, its place in the sums, and a row of factors."""

    owners: list[_Owner]
    places: Tensor
    factors: Tensor
    numbers: Tensor


class _Sampled(NamedTuple):
    """The matrix of one exchange whose orthogonality is measured: its ranks, where they communicate, and errors."""

    ranks: RankGroup
    device: torch.device
    errors: list[Tensor]


class StepStatistics(Sums):
    """Collects one step's statistics, in the pass that updates the weights.

    Put a fresh one into ``CWDOptimizer.statistics`` before a step and take it out afterwards; other steps sum up
    nothing. The kernels leave their sums on the device, so that nothing waits before :meth:`read`.

    Args:
        sample: stands for the matrix whose orthogonality is measured; equal on all ranks.

    Example:
        >>> import torch
        >>> from hf_cwd import CWDAdamW, StepStatistics
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        >>> x.grad = torch.ones(2)
        >>> optimizer = CWDAdamW([x], lr=0.1, weight_decay=0.5)
        >>> optimizer.statistics = StepStatistics()
        >>> optimizer.step()
        >>> total = optimizer.statistics.read().total
        >>> total.decayed_fraction, round(total.weight_rms, 4), round(total.update_rms, 4)
        (0.5, 3.5355, 1.0)
        >>> round(total.effective_decay, 6)  # 9 of 9 + 16 are decayed by 0.05
        0.018
    """

    def __init__(self, sample: int = 0) -> None:
        super().__init__()
        self.sample = sample
        self._settled: list[_Settled] = []
        self._settings: dict[int, Settings] = {}  # by group
        self._numels: dict[tuple[RankGroup, int], float] = {}  # and by the ranks among which parameters lie in parts
        self._matrices: dict[int, _Sampled] = {}  # by key
        self._devices: dict[RankGroup, torch.device] = {}  # where ranks add up what lies in parts among them
        self._places: dict[tuple[RankGroup, int], int] = {}
        self._originals: OriginalParams | None = None

    def settle(self, groups: Sequence[Mapping[str, Any]], originals: OriginalParams) -> None:
        """Finds out whose the numbers of the last calls are. The optimizer does it at the end of each step.

        Args:
            groups: the parameter groups that were stepped.
            originals: what they were made of.
        """
        self._originals = originals
        owners = {id(owner.param): owner for owner in self._owners(groups, originals)}
        for params, numels, settings, scales, numbers in self.calls:
            called = [owners[id(p)] for p in params]
            places, factors = [], []
            for owner, numel, given, scale in zip(called, numels, settings, scales, strict=True):
                key, share = (owner.ranks, owner.number), 1 / owner.copies
                places.append(self._places.setdefault(key, len(self._places)))
                if owner.number not in self._settings:  # a schedule may change a tensor lr in place
                    lr = given.lr.clone() if isinstance(given.lr, Tensor) else given.lr
                    self._settings[owner.number] = given._replace(lr=lr)
                self._numels[key] = self._numels.get(key, 0.0) + share * numel
                factors.append((share, share * scale**2, share, share))
            factors = torch.tensor(factors, dtype=torch.float64)
            self._settled.append(_Settled(called, torch.tensor(places), factors, numbers))
        self.calls = []

    def _owners(self, groups: Sequence[Mapping[str, Any]], originals: OriginalParams) -> Iterator[_Owner]:
        views = [[originals.view(p, group, needed=False) for p in group["params"]] for group in groups]
        meshes = local_view.of_meshes([view for some in views for view in some])
        for group, some in zip(groups, views, strict=True):
            number = originals.number(group)
            for position, view in enumerate(some):
                ranks = view.ranks(meshes)
                if ranks.together:
                    self._devices[ranks] = view.device
                yield _Owner(group, number, position, view.param, ranks, view.copies)

    @property
    def has_numbers(self) -> bool:
        """Whether a step was made."""
        return bool(self._settled)

    def expect_matrix(self, key: int, ranks: RankGroup, device: torch.device) -> None:
        """Says that one of these ranks is going to add the matrix of this key; of several the lowest key is taken."""
        self._matrices.setdefault(key, _Sampled(ranks, device, []))

    def add_matrix(self, key: int, matrix: Tensor) -> None:
        """Takes an orthogonalised matrix, without its scale."""
        o = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        if o.dtype == torch.bfloat16 and o.is_cuda and torch.version.hip is None:
            gram = torch.mm(o, o.T, out_dtype=torch.float32)  # a tenth of the time, and the same products
        else:
            o = o.to(torch.promote_types(o.dtype, torch.float32))
            gram = o @ o.T
        gram.diagonal().sub_(1)
        self._matrices[key].errors.append(torch.linalg.vector_norm(gram) / sqrt(max(1, len(o))))

    def read(self) -> Statistics:
        """The statistics. A collective of the ranks among which parameters lie in parts, or share matrices out."""
        sums = torch.zeros(len(self._places), COLUMNS, dtype=torch.float64)
        for _, places, factors, numbers in self._settled:
            sums.index_add_(0, places, numbers.cpu() * factors)
        rows = dict(zip(self._places, sums.tolist(), strict=True))
        devices = self._devices | {one.ranks: one.device for one in self._matrices.values() if one.ranks.together}
        totals = {ranks: self._added_up(ranks, devices.get(ranks), rows) for ranks in sorted({alone(), *devices})}
        groups = [sum(each, Totals()) for each in zip(*(own for own, _ in totals.values()), strict=True)]
        error = totals[self._matrices[min(self._matrices)].ranks][1] if self._matrices else None
        return Statistics(groups, error, {} if bool(sums.isfinite().all()) else self._not_finite())

    def _added_up(
        self, ranks: RankGroup, device: torch.device | None, rows: Mapping[tuple[RankGroup, int], Sequence[float]]
    ) -> tuple[list[Totals], float | None]:
        """Each group's totals of what lies among some ranks, and the error of their matrix; with a device from all."""
        flat: list[float] = []
        for number in range(len(self._originals or ())):
            row = rows.get((ranks, number))
            own = Totals() if row is None else _totals(self._settings[number], self._numels[ranks, number], row)
            flat += astuple(own)
        keys = [key for key, one in self._matrices.items() if one.ranks == ranks]
        errors = self._matrices[min(keys)].errors if keys else []
        flat += [sum(map(float, errors)), float(len(errors))]
        if device is not None:
            flat = collectives.total(flat, device, ranks.process_group)
        *flat, error, matrices = flat
        width = len(fields(Totals))
        totals = [Totals(*flat[start : start + width]) for start in range(0, len(flat), width)]
        return totals, error / matrices if matrices else None

    def _not_finite(self) -> dict[Tensor, str]:
        owners = [
            owner
            for settled in self._settled
            for owner, fine in zip(settled.owners, settled.numbers.isfinite().all(1).tolist(), strict=True)
            if not fine
        ]
        return {o.param: self._originals.describe(o.param, o.position, o.group) for o in owners}


def _totals(settings: Settings, numel: float, numbers: Sequence[float]) -> Totals:
    """A group's, of its elements' number and sums."""
    decayed, update, weight, among = numbers
    lr, eligible = float(settings.lr), settings.weight_decay != 0
    return Totals(
        numel=numel,
        eligible=numel if eligible else 0.0,
        decayed=decayed,
        weight=weight,
        eligible_weight=weight if eligible else 0.0,
        decay=lr * settings.weight_decay * among,
        update=update,
        change=lr**2 * update,
    )
