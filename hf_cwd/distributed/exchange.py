"""The operations of an exchange of matrices: gathering them at their owners, and sending the results back.

:mod:`hf_cwd.optim.matrix_step` calls them round by round. What travels in a step: one all-to-all in each direction a
round, and one all-reduce of a byte a parameter, which says which of them have a gradient.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_cwd.distributed.copies import copy_parts, cut, of_local, of_matrix, scale_parts, size_of, unpack
from hf_cwd.distributed.pinned_memory import Staging
from hf_cwd.distributed.plan import Plan
from hf_cwd.distributed.rank_groups import EXCHANGE, RankGroup, explained
from hf_cwd.distributed.schedule import Part, Round, Schedule


class Transfer(NamedTuple):
    """An all-to-all under way. Its tensors must live until it is over."""

    work: Any
    received: Tensor
    sent: Tensor
    what: str


class Exchange:
    """One rank's part in a :class:`hf_cwd.distributed.plan.Plan`.

    Args:
        plan: equal on all ranks of the group.
        rank: this one.
        group: the ranks of the plan.
        local_sizes: elements of each of the optimizer's local tensors, without padding.
        device: where matrices are gathered and orthogonalised.
        batch_bytes: matrices that do not move are taken together up to this size.
        staging: page-locked memory for offloaded tensors, on their way to and from the device.
        padded: local tensors that also hold padding.

    Raises:
        ValueError: see :class:`hf_cwd.distributed.schedule.Schedule`.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        group: RankGroup,
        *,
        local_sizes: Sequence[int],
        device: torch.device,
        batch_bytes: int,
        staging: Staging,
        padded: Sequence[int] = (),
    ) -> None:
        self.plan = plan
        self.group = group
        self.device = device
        self.staging = staging
        # Gloo's all-to-all takes one tensor only: a result for several replicas is copied for each of them.
        self._needs_one_tensor = bool(plan.rounds) and f"{device.type}:gloo" in dist.get_backend_config(
            group.process_group
        )
        self.schedule = Schedule(
            plan, rank, peers=group.ranks, local_sizes=local_sizes, batch_bytes=batch_bytes, padded=padded
        )

    def new_part(self, source: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor for a source's direction: of the size of its local tensor, and on its device."""
        if like.device == self.device:
            return torch.empty(like.shape, dtype=dtype, device=like.device)
        return self.staging.tensor(source, like.numel(), dtype)

    def start(self, present: Sequence[bool]) -> "ExchangeStep":
        """Begins a step, which every rank of the group must do.

        Args:
            present: whether this rank has a gradient for each source.
        """
        return ExchangeStep(self, *self._agree(present))

    def _agree(self, present: Sequence[bool]) -> tuple[Any, set[int]]:
        """The sources to leave out of the step: those without a gradient on this rank.

        A source that has parts to exchange is left out only if no rank has a gradient for it. A rank that has all
        gradients does not wait for the answer.
        """
        moving = self.schedule.moving
        has_gradient = [present[source] for source in moving]
        absent = {source for source, here in enumerate(present) if not here}
        if not moving:
            return None, absent
        # Made on the device if possible: copying a list to it would wait for the backward pass.
        flags = torch.ones(len(moving), dtype=torch.uint8, device=self.device)
        if not all(has_gradient):
            flags.copy_(torch.tensor(has_gradient))
        with explained(EXCHANGE, "agreeing on gradients"):
            work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group.process_group, async_op=True)
            if not all(has_gradient):
                work.wait()
                absent -= {source for source, anywhere in zip(moving, flags.tolist(), strict=True) if anywhere}
        return work, absent

    def send(
        self,
        parts: list[list[Tensor]],
        sizes: list[int],
        dtype: torch.dtype,
        what: str,
        alike: Sequence[int] | None = None,
    ) -> Transfer:
        """Sends each peer its parts; ``sizes`` elements come from each.

        Args:
            alike: for each peer, the first one with equal parts, which are packed once for all of them.
        """
        leaders = [peer for i, peer in enumerate(parts) if alike is None or alike[i] == i]
        flat = [part for peer in leaders for part in peer]
        # Packed where the parts lie, which under CPU offload is not where the group communicates.
        lengths = [sum(part.numel() for part in peer) for peer in leaders]
        if flat and flat[0].device != self.device:
            buffer = self.staging.tensor("lent", sum(lengths), dtype)
        else:
            buffer = torch.empty(sum(lengths), dtype=dtype, device=self.device)
        copy_parts([piece.view(part.shape) for piece, part in zip(cut(buffer, flat), flat, strict=True)], flat)
        buffer = buffer.to(self.device)
        received = torch.empty(sum(sizes), dtype=dtype, device=self.device)
        given = buffer.split(lengths)
        if alike is not None:
            packed = dict(zip(sorted(set(alike)), given, strict=True))
            given = [packed[leader] for leader in alike]
        group = self.group.process_group
        with explained(EXCHANGE, what):
            if alike is None or self._needs_one_tensor:
                buffer = buffer if alike is None else torch.cat(given)
                to_each = [len(part) for part in given]
                work = dist.all_to_all_single(received, buffer, sizes, to_each, group=group, async_op=True)
            else:
                work = dist.all_to_all(list(received.split(sizes)), list(given), group=group, async_op=True)
        return Transfer(work, received, buffer, what)


class Matrices(dict[int, Tensor]):
    """The whole matrices of a round at their owner, by job. Those of a batch lie in one of the ``stacks``.

    Attributes:
        stacks: by the first job of a batch: (jobs, out_features, in_features).
    """

    def __init__(self, round_: Round, device: torch.device) -> None:
        super().__init__()
        self.stacks: dict[int, Tensor] = {}
        for batch in (*round_.first, *round_.second):
            stack = torch.empty((len(batch.jobs), *batch.shape), dtype=batch.dtype, device=device)
            self.stacks[batch.jobs[0]] = stack
            self.update(zip(batch.jobs, stack, strict=True))


class ExchangeStep:
    """The exchange of one step, see :meth:`Exchange.start`.

    A source without a gradient is left out. If parts of it are exchanged, it is left out only if no rank of the group
    has a gradient for it.

    Attributes:
        absent: the sources that are left out.
        parts: this rank's parts of the other sources, by source: directions first, orthogonalised at the end.
            Matrices of a layout other than the default are scaled then, too.
    """

    def __init__(self, exchange: Exchange, agreement: Any, absent: set[int]) -> None:
        self.absent = absent
        self.parts: dict[int, Tensor] = {}
        self._exchange = exchange
        self._agreement = agreement

    def gather(self, k: int) -> Transfer:
        """Sends the parts of round ``k`` to the owners of their matrices, and begins to receive those of its own."""
        rounds = self._exchange.schedule.rounds
        lent = [[of_local(self.parts[p.source], p) for p in self._here(peer)] for peer in rounds[k].lent]
        sizes = [size_of(peer, self.absent) for peer in rounds[k].gathered]
        return self._exchange.send(lent, sizes, rounds[k].dtype, f"gathering round {k + 1} of {len(rounds)}")

    def whole(self, k: int, incoming: Transfer) -> Matrices:
        """The matrices of round ``k`` that this rank owns, once their parts have come."""
        round_ = self._exchange.schedule.rounds[k]
        with explained(EXCHANGE, incoming.what):
            incoming.work.wait()
        matrices = self.allocate(round_)
        self.fill(round_, matrices)
        arrived = [p for peer in round_.gathered for p in self._here(peer)]
        unpack(incoming.received, [of_matrix(matrices[p.job], p) for p in arrived])
        return matrices

    def give_back(self, k: int, matrices: Matrices) -> Transfer:
        """Sends the results of round ``k`` to the ranks that hold a part of them, and keeps this rank's own parts."""
        rounds = self._exchange.schedule.rounds
        round_ = rounds[k]
        self.keep(round_, matrices)
        sent = [[of_matrix(matrices[p.job], p) for p in self._here(peer)] for peer in round_.sent]
        sizes = [size_of(peer, self.absent) for peer in round_.returned]
        alike = round_.alike if round_.replicated else None
        return self._exchange.send(sent, sizes, round_.dtype, f"returning round {k + 1} of {len(rounds)}", alike)

    def take_back(self, k: int, outgoing: Transfer) -> None:
        """Puts the results of round ``k`` that others own into ``parts``, once they have come."""
        with explained(EXCHANGE, outgoing.what):
            outgoing.work.wait()
        arrived = [p for peer in self._exchange.schedule.rounds[k].returned for p in self._here(peer)]
        received = outgoing.received
        if arrived and self.parts[arrived[0].source].device != received.device:
            received = self._exchange.staging.tensor("returned", received.numel(), received.dtype).copy_(received)
        unpack(received, [of_local(self.parts[p.source], p) for p in arrived])
        scale_parts([(of_local(self.parts[p.source], p), p.scale) for p in arrived])

    def allocate(self, round_: Round) -> Matrices:
        """Memory for the matrices of a round, not initialised."""
        return Matrices(round_, self._exchange.device)

    def fill(self, round_: Round, matrices: Matrices) -> None:
        """Puts into matrices what this rank itself holds of them."""
        kept = self._here(round_.kept)
        copy_parts([of_matrix(matrices[p.job], p) for p in kept], [of_local(self.parts[p.source], p) for p in kept])
        whole = [(matrices[p.job], self.parts[p.source]) for p in self._here(round_.whole.values())]
        apart = [(matrix, part) for matrix, part in whole if matrix.data_ptr() != part.data_ptr()]
        copy_parts([matrix for matrix, _ in apart], [part.view(matrix.shape) for matrix, part in apart])

    def keep(self, round_: Round, matrices: Matrices) -> None:
        """Puts the results that stay on this rank into ``parts``."""
        kept = self._here(round_.kept)
        own = [of_local(self.parts[p.source], p) for p in kept]
        copy_parts(own, [of_matrix(matrices[p.job], p) for p in kept])
        scale_parts([(view, p.scale) for view, p in zip(own, kept, strict=True)])
        whole = self._here(round_.whole.values())
        scale_parts([(matrices[p.job], p.scale) for p in whole])
        self.parts.update({p.source: matrices[p.job].to(self.parts[p.source].device) for p in whole})

    def finish(self) -> None:
        """Waits until all of the step's communication is over."""
        if self._agreement is not None:
            self._agreement.wait()

    def _here(self, parts: Iterable[Part]) -> list[Part]:
        return [part for part in parts if part.source not in self.absent]
