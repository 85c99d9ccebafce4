"""What one optimizer step did: how much was decayed, how large weights and updates are, over all ranks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from math import isfinite, nan, prod, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_cwd.kernels.base import COLUMNS, Settings, Sums
from hf_cwd.origins import Origins
from hf_cwd.sharding import agree
from hf_cwd.sharding.dtensor import device, is_dtensor, mesh_of
from hf_cwd.sharding.pieces import Replicate


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
    """A parameter of the optimizer. ``apart``: each rank has elements of its own of what is no DTensor."""

    group: Mapping[str, Any]
    number: int  # of the group
    position: int  # in the group
    param: Tensor
    apart: bool


class _Settled(NamedTuple):
    """A call's numbers; for each row its owner, its group's number, and a row of factors."""

    owners: list[_Owner]
    groups: Tensor
    factors: Tensor
    numbers: Tensor


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
        self._numels: dict[int, float] = {}
        self._matrices: dict[int, list[Tensor]] = {}  # errors by key
        self._device: torch.device | None = None  # where ranks add up; None where each has all of it
        self._origins: Origins | None = None

    def settle(self, groups: Sequence[Mapping[str, Any]], origins: Origins, exchange: torch.device | None) -> None:
        """Finds out whose the numbers of the last calls are. The optimizer does it at the end of each step.

        Args:
            groups: the parameter groups that were stepped.
            origins: theirs.
            exchange: where ranks exchange matrices; None if they do not.
        """
        self._origins = origins
        self._device = self._device or exchange
        owners = {id(owner.param): owner for owner in self._owners(groups, origins)}
        copies: dict[Any, int] = {}
        for params, numels, settings, scales, numbers in self.calls:
            found = [owners[id(p)] for p in params]
            places, factors = [], []
            for owner, numel, given, scale in zip(found, numels, settings, scales, strict=True):
                number, share = owner.number, 1.0
                if self._device is not None and not owner.apart:
                    share /= _copies(owner.param, copies)
                if number not in self._settings:  # of a tensor lr this step's: a schedule may change it in place
                    lr = given.lr.clone() if isinstance(given.lr, Tensor) else given.lr
                    self._settings[number] = given._replace(lr=lr)
                self._numels[number] = self._numels.get(number, 0.0) + share * numel
                places.append(number)
                factors.append((share, share * scale**2, share, share))
            factors = torch.tensor(factors, dtype=torch.float64)
            self._settled.append(_Settled(found, torch.tensor(places), factors, numbers))
        self.calls = []

    def _owners(self, groups: Sequence[Mapping[str, Any]], origins: Origins) -> Iterator[_Owner]:
        for group in groups:
            number = origins.number(group)
            for position, p in enumerate(group["params"]):
                flat = origins.flat(p, group, needed=False)
                apart = flat is not None or getattr(p, "_fsdp_flattened", False)  # FSDP version 1 marks it so
                if self._device is None and is_dtensor(p):
                    self._device = device(p)
                elif self._device is None and apart:
                    self._device = p.device if flat is None else flat.device
                yield _Owner(group, number, position, p, apart)

    @property
    def has_numbers(self) -> bool:
        """Whether a step was made."""
        return bool(self._settled)

    def expect_matrix(self, key: int) -> None:
        """Says that one of the ranks is going to add the matrix of this key; of several the lowest key is taken."""
        self._matrices.setdefault(key, [])

    def add_matrix(self, key: int, matrix: Tensor) -> None:
        """Takes an orthogonalised matrix, without its scale."""
        o = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        if o.dtype == torch.bfloat16 and o.is_cuda and torch.version.hip is None:
            gram = torch.mm(o, o.T, out_dtype=torch.float32)  # a tenth of the time, and the same products
        else:
            o = o.to(torch.promote_types(o.dtype, torch.float32))
            gram = o @ o.T
        gram.diagonal().sub_(1)
        self._matrices[key].append(torch.linalg.vector_norm(gram) / sqrt(max(1, len(o))))

    def read(self) -> Statistics:
        """The statistics. A collective of all ranks where parameters lie in parts, or matrices are shared out."""
        size = len(self._origins or ())
        sums = torch.zeros(size, COLUMNS, dtype=torch.float64)
        for _, places, factors, numbers in self._settled:
            sums.index_add_(0, places, numbers.cpu() * factors)
        is_finite = bool(sums.isfinite().all())
        groups = [
            _totals(self._settings.get(number), self._numels.get(number, 0.0), row)
            for number, row in enumerate(sums.tolist())
        ]
        errors = self._matrices[min(self._matrices)] if self._matrices else []
        flat = [number for totals in groups for number in astuple(totals)]
        flat += [sum(map(float, errors)), float(len(errors))]
        if self._device is not None:
            flat = agree.total(flat, self._device)
        *flat, error, matrices = flat
        width = len(fields(Totals))
        groups = [Totals(*flat[start : start + width]) for start in range(0, len(flat), width)]
        return Statistics(groups, error / matrices if matrices else None, {} if is_finite else self._not_finite())

    def _not_finite(self) -> dict[Tensor, str]:
        owners = [
            owner
            for settled in self._settled
            for owner, fine in zip(settled.owners, settled.numbers.isfinite().all(1).tolist(), strict=True)
            if not fine
        ]
        return {o.param: self._origins.describe(o.param, o.position, o.group) for o in owners}


def _totals(settings: Settings | None, numel: float, numbers: Sequence[float]) -> Totals:
    """A group's, of its elements' number and sums; ``settings`` None: it had no step."""
    if settings is None:
        return Totals()
    decayed, update, weight, among = numbers
    lr, eligible = float(settings.lr), settings.weight_decay != 0
    return Totals(
        **{"numel": numel, "eligible": numel if eligible else 0.0, "decayed": decayed, "weight": weight},
        **{"eligible_weight": weight if eligible else 0.0, "decay": lr * settings.weight_decay * among},
        **{"update": update, "change": lr**2 * update},
    )


def _copies(p: Tensor, known: dict[Any, int]) -> int:
    """How many ranks hold the same part of a parameter as this one."""
    if not is_dtensor(p):
        return agree.world()
    key = (id(p.device_mesh), p.placements)
    if key not in known:
        mesh = mesh_of(p)
        pairs = zip(mesh.shape, mesh.placements, strict=True)
        known[key] = prod(size for size, placement in pairs if isinstance(placement, Replicate))
    return known[key]
