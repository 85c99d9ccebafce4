"""From an optimizer's tensors to an exchange: what each rank holds is read off, proven once, and planned."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_cwd.distributed import collectives, deepspeed_zero, dtensor
from hf_cwd.distributed.deepspeed_zero import FlatShard
from hf_cwd.distributed.exchange import Exchange
from hf_cwd.distributed.geometry import Mesh, check, everywhere
from hf_cwd.distributed.matrix_stage import Stage
from hf_cwd.distributed.pinned_memory import Staging
from hf_cwd.distributed.plan import Entry, flops_per_byte, plan
from hf_cwd.distributed.rank_groups import RankGroup, alone
from hf_cwd.newton_schulz.matrices import MatrixLayout

_logger = logging.getLogger("hf_cwd")


class Source(NamedTuple):
    """A parameter of a matrix rule, or a flat tensor with parts of several.

    Attributes:
        param: the parameter, plain or a DTensor, or the flat tensor.
        name: for messages.
        layout: which matrices it holds, or each of the parameters does.
        stage: what is done with them.
        direction: dtype that its direction is computed in.
        flat: what lies in the flat tensor; None for a parameter.
    """

    param: Tensor
    name: str
    layout: MatrixLayout
    stage: Stage
    direction: torch.dtype
    flat: FlatShard | None = None

    @property
    def numel(self) -> int:
        """Elements that this rank has of it, without padding."""
        return dtensor.local(self.param).numel() if self.flat is None else self.flat.numel


def build(
    sources: Sequence[Source],
    group: RankGroup,
    *,
    share: str,
    exchange_bytes: int,
    staging: Staging | None = None,
) -> Exchange:
    """The exchange of these parameters among the ranks of a group, each of which must call it; nothing is changed.

    Where there are several ranks they compare what they are about to plan, prove that parts of the weights are what
    they are taken for, and compare the plan.

    Args:
        sources: all of them on the ranks of ``group``: DTensors by their mesh, others whole on each rank.

    Raises:
        ValueError: a layout that is not understood, or is not what it says, or ranks that differ. All ranks raise.
        RuntimeError: another rank did not call it.
    """
    rank, device = alone().ranks[0], _device(sources, group)
    meshes: dict[int, Mesh] = {}
    if group.together:
        meshes = _agreed(sources, rank, group, device, (share, exchange_bytes))
    else:
        _prove_flat(sources, lambda flags: flags)
    entries = []
    for i, (param, name, layout, stage, direction, flat) in enumerate(sources):
        wire = stage.wire(direction, device.type)
        whole = (name, tuple(param.shape), meshes.get(i) or everywhere(group.ranks), 0)
        held = [whole] if flat is None else flat.params
        entries += [Entry(own, shape, layout, how, stage, wire, i, offset) for own, shape, how, offset in held]
    planned = plan(entries, share=share, exchange_bytes=exchange_bytes, balance=flops_per_byte(device.type))
    exchange, problem = None, None
    try:
        exchange = Exchange(
            planned,
            rank,
            group,
            local_sizes=[source.numel for source in sources],
            device=device,
            batch_bytes=0 if device.type == "cpu" else exchange_bytes,  # batches save launches, and nothing on a CPU
            staging=staging or Staging(),
            padded=[i for i, s in enumerate(sources) if s.flat is not None and s.numel < s.param.numel()],
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
        if source.flat is not None:
            return source.flat.device
        if dtensor.is_dtensor(source.param):
            return dtensor.device(source.param)
    device = sources[0].param.device
    if group.together and f"{device.type}:" not in dist.get_backend_config(group.process_group):
        return dtensor.current_device(torch.accelerator.current_accelerator().type)
    return device


def _agreed(
    sources: Sequence[Source], rank: int, group: RankGroup, device: torch.device, options: tuple[str, int]
) -> dict[int, Mesh]:
    """The meshes of the DTensors, once all ranks have the same parameters and every layout has been proven."""
    meshes, problem, together = {}, None, group.process_group
    try:
        meshes = {i: _mesh(source) for i, source in enumerate(sources) if dtensor.is_dtensor(source.param)}
    except ValueError as error:
        problem = error
    described = []
    for i, source in enumerate(sources):
        held = (source.name, source.param.shape, meshes.get(i)) if source.flat is None else source.flat.params
        described.append((held, source.layout, source.stage, source.direction))
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
    kinds = {(tuple(sources[i].param.shape), mesh): i for i, mesh in reversed(meshes.items())}
    told = [collectives.is_cut_as_told(sources[i].param, meshes[i], rank) for i in kinds.values()]
    for i, is_true in zip(kinds.values(), collectives.everybody(told, device, together), strict=True):
        if not is_true:
            raise ValueError(
                f"{sources[i].name} is not cut as its placements {sources[i].param.placements} say: its parts do not "
                "lie where its full tensor has them"
            )
    return meshes


def _prove_flat(sources: Sequence[Source], on_all: Callable[[list[bool]], list[bool]]) -> None:
    """Raises ValueError, on all ranks, where some flat tensor does not hold the weights that it is taken for.

    Args:
        on_all: for each flag, whether it is set on all ranks.
    """
    for source in sources:
        if source.flat is not None:
            told = on_all(deepspeed_zero.are_weights(source.flat, source.param))
            for param, is_true in zip(source.flat.params, told, strict=True):
                if not is_true:
                    raise ValueError(
                        f"{param.name} of shape {param.shape} does not lie where DeepSpeed {deepspeed_zero.version()} "
                        "is taken to keep it in its flat tensors: those do not hold its weights (tested: "
                        f"{deepspeed_zero.TESTED}). "
                        "Nothing has been changed. Use one of those versions, or an element-wise rule (cwd_adamw)"
                    )


def _mesh(source: Source) -> Mesh:
    try:
        mesh = dtensor.mesh_of(source.param)
        check(tuple(source.param.shape), mesh)
    except ValueError as error:
        raise ValueError(f"{source.name} is a DTensor in a layout that is not supported: {error}") from None
    return mesh
