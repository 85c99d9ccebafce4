"""Carries out a plan: gathers matrices at their owners, orthogonalises them there, and sends the results back.

One all-to-all in each direction a round, and one all-reduce of a byte a parameter: which of them have a gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_cwd.distributed.copies import copy_parts, cut, of_local, of_matrix, scale_parts, size_of, unpack
from hf_cwd.distributed.pinned_memory import Staging
from hf_cwd.distributed.plan import Plan
from hf_cwd.distributed.rank_groups import EXCHANGE, RankGroup, explained
from hf_cwd.distributed.schedule import Batch, Itinerary, Round


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
        staging: memory for what is offloaded, on its way to and from the device.
        padded: local tensors that hold padding as well.

    Raises:
        ValueError: see :class:`hf_cwd.distributed.schedule.Itinerary`.
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
        self._staging = staging
        # Gloo has all-to-alls from one tensor only, so that a result for several replicas is copied for each of them.
        self._needs_one_tensor = bool(plan.rounds) and f"{device.type}:gloo" in dist.get_backend_config(
            group.process_group
        )
        self.itinerary = Itinerary(
            plan, rank, peers=group.ranks, local_sizes=local_sizes, batch_bytes=batch_bytes, padded=padded
        )

    def new_part(self, source: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor for a source's direction: of the size of its local tensor, and on its device."""
        if like.device == self.device:
            return torch.empty(like.shape, dtype=dtype, device=like.device)
        return self._staging.tensor(source, like.numel(), dtype)

    def run(
        self,
        present: Sequence[bool],
        directions: Callable[[Sequence[int], Mapping[int, Tensor]], Sequence[Tensor]],
        apply: Callable[[Sequence[int], Sequence[Tensor]], None],
        meanwhile: Callable[[], None] = lambda: None,
        look: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """One step of all matrices. Every rank must call it.

        A source without a gradient is left out; one of which parts move only if no rank has a gradient for it.

        At most two rounds of buffers are alive. While a round is orthogonalised, first the results of the one before
        travel back, then the parts of the one after come in.

        Args:
            present: whether this rank has a gradient for each source.
            directions: this rank's parts of some sources' directions, as new contiguous tensors, or, to save a copy, in
                those given to it by source; it is also asked for sources that only other ranks have a gradient for.
            apply: takes those parts orthogonalised; matrices of a layout other than the default are scaled already.
            meanwhile: work that needs no matrix, done while the first round travels.
            look: is shown every matrix that this rank has orthogonalised, by its job and without its scale.

        Raises:
            RuntimeError: another rank ended, or did not join in time; the message names the round.
        """
        rounds, parts = self.itinerary.rounds, {}
        agreement, absent = self._agree(present)

        def begin(sources: Sequence[int], outs: Mapping[int, Tensor] = MappingProxyType({})) -> None:
            some = [source for source in sources if source not in absent]
            parts.update(zip(some, directions(some, outs), strict=True))

        def end(sources: Sequence[int]) -> None:
            some = [source for source in sources if source not in absent]
            apply(some, [parts.pop(source) for source in some])

        def gather(k: int) -> Transfer:
            begin(self.itinerary.begins[k])
            lent = [[of_local(parts[p.source], p) for p in peer if p.source not in absent] for peer in rounds[k].lent]
            sizes = [size_of(peer, absent) for peer in rounds[k].gathered]
            return self._start(lent, sizes, rounds[k].dtype, f"gathering round {k + 1} of {len(rounds)}")

        def give_back(k: int, matrices: dict[int, Tensor]) -> Transfer:
            _keep(rounds[k], matrices, parts, absent)
            sent = [[of_matrix(matrices[p.job], p) for p in peer if p.source not in absent] for peer in rounds[k].sent]
            sizes = [size_of(peer, absent) for peer in rounds[k].returned]
            alike = rounds[k].alike if rounds[k].replicated else None
            return self._start(sent, sizes, rounds[k].dtype, f"returning round {k + 1} of {len(rounds)}", alike)

        def finish(k: int, transfer: Transfer) -> None:
            with explained(EXCHANGE, transfer.what):
                transfer.work.wait()
            arrived = [p for peer in rounds[k].returned for p in peer if p.source not in absent]
            received = transfer.received
            if arrived and parts[arrived[0].source].device != received.device:
                received = self._staging.tensor("returned", received.numel(), received.dtype).copy_(received)
            unpack(received, [of_local(parts[p.source], p) for p in arrived])
            scale_parts([(of_local(parts[p.source], p), p.scale) for p in arrived])
            end(self.itinerary.ends[k])

        def orthogonalize(batches: Sequence[Batch], stacks: dict[int, Tensor], matrices: dict[int, Tensor]) -> None:
            for batch in batches:
                result = batch.stage(stacks.pop(batch.jobs[0])).to(batch.dtype)
                matrices.update(zip(batch.jobs, result, strict=True))
                for job, matrix in zip(batch.jobs, result, strict=True) if look is not None else ():
                    if self.plan.entries[self.plan.jobs[job].entry].source not in absent:
                        look(job, matrix)

        def stay(still: Sequence[Round], sources: Sequence[int] = ()) -> None:
            if not still:
                begin(sources)
            for number, round_ in enumerate(still):
                stacks, matrices = self._allocate(round_)
                if number == 0:
                    begin(sources, {source: matrices[part.job] for source, part in round_.whole.items()})
                self._fill(round_, matrices, parts, absent)
                orthogonalize(round_.second, stacks, matrices)
                _keep(round_, matrices, parts, absent)

        incoming = gather(0) if rounds else None
        meanwhile()
        for sources, still in self.itinerary.chunks:
            stay(still, sources)
            end(sources)
        if rounds:
            stay(self.itinerary.still[0])
        outgoing = None
        for k, round_ in enumerate(rounds):
            with explained(EXCHANGE, incoming.what):
                incoming.work.wait()
            stacks, matrices = self._allocate(round_)
            self._fill(round_, matrices, parts, absent)
            arrived = [p for peer in round_.gathered for p in peer if p.source not in absent]
            unpack(incoming.received, [of_matrix(matrices[p.job], p) for p in arrived])
            incoming = None  # frees its buffers before the next ones are made
            orthogonalize(round_.first, stacks, matrices)
            if k > 0:
                finish(k - 1, outgoing)
                outgoing = None
            if k + 1 < len(rounds):
                incoming = gather(k + 1)
                stay(self.itinerary.still[k + 1])
            orthogonalize(round_.second, stacks, matrices)
            outgoing = give_back(k, matrices)
            del stacks, matrices
        if rounds:
            finish(len(rounds) - 1, outgoing)
            agreement.wait()

    def _agree(self, present: Sequence[bool]) -> tuple[Any, set[int]]:
        """The sources to leave out: without a gradient here, or on any rank if a part of them moves.

        A rank that has all gradients need not wait to know.
        """
        moving = self.itinerary.moving
        found = [present[source] for source in moving]
        absent = {source for source, here in enumerate(present) if not here}
        if not moving:
            return None, absent
        # Made on the device where that can be: copying a list there waits for the backward pass.
        flags = torch.ones(len(moving), dtype=torch.uint8, device=self.device)
        if not all(found):
            flags.copy_(torch.tensor(found))
        with explained(EXCHANGE, "agreeing on gradients"):
            work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group.process_group, async_op=True)
            if not all(found):
                work.wait()
                absent -= {source for source, anywhere in zip(moving, flags.tolist(), strict=True) if anywhere}
        return work, absent

    def _start(
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
            buffer = self._staging.tensor("lent", sum(lengths), dtype)
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

    def _allocate(self, round_: Round) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Batches by their first job and, in them, matrices by job."""
        stacks, matrices = {}, {}
        for batch in (*round_.first, *round_.second):
            stack = torch.empty((len(batch.jobs), *batch.shape), dtype=batch.dtype, device=self.device)
            stacks[batch.jobs[0]] = stack
            matrices.update(zip(batch.jobs, stack, strict=True))
        return stacks, matrices

    def _fill(self, round_: Round, matrices: dict[int, Tensor], parts: dict[int, Tensor], absent: set[int]) -> None:
        """Puts into matrices what this rank itself holds of them."""
        kept = [p for p in round_.kept if p.source not in absent]
        copy_parts([of_matrix(matrices[p.job], p) for p in kept], [of_local(parts[p.source], p) for p in kept])
        whole = [(matrices[p.job], parts[source]) for source, p in round_.whole.items() if source not in absent]
        apart = [(matrix, part) for matrix, part in whole if matrix.data_ptr() != part.data_ptr()]
        copy_parts([matrix for matrix, _ in apart], [part.view(matrix.shape) for matrix, part in apart])


def _keep(round_: Round, matrices: dict[int, Tensor], parts: dict[int, Tensor], absent: set[int]) -> None:
    """Puts the results that stay on this rank into its parts."""
    kept = [p for p in round_.kept if p.source not in absent]
    own = [of_local(parts[p.source], p) for p in kept]
    copy_parts(own, [of_matrix(matrices[p.job], p) for p in kept])
    scale_parts([(view, p.scale) for view, p in zip(own, kept, strict=True)])
    whole = [p for source, p in round_.whole.items() if source not in absent]
    scale_parts([(matrices[p.job], p.scale) for p in whole])
    parts.update({p.source: matrices[p.job].to(parts[p.source].device) for p in whole})
