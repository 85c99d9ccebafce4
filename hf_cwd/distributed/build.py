"""Builds an exchange: reads off what each rank holds of the optimizer's tensors, proves it once, and plans."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from hf_cwd.distributed import collectives, deepspeed_zero, dtensor
from hf_cwd.distributed.exchange import Exchange
from hf_cwd.distributed.flat_geometry import ShardedParam
from hf_cwd.distributed.local_view import DTensorView, FlatView, LocalView
from hf_cwd.distributed.matrix_stage import Stage
from hf_cwd.distributed.pinned_memory import Staging
from hf_cwd.distributed.plan import Entry, flops_per_byte, plan
from hf_cwd.distributed.rank_groups import RankGroup, alone
from hf_cwd.newton_schulz.matrices import MatrixLayout

_logger = logging.getLogger("hf_cwd")


class Source(NamedTuple):
    """A tensor of a matrix rule.

    Attributes:
        view: what this rank holds of it.
        name: for messages.
        layout: which matrices it holds, or each of the parameters in a flat tensor does.
        stage: what is done with them.
        direction: dtype that its direction is computed in.
    """

    view: LocalView
    name: str
    layout: MatrixLayout
    stage: Stage
    direction: torch.dtype


def build(
    sources: Sequence[Source],
    group: RankGroup,
    *,
    share: str,
    exchange_bytes: int,
    staging: Staging | None = None,
) -> Exchange:
    """The exchange of these parameters among the ranks of a group. A collective; no tensor is changed.

    Several ranks compare what they are about to plan, prove that the weights lie where they are expected, and compare
    the plans.

    Args:
        sources: all of them on the ranks of ``group``: DTensors by their mesh, others whole on each rank.

    Raises:
        ValueError: a layout that is not supported, weights that lie elsewhere, or ranks that differ. All ranks raise.
        RuntimeError: another rank did not call it.
    """
    rank, device = alone().ranks[0], _device(sources, group)
    if group.together:
        params = _agreed(sources, rank, group, device, (share, exchange_bytes))
    else:
        params = _sharded_params(sources, group)
        _prove_flat(sources, lambda flags: flags)
    entries = []
    for i, (source, own) in enumerate(zip(sources, params, strict=True)):
        wire = source.stage.wire(source.direction, device.type)
        entries += [Entry(p.name, p.shape, source.layout, p.sharding, source.stage, wire, i, p.offset) for p in own]
    planned = plan(entries, share=share, exchange_bytes=exchange_bytes, balance=flops_per_byte(device.type))
    exchange, problem = None, None
    try:
        exchange = Exchange(
            planned,
            rank,
            group,
            local_sizes=[source.view.numel for source in sources],
            device=device,
            batch_bytes=0 if device.type == "cpu" else exchange_bytes,  # batches save launches, and nothing on a CPU
            staging=staging or Staging(),
            padded=[i for i, s in enumerate(sources) if s.view.is_flat and s.view.numel < s.view.param.numel()],
        )
    except ValueError as error:
        problem = error
    if group.together:
        fine, alike = collectives.same([problem is None, collectives.digest(planned)], device, group.process_group)
        problem = problem or (None if fine else ValueError("another rank could not carry out the plan: see its error"))
        if problem is None and not alike:
            problem = ValueError("ranks planned different exchanges: do they run the same versions of this package?")
    if problem is not None:
        raise problem
    if planned.rounds and rank == min(group.ranks):
        _logger.info(
            "%d of %d matrices travel between %d ranks, in %d rounds; the busiest rank receives %.1f MB a step",
            sum(job.round is not None for job in planned.jobs),
            len(planned.jobs),
            len(group.ranks),
            planned.rounds,
            max(planned.received.values()) / 1e6,
        )
    return exchange


def _device(sources: Sequence[Source], group: RankGroup) -> torch.device:
    """Where matrices are gathered and orthogonalised: where the process group communicates."""
    for source in sources:
        if type(source.view) is not LocalView:
            return source.view.device
    device = sources[0].view.device
    if group.together and f"{device.type}:" not in dist.get_backend_config(group.process_group):
        return dtensor.current_device(torch.accelerator.current_accelerator().type)
    return device


def _sharded_params(sources: Sequence[Source], group: RankGroup) -> list[Sequence[ShardedParam]]:
    return [source.view.sharded_params(source.name, group) for source in sources]


def _agreed(
    sources: Sequence[Source], rank: int, group: RankGroup, device: torch.device, options: tuple[str, int]
) -> list[Sequence[ShardedParam]]:
    """What lies in each source, once all ranks have the same parameters and every layout has been proven."""
    params, problem, together = [], None, group.process_group
    try:
        params = _sharded_params(sources, group)
    except ValueError as error:
        problem = error
    described = [(own, s.layout, s.stage, s.direction) for own, s in zip(params, sources, strict=not problem)]
    fine, count, options_alike, alike = collectives.same(
        [problem is None, len(sources), collectives.digest(options), collectives.digest(described)], device, together
    )
    if problem is not None or not fine:
        raise problem or ValueError("another rank refused the layout of its parameters: see its error")
    if not count:
        raise ValueError(f"ranks have different numbers of parameters for matrices, here {len(sources)}")
    if not options_alike:
        raise ValueError(f"ranks have different options, here share={options[0]}, exchange_bytes={options[1]}")
    if not alike:
        each = collectives.same([collectives.digest(value) for value in described], device, together)
        raise ValueError(
            f"{sources[each.index(False)].name} has another name, shape, layout or options on another rank, or another "
            "place among its parameters. Give all ranks the same parameters in the same order"
        )

    _prove_flat(sources, lambda flags: collectives.everybody(flags, device, together))
    _prove_dtensors(sources, params, rank, lambda flags: collectives.everybody(flags, device, together))
    return params


OnAll = Callable[[list[bool]], list[bool]]  # for each flag, whether it is set on all ranks


def _prove_flat(sources: Sequence[Source], on_all: OnAll) -> None:
    """Raises ValueError, on all ranks, if some flat tensor does not hold the weights that it is expected to hold."""
    for view in (source.view for source in sources):
        if isinstance(view, FlatView):
            proven = on_all(deepspeed_zero.are_weights(view.shard, view.param))
            for param, is_proven in zip(view.shard.params, proven, strict=True):
                if not is_proven:
                    raise ValueError(view.misplaced(param))


def _prove_dtensors(
    sources: Sequence[Source], params: Sequence[Sequence[ShardedParam]], rank: int, on_all: OnAll
) -> None:
    """Raises ValueError, on all ranks, if some DTensor is not cut as its placements say: one of each layout."""
    layouts = {}
    for source, own in zip(sources, params, strict=True):
        if isinstance(source.view, DTensorView):
            layouts.setdefault((own[0].shape, own[0].sharding), source)
    proven = on_all([collectives.is_cut_as_told(s.view.param, mesh, rank) for (_, mesh), s in layouts.items()])
    for source, is_proven in zip(layouts.values(), proven, strict=True):
        if not is_proven:
            raise ValueError(
                f"{source.name} is not cut as its placements {source.view.param.placements} say: its parts do not "
                "lie where its full tensor has them"
            )
